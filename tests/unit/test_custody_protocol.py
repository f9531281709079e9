"""One round through real pods, and what each step promises."""

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.certificate import Ref, check_endorsed, open_round_signed
from services.common.secagg.digests import chunk_digest, vector_digest
from services.common.secagg.messages import (
    SUITE_HYBRID,
    AbandonCertificate,
    Commitment,
    LedgerMark,
    Manifest,
    PieceSum,
    Signed,
)
from services.keyshare import custody
from services.keyshare.custody import ALLOWED, Phase, phase_of
from tests.support.consortium import NOW, derive, make_consortium, values_for
from tests.support.packed import encoded
from tests.support.pods import PodWorld, refuses


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PodWorld]:
    made = PodWorld(tmp_path)
    yield made
    made.close()


def test_whole_round_gives_the_plain_sum(world: PodWorld) -> None:
    """P-5, P-19, P-20: y minus the released sums is the sum of the plain vectors, computed without the ring."""
    found = world.attempt()
    check_endorsed(found.checked, found.endorsements)
    world.offer_all(found)
    cohort = found.cohort("alice", "bob", "dave")
    certificate = world.certificate(found, cohort)
    table = found.checked.table
    ring = table.ring
    expected = sum(ring.lift(ring.unpack(encoded(table, values_for(table, number)))) for number in (0, 1, 3))
    assert np.array_equal(world.unmask(found, cohort, certificate), expected)
    for index in world.pods:
        world.pods[index].close(world.close_round(1))
    assert all(not pod._secrets and not pod.state.held for pod in world.pods.values())


def test_piece_sum_is_signed_over_what_was_sent(world: PodWorld) -> None:
    """P-23's ground: Release and Digest sign the same blob; two holders of a piece agree."""
    found = world.attempt()
    world.offer_all(found)
    certificate = world.certificate(found)
    blobs = {}
    for index in (1, 2, 3):
        *chunks, signed = world.pods[index].release(found.manifest, certificate, [0], 0, 1)
        assert isinstance(signed, Signed)
        _, piece_sum = open_round_signed(PieceSum, "release", signed, found.checked)
        data = [item[2] for item in chunks if not isinstance(item, Signed)]
        assert piece_sum.vector == vector_digest(sum(map(len, data)), map(chunk_digest, data))
        blobs[index] = replace(piece_sum, pod="x")
    assert len(set(map(str, blobs.values()))) == 1


def test_every_answer_is_the_same_again(world: PodWorld) -> None:
    """Everything is idempotent: the same bytes, and nothing new in the log."""
    found = world.attempt()
    world.offer_all(found)
    certificate = world.certificate(found)
    list(world.pods[0].release(found.manifest, certificate, [1], 0, 1))
    proposal = codec.decode(Manifest, found.manifest).proposal
    before = len(list(world.stores[0].audit()))
    assert world.pods[0].propose(proposal, []).blob == codec.encode(found.checked.commitments[0])
    assert world.pods[0].endorse(found.manifest) == found.endorsements[0]
    assert len(world.offer(0, found)[0].accepted) == 4
    assert world.certificate(found) == certificate
    assert world.sums(0, found, certificate, [1]) == world.sums(2, found, certificate, [1])
    world.go_live(0)
    assert len(list(world.stores[0].audit())) == before


def test_nothing_secret_in_log_or_repr(world: PodWorld) -> None:
    """P-4, P-22: neither the log nor any repr holds a seed, a stream key or a private key."""
    found = world.attempt()
    world.offer_all(found)
    pod = world.pods[0]
    (secrets,) = pod._secrets.values()
    text = b"".join(world.stores[0].audit()).decode() + repr(pod.state) + repr(secrets)
    seeds = [seed for submission in found.submissions.values() for seed in submission.seeds]
    streams = [key for keys in secrets.streams.values() for key in keys]
    assert len(streams) == 4 * 3
    for secret in [*seeds, *streams, secrets.signer._private_key.private_bytes_raw()]:
        assert secret.hex() not in text
        assert repr(secret) not in text


def test_keys_expire_by_the_pods_own_clock(world: PodWorld) -> None:
    """P-22: at `expires` keys and seeds are gone without a command; nothing is released, an abandon is still signed."""
    found = world.attempt()
    world.offer_all(found)
    world.clock.now = NOW + 3_600_000
    world.pods[0].expire()
    assert not world.pods[0]._secrets
    with refuses(Reason.BURNED):
        world.pods[0].lock(found.manifest, found.cohort().blob)
    assert world.abandon(0, found)
    assert phase_of(world.pods[0].state, found.ref) is Phase.ABANDONED


