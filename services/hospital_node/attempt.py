"""What must hold before anything of an attempt is masked (protocol.md §4 step 4; P-10, P-16, P-17, P-21).

Pure: the aggregator's answer, this hospital's own core and its own earlier submissions come in as arguments.
Any failure means: nothing leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from services.common.errors import Reason, ServiceError
from services.common.secagg.certificate import (
    CheckedManifest,
    check_abandon_certificate,
    check_endorsed,
    check_expiry,
    check_manifest,
)
from services.common.secagg.messages import Core, Signed
from services.common.secagg.roster import Roster


@dataclass(frozen=True)
class Sent:
    """A submission that left, or may have left: a pending record counts as sent (P-10)."""

    round: int
    attempt: int
    manifest: bytes
    core: bytes


def check_attempt(
    manifest: bytes,
    endorsements: Sequence[Signed],
    abandons: Sequence[bytes],
    *,
    roster: Roster,
    own: Core,
    sent: Sequence[Sent],
    now_ms: int,
) -> CheckedManifest:
    """The manifest under which this hospital may mask; `sent`: its submissions of the study in this round or later.

    Raises as `check_manifest` and `check_endorsed` (P-17); WRONG_CORE for a core other than `own` (P-21) or than
    the one submitted in this round (P-16); BURNED below the own mark or without the abandon certificates of P-10;
    CONFLICT for a second manifest of one attempt; LATE behind the deadline.
    """
    checked = check_manifest(manifest, roster)
    check_endorsed(checked, endorsements)
    _check_core(checked, own)
    check_expiry(checked.proposal, roster, now_ms)
    if checked.proposal.deadline <= now_ms:
        raise ServiceError(Reason.LATE, f"the deadline of round {own.round} has passed: wait for the next round")
    check_mark(checked, sent)
    for earlier in sent:
        if earlier.round == own.round and earlier.manifest != checked.M:
            _find_abandon(earlier, abandons, roster, own.study)
    return checked


def check_mark(checked: CheckedManifest, sent: Sequence[Sent]) -> None:
    """The own mark (r, a, M): a higher round, or the same round at a higher attempt, or the same M again."""
    number, attempt = checked.core.round, checked.proposal.attempt
    highest = max((earlier.round for earlier in sent), default=0)
    if number < highest:
        raise ServiceError(
            Reason.BURNED, f"round {number} lies below round {highest}, in which this hospital has submitted: replayed"
        )
    for earlier in sent:
        if earlier.round != number:
            continue
        if earlier.core != checked.core_digest:
            raise ServiceError(
                Reason.WRONG_CORE,
                f"round {number} has another core than at attempt {earlier.attempt} (P-16)",
            )
        if earlier.manifest != checked.M and attempt <= earlier.attempt:
            raise ServiceError(
                Reason.CONFLICT,
                f"a second manifest for round {number}: attempt {attempt} does not lie above attempt "
                f"{earlier.attempt}, in which this hospital has submitted",
            )


def _check_core(checked: CheckedManifest, own: Core) -> None:
    different = [f.name for f in fields(Core) if getattr(checked.core, f.name) != getattr(own, f.name)]
    if different:
        raise ServiceError(
            Reason.WRONG_CORE,
            f"the proposal of round {checked.core.round} differs from this hospital's own core in "
            f"{', '.join(different)} (P-21): nothing is sent; compare charter and study with the aggregator's",
        )


def _find_abandon(earlier: Sent, abandons: Sequence[bytes], roster: Roster, study: bytes) -> None:
    for certificate in abandons:
        try:
            check_abandon_certificate(
                certificate, roster, study, earlier.round, earlier.attempt, manifest=earlier.manifest
            )
        except ServiceError:
            continue  # of another attempt, or not valid: only a valid one for this very M counts
        return
    raise ServiceError(
        Reason.BURNED,
        f"round {earlier.round}: no valid abandon certificate for attempt {earlier.attempt}, under which this hospital "
        "has or may have submitted (P-10): nothing is sent again in this round without it",
    )
