"""What one key-share pod may do: the pure state machine of protocol.md §4 and §5.

Rules of this file:
1. Every promise of the pod is a decision here, one function an order: it returns events or refuses, changes nothing.
2. `evolve(state, event)` is total: it believes every event, because only the decisions make them.
3. The caller puts the events on the disk BEFORE it signs or sends anything that follows from them.
4. Signatures were verified before; identity and round keys, time and random bytes come in as data.
5. Nothing secret is here. `State.held` says for which attempts this BOOT has round keys; whoever holds the keys drops
   every key that `held` does not list (P-4, P-22). `Booted` empties it: that is the end of all earlier keys.
6. What was asked before is answered again without an event; a different thing under the same name is refused.
Not here: signatures, keys, seeds, disk, wire, clock.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from services.common.errors import Reason, ServiceError
from services.common.secagg import certificate as valid
from services.common.secagg.blob import encode
from services.common.secagg.certificate import CheckedManifest, CheckedProposal, Ref
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import MAX_ATTEMPT, HighWaterMark, Mark
from services.common.secagg.roster import Roster
from services.keyshare import facts as fact
from services.keyshare.facts import Entry, Event, Held, Record, Seen, State

MAX_STUDIES = 4096  # what one high-water mark can list


class Phase(StrEnum):
    """What this pod has promised about one attempt."""

    UNSEEN = "unseen"
    COMMITTED = "committed"  # keys of this boot, no manifest yet
    ENDORSED = "endorsed"  # keys of this boot, one manifest
    LOCKED = "locked"  # one cohort, for ever; with or without keys
    BURNED = "burned"  # at or below the highest commit, neither keys nor lock
    ABANDONED = "abandoned"
    PAST = "past"  # a higher round was committed
    CLOSED = "closed"


ALLOWED: dict[Phase, frozenset[Phase]] = {
    Phase.UNSEEN: frozenset({Phase.COMMITTED, Phase.BURNED, Phase.ABANDONED, Phase.PAST, Phase.CLOSED}),
    Phase.COMMITTED: frozenset({Phase.ENDORSED, Phase.BURNED, Phase.ABANDONED, Phase.PAST, Phase.CLOSED}),
    Phase.ENDORSED: frozenset({Phase.LOCKED, Phase.BURNED, Phase.ABANDONED, Phase.PAST, Phase.CLOSED}),
    Phase.LOCKED: frozenset({Phase.PAST, Phase.CLOSED}),
    Phase.BURNED: frozenset({Phase.ABANDONED, Phase.PAST, Phase.CLOSED}),
    Phase.ABANDONED: frozenset({Phase.PAST, Phase.CLOSED}),
    Phase.PAST: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}

_REFUSAL: dict[Phase, tuple[Reason, str]] = {
    Phase.UNSEEN: (Reason.WRONG_PHASE, "this pod has not committed to it: propose it first"),
    Phase.COMMITTED: (Reason.WRONG_PHASE, "this pod has endorsed no manifest of it yet"),
    Phase.ENDORSED: (Reason.CONFLICT, "this pod has endorsed another manifest of it"),
    Phase.LOCKED: (Reason.LOCKED, "this pod has locked a cohort of it"),
    Phase.BURNED: (Reason.BURNED, "its keys are gone, or a higher attempt was committed: take the next attempt"),
    Phase.ABANDONED: (Reason.ABANDONED, "this pod has given it up"),
    Phase.PAST: (Reason.BURNED, "this pod has committed to a higher round"),
    Phase.CLOSED: (Reason.CLOSED, "the round is closed"),
}


def phase_of(state: State, ref: Ref) -> Phase:
    """What this pod has promised about `ref`."""
    record = state.record(ref.study)
    if ref.round <= record.closed:
        return Phase.CLOSED
    if ref.round < record.committed[0]:
        return Phase.PAST
    if ref.point in record.abandoned:
        return Phase.ABANDONED
    if ref.round == record.committed[0] and ref.attempt in record.locks:
        return Phase.LOCKED
    if state.holds(ref):
        return Phase.COMMITTED if state.held[ref.study].manifest is None else Phase.ENDORSED
    return Phase.BURNED if ref.point <= record.committed else Phase.UNSEEN


def mark_about(state: State, nonce: bytes, asking: str) -> HighWaterMark:
    """P-11: what this pod has seen of `asking`, for its nonce. Answered before this pod's own check has passed."""
    marks = []
    for study, record in sorted(state.records.items()):
        commit, lock = record.seen.get(asking, Seen())
        marks.append(Mark(study, *record.endorsed, *commit, *lock))
    return HighWaterMark(nonce, asking, state.pod, tuple(marks))