def test_keys_expire_on_a_full_disk_too(world: PodWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-22: what cannot be written does not keep the keys; what cannot be written is not signed either (P-4)."""
    found = world.attempt()
    world.offer_all(found)

    def full(events: object) -> None:
        raise ServiceError(Reason.STORAGE, "full")

    monkeypatch.setattr(world.stores[0], "append", full)
    with refuses(Reason.STORAGE):
        world.pods[0].lock(found.manifest, found.cohort().blob)
    assert phase_of(world.pods[0].state, found.ref) is Phase.ENDORSED
    world.clock.now = NOW + 3_600_000
    with refuses(Reason.STORAGE):
        world.pods[0].expire()
    assert not world.pods[0]._secrets


def test_keys_that_expire_stop_a_release(world: PodWorld) -> None:
    """P-22: a release under way ends when the keys are dropped."""
    found = world.attempt()
    world.offer_all(found)
    certificate = world.certificate(found)
    stream = world.pods[0].release(found.manifest, certificate, [1, 2], 0, 1)
    next(stream)
    world.pods[0].close(world.close_round(1))
    with refuses(Reason.NOT_LIVE):
        list(stream)


@pytest.mark.parametrize("late", [0, 24 * 3600 * 1000 + 1])
def test_life_of_a_round_key_is_bounded(world: PodWorld, late: int) -> None:
    """P-22: `expires` in the past, or beyond the charter's limit, is refused."""
    with refuses(Reason.LATE if late == 0 else Reason.WRONG_CORE):
        world.pods[0].propose(world.consortium.proposal(expires=NOW + late, deadline=NOW), [])


def test_commit_to_a_higher_attempt_drops_the_lower_keys(world: PodWorld) -> None:
    """P-22: one attempt's keys a study."""
    first = world.attempt()
    world.propose(attempt=2, pods=[0])
    assert [ref.attempt for ref in world.pods[0]._secrets] == [2]
    with refuses(Reason.BURNED):
        world.offer(0, first)
    with refuses(Reason.BURNED):
        world.pods[0].propose(world.consortium.proposal(attempt=1), [])


def test_restart_burns_the_attempt(world: PodWorld) -> None:
    """P-4, P-18: after a restart the same proposal is refused, and so is everything under the old manifest."""
    found = world.attempt()
    world.offer_all(found)
    proposal = codec.decode(Manifest, found.manifest).proposal
    certificate = world.certificate(found, pods=(1, 2, 3))
    pod = world.restart(0)
    for ask in (
        lambda: pod.propose(proposal, []),
        lambda: pod.endorse(found.manifest),
        lambda: pod.lock(found.manifest, found.cohort().blob),
        lambda: world.offer(0, found),
        lambda: list(pod.release(found.manifest, certificate, [1], 0, 1)),
    ):
        with refuses(Reason.BURNED):
            ask()
    assert pod.propose(world.consortium.proposal(attempt=2), [])


def test_a_locked_pod_commits_again_only_with_the_abandon_certificate(world: PodWorld) -> None:
    """P-13: a certificate of that very M, of enough pods, for every locked attempt."""
    first = world.attempt()
    world.offer_all(first)
    world.pods[0].lock(first.manifest, first.cohort().blob)
    proposal = world.consortium.proposal(attempt=2)
    few = codec.encode(codec.decode(AbandonCertificate, world.consortium.abandon_certificate(first.checked, [1, 2])))
    other = world.consortium.abandon_certificate(world.consortium.manifest(), [1, 2, 3])
    for shown in ([], [few], [other], [b"nonsense"]):
        with refuses(Reason.LOCKED):
            world.pods[0].propose(proposal, shown)
    good = world.abandon_certificate(first, [1, 2, 3])
    second = world.attempt(attempt=2, abandons=[good])
    world.offer_all(second)
    world.pods[0].lock(second.manifest, second.cohort().blob)
    with refuses(Reason.LOCKED):
        world.pods[0].propose(world.consortium.proposal(attempt=3), [good])
    with refuses(Reason.LOCKED):
        world.abandon(0, first)  # the older lock still stands


def test_core_is_pinned_for_the_round(world: PodWorld) -> None:
    """P-16: another core for r is refused, also after a restart; the next round may have another."""
    world.attempt()
    world.restart(0)
    other = world.consortium.core(model=derive("other model"))
    with refuses(Reason.WRONG_CORE):
        world.pods[0].propose(world.consortium.proposal(other, attempt=2), [])
    next_round = world.consortium.core(model=derive("other model"), round=2)
    assert world.pods[0].propose(world.consortium.proposal(next_round), [])


def test_rounds_and_attempts_are_bounded(world: PodWorld) -> None:
    """P-16: a ≤ 64, r ≤ the charter's bound, for Propose, Abandon and Close."""
    pod, roster = world.pods[0], world.consortium.roster
    core = world.consortium.core(round=101)
    with refuses(Reason.WRONG_CORE):
        pod.propose(world.consortium.proposal(core), [])
    for number, attempt in ((101, 1), (1, 65), (0, 1), (1, 0)):
        with refuses(Reason.TOO_LARGE):
            pod.abandon(roster.charter, Ref(core.study, number, attempt), derive("M"))
    with refuses(Reason.TOO_LARGE):
        pod.close(world.close_round(101))
    assert pod.propose(world.consortium.proposal(attempt=64), [])


def test_abandoned_attempt_is_dead(world: PodWorld) -> None:
    """P-14: after abandon neither endorse, accept, lock, release nor commit; keys are gone; the same bytes again."""
    found = world.attempt()
    world.offer_all(found)
    signed = world.abandon(0, found)
    assert world.abandon(0, found) == signed
    assert not world.pods[0]._secrets
    certificate = world.certificate(found, pods=(1, 2, 3))
    proposal = codec.decode(Manifest, found.manifest).proposal
    for ask in (
        lambda: world.pods[0].propose(proposal, []),
        lambda: world.pods[0].endorse(found.manifest),
        lambda: world.offer(0, found),
        lambda: world.pods[0].lock(found.manifest, found.cohort().blob),
        lambda: list(world.pods[0].release(found.manifest, certificate, [1], 0, 1)),
    ):
        with refuses(Reason.ABANDONED):
            ask()


def test_abandon_of_an_attempt_never_seen(world: PodWorld) -> None:
    """P-14: a pod that was down may give up (study, r, a), and then never commits to it, also after a restart."""
    ref = Ref(world.consortium.core().study, 1, 1)
    world.pods[0].abandon(world.consortium.roster.charter, ref, derive("M"))
    world.restart(0)
    with refuses(Reason.ABANDONED):
        world.pods[0].propose(world.consortium.proposal(), [])
    with refuses(Reason.CONFLICT):
        world.pods[0].abandon(world.consortium.roster.charter, ref, derive("another M"))
    world.pods[0].propose(world.consortium.proposal(attempt=2), [])
    world.pods[0].propose(world.consortium.proposal(world.consortium.core(round=2)), [])
    with refuses(Reason.BURNED):
        world.pods[0].abandon(world.consortium.roster.charter, ref, derive("M"))


def test_abandon_needs_a_pinned_charter_and_the_rounds_own(world: PodWorld) -> None:
    """P-2, P-14: an unknown charter, or another than the round's, is refused."""
    found = world.attempt()
    with refuses(Reason.WRONG_CORE):
        world.pods[0].abandon(derive("unknown"), found.ref, found.checked.M)
    roster = replace(world.consortium.roster, charter=derive("next"))
    world.pods[0].rosters = {**world.pods[0].rosters, roster.charter: roster}
    world.go_live(0)
    with refuses(Reason.WRONG_CORE):
        world.pods[0].abandon(roster.charter, found.ref, found.checked.M)


def test_all_attempts_of_a_round_run_under_one_charter(world: PodWorld) -> None:
    """P-16: an amendment starts with a new round."""
    roster = replace(world.consortium.roster, charter=derive("next"))
    for index, pod in world.pods.items():
        pod.rosters = {**pod.rosters, roster.charter: roster}
        world.go_live(index)
    world.attempt()
    amended = replace(world.consortium, roster=roster)
    with refuses(Reason.WRONG_CORE):
        world.pods[0].propose(amended.proposal(amended.core(), attempt=2), [])
    assert world.pods[0].propose(amended.proposal(amended.core(round=2)), [])


def test_closed_round_is_over(world: PodWorld) -> None:
    """P-22: after Close nothing of r or below is done; a lower Close changes nothing."""
    found = world.attempt()
    world.offer_all(found)
    certificate = world.certificate(found)
    world.pods[0].close(world.close_round(2))
    world.pods[0].close(world.close_round(1))
    assert not world.pods[0]._secrets
    for ask in (
        lambda: list(world.pods[0].release(found.manifest, certificate, [1], 0, 1)),
        lambda: world.abandon(0, found),
        lambda: world.pods[0].propose(world.consortium.proposal(attempt=2), []),
    ):
        with refuses(Reason.CLOSED):
            ask()


def test_close_of_a_lower_round_keeps_the_open_attempt(world: PodWorld) -> None:
    found = world.attempt(world.consortium.core(round=2))
    world.pods[0].close(world.close_round(1))
    assert world.pods[0].state.holds(found.ref)


def test_ledger_marks_are_remembered(world: PodWorld) -> None:
    """L-4: a sequence with another head, or below the study's highest, is refused; restarts forget nothing."""
    world.offer_all(world.attempt(ledger={"alice": LedgerMark(5, derive("five")), "bob": LedgerMark(7, derive("b7"))}))
    for index in list(world.pods):
        world.restart(index)
    again = world.attempt(
        attempt=2,
        ledger={
            "alice": LedgerMark(5, derive("forked")),
            "bob": LedgerMark(6, derive("b6")),
            "carol": LedgerMark(1, derive("ledger", "carol")),  # the same mark again: the same vector
            "dave": LedgerMark(2, derive("d2")),
        },
    )
    accepted, refused = world.offer(0, again)
    assert [entry.hospital for entry in accepted.accepted] == ["carol", "dave"]
    assert refused == {"alice": Reason.ROLLED_BACK, "bob": Reason.ROLLED_BACK}


def test_ledger_marks_count_per_study(world: PodWorld) -> None:
    """L-4: in another study a lower sequence is no rollback, but a known sequence with another head is."""
    world.offer_all(world.attempt(ledger={"alice": LedgerMark(5, derive("five")), "bob": LedgerMark(7, derive("b7"))}))
    other = world.consortium.core(study=derive("another study"))
    marks = {"alice": LedgerMark(3, derive("three")), "bob": LedgerMark(7, derive("forked"))}
    _, refused = world.offer(0, world.attempt(other, ledger=marks))
    assert refused == {"bob": Reason.ROLLED_BACK}


def test_number_of_studies_is_bounded(world: PodWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lying aggregator cannot make the marks grow beyond what one blob may list."""
    monkeypatch.setattr(custody, "MAX_STUDIES", 1)
    world.attempt()
    with refuses(Reason.TOO_LARGE):
        world.pods[0].propose(world.consortium.proposal(world.consortium.core(study=derive("more"))), [])
    world.restart(1)


def test_wrong_identity_key_does_not_start(world: PodWorld) -> None:
    """P-2: the pod's own key is the one that the charter lists."""
    world.stop(0)
    world.consortium.pods[0].identity = world.consortium.pods[1].identity
    with refuses(Reason.INVALID_DOCUMENT):
        world.boot(0)


def test_state_survives_a_restart(world: PodWorld) -> None:
    """What is folded from the disk is what was in memory, without the keys."""
    found = world.attempt()
    world.offer_all(found)
    world.certificate(found)
    before = world.pods[0].state
    after = world.boot(0).state
    assert after == replace(before, boot=after.boot, live=frozenset(), held={})


def test_altered_log_is_refused(world: PodWorld) -> None:
    """The audit chain: an event that was changed on the disk stops the start."""
    world.attempt()
    world.stop(0)
    with sqlite3.connect(world.place(0) / "custody.sqlite") as raw:
        raw.execute("DROP TRIGGER events_stay")
        raw.execute("""UPDATE events SET payload = replace(payload, '"round":', '"round":1') WHERE kind = 'Endorsed'""")
    raw.close()
    with refuses(Reason.UNSAFE_STORE):
        world.boot(0)


def test_allowed_table_is_what_happens(world: PodWorld) -> None:
    """Every phase is known to the table, nothing leaves CLOSED, a lock is never followed by an abandon (P-14)."""
    assert set(ALLOWED) == set(Phase)
    assert ALLOWED[Phase.CLOSED] == frozenset()
    assert Phase.ABANDONED not in ALLOWED[Phase.LOCKED]
    assert not {Phase.LOCKED, Phase.ENDORSED, Phase.COMMITTED} & ALLOWED[Phase.ABANDONED]
    ref = Ref(derive("nowhere"), 1, 1)
    assert phase_of(world.pods[0].state, ref) is Phase.UNSEEN


def test_standing_says_what_to_do(world: PodWorld) -> None:
    assert world.pods[0].standing()[1] == "idle"
    found = world.attempt()
    assert world.pods[0].standing()[:2] == (found.ref, "endorsed")
    assert world.boot(0).standing()[1] == "waiting"


def test_hybrid_suite(tmp_path: Path) -> None:
    """Suite 1 through a whole attempt."""
    world = PodWorld(tmp_path, make_consortium(suite=SUITE_HYBRID))
    found = world.attempt()
    world.offer_all(found)
    assert codec.decode(Commitment, codec.encode(found.checked.commitments[0])).suite == SUITE_HYBRID
    world.close()
