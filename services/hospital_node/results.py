"""After a round: the chain of signed results, and whether this hospital was counted as it should be.

protocol.md §4 step 10 and privacy.md L-3: in the cohort without having submitted that very header, or a cohort
that no valid certificate covers → alarm, the study stops here until a person acknowledges that very result.
Submitted, receipt held, left out → kept as evidence.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence

from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.common.secagg.certificate import (
    CheckedManifest,
    ResultLink,
    check_certificate,
    check_endorsed,
    check_manifest,
    check_result_chain,
)
from services.common.secagg.messages import OUTCOME_ACCEPTED, OUTCOME_REJECTED, ZERO_DIGEST, Result
from services.common.secagg.roster import Roster
from services.hospital_node.client import ResultAnswer
from services.hospital_node.control import moved_control
from services.hospital_node.ledger import Ledger
from services.hospital_node.store import Alarm, Chain, Store

_log = logging.getLogger(__name__)


def follow_results(
    store: Store,
    ledger: Ledger,
    hospital: str,
    study: LoadedStudy,
    rosters: Mapping[bytes, Roster],
    answers: Sequence[ResultAnswer],
) -> None:
    """Verify the answers from the result that is held, one by one, and hold the last.

    Raises as `check_result_chain`, WRONG_CORE for a round that did not start from the model before it, and
    CONFLICT after the study was halted here, with what the round really cost in the ledger (L-3).
    """
    for answer in answers:
        held = store.chain(study.digest)
        link = ResultLink(answer.result, answer.manifest)
        end, result = check_result_chain([link], rosters, study.digest, held.digest, held.round)
        assert result is not None  # noqa: S101  # one link in, one result out
        checked = check_manifest(answer.manifest, rosters[result.charter])
        check_endorsed(checked, answer.endorsements)
        if checked.core.model != (held.model or bytes.fromhex(study.document.model.initial)):
            raise ServiceError(
                Reason.WRONG_CORE, f"the result of round {result.round} did not start from the model before it"
            )
        try:
            left_out, counted = _membership(store, hospital, checked, result, answer.certificate)
        except ServiceError as error:
            alarm = Alarm(study.digest, result.round, end, error.detail)
            if not _acknowledged(store, ledger, alarm, error.reason):
                raise ServiceError(Reason.CONFLICT, f"this study is stopped here: {error.detail}") from None
            left_out, counted = None, False
        control = moved_control(store, study, checked) if counted else None
        chain = Chain(result.round, end, result.model, result.version)
        store.advance_chain(study.digest, chain, left_out, control)


def _acknowledged(store: Store, ledger: Ledger, alarm: Alarm, reason: Reason) -> bool:
    """Expose the round (L-3); True when a person has let the study go on past this very result, else it is stopped."""
    known = store.acknowledged(alarm.study, alarm.round, alarm.result)
    with store.database.transaction() as connection:
        ledger.expose(connection, alarm.study.hex(), alarm.round, alarm.detail)
        if not known:
            store.halt(alarm, reason)
    if known:
        _log.warning("passed over, as acknowledged here: %s", alarm.detail)
    else:
        _log.critical("alarm: %s", alarm.detail)
    return known


def _membership(
    store: Store, hospital: str, checked: CheckedManifest, result: Result, certificate: bytes
) -> tuple[tuple[int, bytes] | None, bool]:
    """(the evidence (attempt, certificate) when this hospital was left out, is its vector in the accepted sum?).

    Raises what the alarm says.
    """
    if result.outcome == OUTCOME_REJECTED and not certificate and result.certificate == ZERO_DIGEST:
        return None, False
    if hashlib.sha256(certificate).digest() != result.certificate:
        raise ServiceError(Reason.CONFLICT, f"the certificate of round {result.round} is not the one its result names")
    cohort = check_certificate(checked, certificate)
    if cohort.digest != result.cohort:
        raise ServiceError(Reason.CONFLICT, f"the result of round {result.round} names a cohort that was not locked")
    own = store.submission(checked.M)
    counted = next((member.header for member in cohort.members if member.hospital == hospital), None)
    if counted is not None and (own is None or own.header_digest != counted):
        raise ServiceError(
            Reason.CONFLICT,
            f"round {result.round} counts a submission of {hospital} that this node never made: its identity key may "
            "be in other hands; stop, and bring a new identity into the charter",
        )
    if counted is None and own is not None and own.receipt is not None:
        _log.warning(
            "left out of the cohort of round %d although the receipt is held: the certificate is kept as evidence",
            result.round,
        )
        return (result.attempt, certificate), False
    return None, counted is not None and result.outcome == OUTCOME_ACCEPTED
