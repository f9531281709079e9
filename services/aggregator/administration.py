"""What the site's operators ask (the status, once or at every change, and the evidence) and bring (a model)."""

import itertools
from collections.abc import Callable, Iterator

import grpc

from services.aggregator.coordinator import Coordinator, Snapshot
from services.aggregator.evidence import File
from services.aggregator.plan import Plans
from services.aggregator.round import Phase
from services.common.errors import Reason, ServiceError
from services.common.rpc.feed import Feed
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

_BLOCK = 1 << 20


class Administration(admin_pb2_grpc.AdministrationServiceServicer):
    """Reads only."""

    def __init__(
        self,
        id: str,
        coordinator: Coordinator,
        studies: Callable[[], list[bytes]],
        files: Callable[[bytes], Iterator[File]],
        plans: Plans,
    ) -> None:
        """`studies` are those that ran here, `files` the evidence of one."""
        self._id = id
        self._coordinator = coordinator
        self._studies = studies
        self._files = files
        self._plans = plans

    def GetStatus(  # noqa: N802, D102  # gRPC's names
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(status=self._status(self._coordinator.snapshot))

    def WatchStatus(  # noqa: N802, D102
        self, request: admin_pb2.WatchStatusRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.WatchStatusResponse]:
        feed = Feed[admin_pb2.WatchStatusResponse](context)
        last: list[bytes] = []

        def told(snapshot: Snapshot) -> None:
            status = self._status(snapshot)
            text = status.SerializeToString(deterministic=True)
            if last != [text]:
                last[:] = [text]
                feed.push(admin_pb2.WatchStatusResponse(status=status))

        self._coordinator.watch(feed, told)
        try:
            yield from feed
        finally:
            self._coordinator.unwatch(feed)

    def ExportEvidence(  # noqa: N802, D102
        self, request: admin_pb2.ExportEvidenceRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.ExportEvidenceResponse]:
        known = self._studies()
        if request.study and request.study not in known:
            raise ServiceError(Reason.NOT_FOUND, f"study {request.study.hex()[:16]}… never ran here: check the digest")
        wanted = [request.study] if request.study else known
        for study in wanted:
            folder = "" if len(wanted) == 1 else f"{study.hex()}/"
            for file in self._files(study):
                yield from _stream(folder + file.path, file)

    def _status(self, snapshot: Snapshot) -> admin_pb2.Status:
        run, state, plan = snapshot.run, snapshot.state, snapshot.plan
        now = snapshot.waiting or f"round {state.round} of {plan.target}: {state.phase.value}"
        return admin_pb2.Status(
            role="aggregator",
            id=self._id,
            phase=state.phase.value,
            study=run.study.digest,
            round=state.round,
            attempt=state.attempt,
            through_round=plan.target,
            model_version=state.version,
            hospitals_enrolled=len(snapshot.watching),
            hospitals_submitted=len(state.submissions),
            pods_live=len(snapshot.live),
            detail="; ".join(filter(None, (now, self._plans.note))),
            figures=run.figures,
            finished=state.phase is Phase.FINISHED,
            waiting="; ".join(filter(None, (snapshot.waiting, self._plans.note))),
            members=_members(snapshot),
            study_name=run.study.document.name,
            pods_quorum=run.rules.roster.committee.quorum,
            hospitals_minimum=run.rules.minimum,
        )


class PlanServicer(admin_pb2_grpc.PlanServiceServicer):
    """Takes the initial model of a study that a plan names, then looks at the plan again."""

    def __init__(self, coordinator: Coordinator, plans: Plans) -> None:
        self._coordinator = coordinator
        self._plans = plans

    def PushModel(  # noqa: N802, D102  # gRPC's names
        self, request: Iterator[admin_pb2.PushModelRequest], context: grpc.ServicerContext
    ) -> admin_pb2.PushModelResponse:
        first = next(request, admin_pb2.PushModelRequest())
        chunks = (message.chunk for message in itertools.chain([first], request))
        detail = self._plans.receive(first.digest, first.size, chunks)
        self._coordinator.follow(self._plans.adopt())
        return admin_pb2.PushModelResponse(detail=detail)


def _members(snapshot: Snapshot) -> list[admin_pb2.MemberStatus]:
    """Everybody whom the charter of the newest round lists, pods first."""
    roster, state = snapshot.run.rules.roster, snapshot.state
    found = []
    for pod in roster.pods:
        phase = "live" if pod.id in snapshot.live else "connected" if pod.id in snapshot.connected else "away"
        found.append(admin_pb2.MemberStatus(role="pod", id=pod.id, phase=phase))
    for hospital in sorted(roster.hospitals):
        phase = "watching" if hospital in snapshot.watching else "away"
        if hospital in state.submissions:
            phase = "submitted"
        elif hospital in state.declined:
            phase = f"declined: {state.declined[hospital]}"
        found.append(admin_pb2.MemberStatus(role="hospital", id=hospital, phase=phase))
    return found


def _stream(path: str, file: File) -> Iterator[admin_pb2.ExportEvidenceResponse]:
    first = admin_pb2.ExportEvidenceResponse(path=path)
    if isinstance(file.data, bytes):
        for start in range(0, max(1, len(file.data)), _BLOCK):
            first.chunk = file.data[start : start + _BLOCK]
            yield first
            first = admin_pb2.ExportEvidenceResponse()
        return
    with file.data.open("rb") as source:
        while (block := source.read(_BLOCK)) or first.path:
            first.chunk = block
            yield first
            first = admin_pb2.ExportEvidenceResponse()