def deliver(state: State, roster: Roster, marks: Sequence[HighWaterMark]) -> list[Event]:
    """P-11. A mark shows a rollback whenever it was made; it makes live only for the nonce of this boot."""
    others = {pod.id for pod in roster.pods} - {state.pod}
    about_me = [mark for mark in marks if mark.asking == state.pod and mark.answering in others]
    for answer in about_me:
        for mark in answer.marks:
            own = state.record(mark.study)
            commit, lock = (mark.commit_round, mark.commit_attempt), (mark.lock_round, mark.lock_attempt)
            if commit > own.committed or lock > own.locked:
                known = f"the store knows {own.committed} and {own.locked}"
                return [fact.RolledBack(f"{answer.answering} has seen commit {commit}, lock {lock}: {known}")]
    fresh = {mark.answering for mark in about_me if mark.nonce == state.boot}
    needed = roster.committee.quorum - 1
    if len(fresh) < needed:
        raise ServiceError(Reason.BELOW_QUORUM, f"{len(fresh)} fresh marks of other pods, {needed} are needed")
    return [] if roster.charter in state.live else [fact.Passed(roster.charter)]


def propose(
    state: State, checked: CheckedProposal, commitment: bytes, abandons: Sequence[bytes], now: int
) -> list[Event]:
    """P-13, P-16, P-22; burned attempts (§4 step 2). `commitment`: the blob with keys drawn just now."""
    ref, proposal, core = checked.ref, checked.proposal, checked.core
    _check_able(state, checked.roster, ref)
    valid.check_expiry(proposal, checked.roster, now)
    record = state.record(core.study)
    if state.holds(ref):
        if state.held[ref.study].proposal == checked.digest:
            return []
        raise ServiceError(Reason.CONFLICT, f"another proposal of {ref} was committed: take the next attempt")
    _check_move(state, ref, Phase.COMMITTED)
    if ref.round == record.committed[0]:
        if checked.core_digest != record.core:
            raise ServiceError(Reason.WRONG_CORE, f"another core of round {ref.round} is pinned here (P-16)")
        for attempt, (manifest, _) in record.locks.items():
            earlier = ref._replace(attempt=attempt)
            if not any(_gives_up(blob, checked.roster, earlier, manifest) for blob in abandons):
                raise ServiceError(Reason.LOCKED, f"{earlier} is locked here: show its abandon certificate (P-13)")
    return [fact.Committed(ref, core.charter, checked.core_digest, checked.digest, commitment, proposal.expires)]


def endorse(state: State, manifest: CheckedManifest) -> list[Event]:
    """P-18: a valid manifest (P-17) with this boot's own commitment, byte for byte; one a (r, a)."""
    ref = manifest.ref
    _check_able(state, manifest.roster, ref)
    if state.holds(ref) and state.held[ref.study].manifest == manifest.M:
        return []
    _check_move(state, ref, Phase.ENDORSED)
    own = manifest.commitments.get(manifest.roster.pod_index(state.pod))
    if own is None or encode(own) != state.held[ref.study].commitment:
        raise ServiceError(Reason.WRONG_CORE, f"the manifest of {ref} lacks this boot's own commitment (P-18)")
    others = tuple(commitment.pod for commitment in manifest.commitments.values() if commitment.pod != state.pod)
    return [fact.Endorsed(ref, manifest.M, others)]


