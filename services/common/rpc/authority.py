"""Who may call what. An RPC without a row here cannot be called, and fails a test."""

from services.common.ids import Role

_HOSPITALS = frozenset({Role.HOSPITAL})
_PODS = frozenset({Role.POD})
_OPERATORS = frozenset({Role.OPERATOR})

AUTHORITY: dict[str, frozenset[Role]] = {
    "/wardround.round.v1.RoundCoordinationService/WatchRounds": _HOSPITALS,
    "/wardround.round.v1.RoundCoordinationService/GetStudy": _HOSPITALS,
    "/wardround.round.v1.RoundCoordinationService/GetManifest": _HOSPITALS,
    "/wardround.round.v1.RoundCoordinationService/ListResults": _HOSPITALS,
    "/wardround.round.v1.RoundCoordinationService/DeclineRound": _HOSPITALS,
    "/wardround.round.v1.RoundCoordinationService/Greet": _HOSPITALS,
    "/wardround.model.v1.ModelDistributionService/FetchModel": _HOSPITALS,
    "/wardround.submission.v1.UpdateSubmissionService/UploadStatus": _HOSPITALS,
    "/wardround.submission.v1.UpdateSubmissionService/SubmitUpdate": _HOSPITALS,
    "/wardround.keyshare.v1.KeyShareService/Watch": _PODS,
    "/wardround.keyshare.v1.KeyShareService/FetchOffer": _PODS,
    "/wardround.keyshare.v1.KeyShareService/Greet": _PODS,
    "/wardround.admin.v1.AdministrationService/GetStatus": _OPERATORS,
    "/wardround.admin.v1.AdministrationService/WatchStatus": _OPERATORS,
    "/wardround.admin.v1.AdministrationService/ExportEvidence": _OPERATORS,
    "/wardround.admin.v1.PlanService/PushModel": _OPERATORS,
    "/wardround.admin.v1.AlarmService/ListAlarms": _OPERATORS,
    "/wardround.admin.v1.AlarmService/AcknowledgeAlarm": _OPERATORS,
}
"""Full method name to the roles that may call it. Operators: only those of the serving site itself."""