def judge(state: State, manifest: CheckedManifest, entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries (signatures verified, boxes tried) as `offer` takes them: L-4, one header a hospital, nobody late."""
    held, record = _serving(state, manifest)
    first, judged = dict(held.accepted), []
    for entry in entries:
        _, _, sequence, head, refusal = entry
        if first.setdefault(entry.hospital, entry.header) != entry.header:
            refusal = f"{Reason.CONFLICT}: a second header of this hospital under one manifest"
        elif state.heads.get(entry.hospital, {}).get(sequence, head) != head:
            refusal = f"{Reason.ROLLED_BACK}: its ledger sequence {sequence} was seen with another head"
        elif sequence < record.ledger.get(entry.hospital, 0):
            refusal = f"{Reason.ROLLED_BACK}: its ledger sequence {sequence} is below one seen in this study"
        elif held.ref.attempt in record.locks and entry.hospital not in held.accepted:
            refusal = f"{Reason.LATE}: the cohort is locked; wait for the next round"
        judged.append(entry._replace(refusal=refusal))
    return tuple(judged)


def offer(state: State, manifest: CheckedManifest, entries: Sequence[Entry]) -> list[Event]:
    """§4 step 6. The ledger mark of every signed header is remembered, of refused ones too (L-4)."""
    held, _ = _serving(state, manifest)
    news = tuple(
        entry
        for entry in judge(state, manifest, entries)
        if entry.sequence not in state.heads.get(entry.hospital, {})
        or (not entry.refusal and entry.hospital not in held.accepted)
    )
    return [fact.Offered(held.ref, news)] if news else []


def lock(state: State, manifest: CheckedManifest, cohort: Cohort) -> list[Event]:
    """§4 step 7 with P-4, P-12: the aggregator's choice of U."""
    held, record = _serving(state, manifest)
    if record.locks.get(held.ref.attempt) == (manifest.M, cohort.digest):
        return []
    _check_move(state, held.ref, Phase.LOCKED)
    _check_cohort(held, manifest, cohort)
    return [fact.Locked(held.ref, manifest.M, cohort.digest, ())]


def release(
    state: State, manifest: CheckedManifest, cohort: Cohort, locked: Sequence[str], pieces: Sequence[int]
) -> list[Event]:
    """P-20: sums or digests over the cohort of a valid certificate (P-19) with locks of the pods `locked`.

    A certificate is a lock: a pod without one stores this one first.
    """
    held, record = _serving(state, manifest)
    _check_cohort(held, manifest, cohort)
    own = manifest.roster.committee.pieces_of(manifest.roster.pod_index(state.pod))
    if not pieces or list(pieces) != sorted(set(pieces)) or not set(pieces) <= set(own):
        raise ServiceError(Reason.NOT_PERMITTED, f"pieces {list(pieces)}: this pod holds {list(own)} (P-5)")
    mine = record.locks.get(held.ref.attempt)
    if mine not in (None, (manifest.M, cohort.digest)):
        why = "over another cohort than the one locked here: more pods are bad than the committee bears"
        raise ServiceError(Reason.CONFLICT, f"ALARM: a certificate of {held.ref} {why}; nothing is released")
    news = tuple(p for p in locked if p != state.pod and record.seen.get(p, Seen()).lock < held.ref.point)
    return [fact.Locked(held.ref, manifest.M, cohort.digest, news)] if news or mine is None else []


def abandon(state: State, roster: Roster, ref: Ref, manifest: bytes) -> list[Event]:
    """P-14: no lock on the disk, P-11 passed; then never again endorse, accept, lock or release for (study, r, a)."""
    _check_able(state, roster, ref)
    record = state.record(ref.study)
    same_round = ref.round == record.committed[0]
    known = record.abandoned.get(ref.point) or (record.manifests.get(ref.attempt) if same_round else None)
    if known not in (None, manifest):
        raise ServiceError(Reason.CONFLICT, f"another manifest of {ref} is known here")
    if same_round and record.charter != roster.charter:
        raise ServiceError(Reason.WRONG_CORE, f"round {ref.round} runs under another charter")
    if phase_of(state, ref) is Phase.ABANDONED:
        return []
    _check_move(state, ref, Phase.ABANDONED)
    return [fact.Abandoned(ref, manifest)]


def close(state: State, roster: Roster, study: bytes, number: int) -> list[Event]:
    """§4 step 10: the aggregator's signed word that the round is over."""
    _check_bounds(state, roster, Ref(study, number, 1))
    return [fact.Closed(study, number)] if number > state.record(study).closed else []


def expire(state: State, now: int) -> list[fact.Expired]:
    """P-22: it is `now` (Unix ms)."""
    return [fact.Expired(held.ref) for held in state.held.values() if held.expires <= now]


def _serving(state: State, manifest: CheckedManifest) -> tuple[Held, Record]:
    """P-18: the keys for the M that was endorsed in this boot, of an attempt neither abandoned nor closed."""
    ref = manifest.ref
    _check_able(state, manifest.roster, ref)
    phase = phase_of(state, ref)
    if phase is Phase.LOCKED and not state.holds(ref):
        raise ServiceError(Reason.NOT_LIVE, f"the keys of {ref} are gone: this pod counts as down")
    if phase not in (Phase.ENDORSED, Phase.LOCKED) or state.held[ref.study].manifest != manifest.M:
        raise _refusal(state, ref)
    return state.held[ref.study], state.record(ref.study)


def _check_able(state: State, roster: Roster, ref: Ref) -> None:
    """P-11 passed under this charter, no rollback, and `ref` within bounds."""
    if state.rolled_back:
        mend = "give the pod a new id and key by a charter amendment, and an empty volume"
        raise ServiceError(Reason.ROLLED_BACK, f"{state.pod}'s store went back in time ({state.rolled_back}): {mend}")
    if roster.charter not in state.live:
        raise ServiceError(Reason.NOT_LIVE, "this pod waits for fresh high-water marks of other pods (P-11)")
    _check_bounds(state, roster, ref)


def _check_bounds(state: State, roster: Roster, ref: Ref) -> None:
    most = roster.limits.max_round
    if not 1 <= ref.round <= most or not 1 <= ref.attempt <= MAX_ATTEMPT:
        raise ServiceError(Reason.TOO_LARGE, f"{ref}: rounds 1..{most}, attempts 1..{MAX_ATTEMPT} (P-16)")
    if ref.study not in state.records and len(state.records) >= MAX_STUDIES:
        raise ServiceError(Reason.TOO_LARGE, f"this pod knows {MAX_STUDIES} studies, which is the most")


def _check_move(state: State, ref: Ref, to: Phase) -> None:
    if to not in ALLOWED[phase_of(state, ref)]:
        raise _refusal(state, ref)


def _check_cohort(held: Held, manifest: CheckedManifest, cohort: Cohort) -> None:
    """U is of this manifest, large enough (P-12), and within the accept list with equal header digests."""
    if cohort.manifest != manifest.M:
        raise ServiceError(Reason.WRONG_CORE, "the cohort names another manifest")
    cohort.check_cohort_size(manifest.roster, manifest.core.minimum_cohort)
    for member in cohort.members:
        if held.accepted.get(member.hospital) != member.header:
            raise ServiceError(Reason.WRONG_CORE, f"{member.hospital} was not accepted here with this header")


def _gives_up(blob: bytes, roster: Roster, ref: Ref, manifest: bytes) -> bool:
    try:
        valid.check_abandon_certificate(blob, roster, *ref, manifest=manifest)
    except ServiceError:
        return False
    return True


def _refusal(state: State, ref: Ref) -> ServiceError:
    reason, why = _REFUSAL[phase_of(state, ref)]
    return ServiceError(reason, f"{ref}: {why}")


def evolve(state: State, event: Event) -> State:
    """The state after `event`; total."""
    match event:
        case fact.Booted(boot):
            return replace(state, boot=boot, live=frozenset(), held={})
        case fact.Passed(charter):
            return replace(state, live=state.live | {charter})
        case fact.RolledBack(detail):
            return replace(state, rolled_back=detail, held={})
        case fact.Closed(study, number):
            record, held = state.record(study), state.held.get(study)
            kept = held if held and held.ref.round > number else None
            return _with(state, study, replace(record, closed=max(record.closed, number)), kept)
    ref = event.ref
    record, held, mine = state.record(ref.study), state.held.get(ref.study), state.holds(ref)
    match event:
        case fact.Committed(_, charter, core, proposal, commitment, expires):
            if ref.round > record.committed[0]:
                later = {point: m for point, m in record.abandoned.items() if point[0] >= ref.round}
                record = replace(record, manifests={}, locks={}, abandoned=later)
            record = replace(record, committed=ref.point, charter=charter, core=core)
            held = Held(ref, proposal, commitment, expires)
        case fact.Endorsed(_, manifest, others):
            manifests = {**record.manifests, ref.attempt: manifest}
            record = replace(
                record, endorsed=ref.point, manifests=manifests, seen=_saw(record, others, commit=ref.point)
            )
            held = replace(held, manifest=manifest) if held and mine else held
        case fact.Offered(_, entries):
            heads, ledger = dict(state.heads), dict(record.ledger)
            for entry in entries:  # L-4: the first head of each sequence stays; the study's highest sequence rises
                heads[entry.hospital] = {entry.sequence: entry.head, **heads.get(entry.hospital, {})}
                ledger[entry.hospital] = max(ledger.get(entry.hospital, 0), entry.sequence)
            state, record = replace(state, heads=heads), replace(record, ledger=ledger)
            good = {entry.hospital: entry.header for entry in entries if not entry.refusal}
            held = replace(held, accepted={**good, **held.accepted}) if held and mine else held
        case fact.Locked(_, manifest, cohort, others):
            locks = {**record.locks, ref.attempt: (manifest, cohort)}
            record = replace(record, locked=ref.point, locks=locks, seen=_saw(record, others, lock=ref.point))
        case fact.Abandoned(_, manifest):
            record = replace(record, abandoned={**record.abandoned, ref.point: manifest})
    if mine and isinstance(event, fact.Abandoned | fact.Expired):
        held = None
    return _with(state, ref.study, record, held)


def _saw(record: Record, pods: Sequence[str], **newest: fact.Point) -> dict[str, Seen]:
    return {**record.seen, **{pod: record.seen.get(pod, Seen())._replace(**newest) for pod in pods}}


def _with(state: State, study: bytes, record: Record, held: Held | None) -> State:
    others = {s: h for s, h in state.held.items() if s != study}
    return replace(state, records={**state.records, study: record}, held=others | ({study: held} if held else {}))
