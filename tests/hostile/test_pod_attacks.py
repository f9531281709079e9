"""Attacks of protocol.md §9 on a key-share pod: each is refused, and the pod keeps its earlier promise."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.certificate import Ref
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import (
    Accepted,
    AcceptList,
    CohortCertificate,
    HighWaterMark,
    LedgerMark,
    Lock,
    Manifest,
    Mark,
    Signed,
)
from services.common.secagg.signing import Signer, digest
from services.keyshare.store import CustodyStore
from tests.support.consortium import STUDY, Submission, derive, make_consortium
from tests.support.pods import PodWorld, Round, refuses, vector


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PodWorld]:
    made = PodWorld(tmp_path)
    yield made
    made.close()


@pytest.fixture
def offered(world: PodWorld) -> Round:
    found = world.attempt()
    world.offer_all(found)
    return found


# --- locks and certificates -----------------------------------------------------------------------------------------


def test_two_cohorts_for_one_manifest(world: PodWorld, offered: Round) -> None:
    """P-4: the second lock is refused; the first is answered again."""
    first = world.pods[0].lock(offered.manifest, offered.cohort("alice", "bob", "carol").blob)
    with refuses(Reason.LOCKED):
        world.pods[0].lock(offered.manifest, offered.cohort().blob)
    assert world.pods[0].lock(offered.manifest, offered.cohort("alice", "bob", "carol").blob) == first


def test_certificate_over_another_cohort_than_the_lock(world: PodWorld, offered: Round) -> None:
    """P-20: a valid certificate over another set means bad pods: alarm, nothing released, the lock stays."""
    other = world.certificate(offered, offered.cohort("alice", "bob", "carol"), pods=(1, 2, 3))
    world.pods[0].lock(offered.manifest, offered.cohort().blob)
    with refuses(Reason.CONFLICT):
        list(world.pods[0].release(offered.manifest, other, [1], 0, 1))


def test_a_certificate_is_a_lock(world: PodWorld, offered: Round) -> None:
    """P-20: a pod that never locked stores the certified cohort first, and locks no other afterwards."""
    certificate = world.certificate(offered, offered.cohort("alice", "bob", "carol"), pods=(1, 2, 3))
    next(world.pods[0].release(offered.manifest, certificate, [1], 0, 1))
    with refuses(Reason.LOCKED):
        world.pods[0].lock(offered.manifest, offered.cohort().blob)
    with refuses(Reason.LOCKED):
        world.abandon(0, offered)


def test_cohort_below_minimum_by_count(world: PodWorld, offered: Round) -> None:
    """P-12, P-20: two hospitals are fewer than n_min = 3, at Lock and in a certificate."""
    small = offered.cohort("alice", "bob")
    with refuses(Reason.BELOW_COHORT):
        world.pods[0].lock(offered.manifest, small.blob)
    keys = world.consortium.pods
    forged = forge(world, offered, small, [keys[index].round for index in (0, 1, 2)])
    with refuses(Reason.BELOW_COHORT):
        list(world.pods[0].release(offered.manifest, forged, [1], 0, 1))


def test_cohort_below_minimum_by_organisation(tmp_path: Path) -> None:
    """P-12: three hospitals of two organisations are a cohort of two."""
    consortium = make_consortium(organisations={"alice": "one", "bob": "one"})
    world = PodWorld(tmp_path, consortium)
    found = world.attempt()
    world.offer_all(found)
    with refuses(Reason.BELOW_COHORT):
        world.pods[0].lock(found.manifest, found.cohort("alice", "bob", "carol").blob)
    assert world.pods[0].lock(found.manifest, found.cohort("alice", "carol", "dave").blob)
    world.close()


def test_header_swapped_after_accept(world: PodWorld, offered: Round) -> None:
    """§4 step 7: the cohort names another header of the same hospital; step 8 too (P-20)."""
    honest = offered.cohort()
    swapped = Cohort(honest.manifest, (replace(honest.members[0], header=derive("other")), *honest.members[1:]))
    with refuses(Reason.WRONG_CORE):
        world.pods[0].lock(offered.manifest, swapped.blob)


def test_hospital_never_offered(world: PodWorld) -> None:
    """P-20: U must lie within the accept list, whatever a certificate says."""
    found = world.attempt()
    for index in world.pods:
        world.offer(index, found, *(("alice", "bob", "carol") if index == 0 else ()))
    with refuses(Reason.WRONG_CORE):
        world.pods[0].lock(found.manifest, found.cohort().blob)
    with refuses(Reason.WRONG_CORE):
        list(world.pods[0].release(found.manifest, world.certificate(found, pods=(1, 2, 3)), [1], 0, 1))


def test_unknown_and_duplicate_hospital_in_a_cohort(world: PodWorld, offered: Round) -> None:
    """P-19: a cohort is ascending, each once, all in the charter."""
    honest = offered.cohort()
    stranger = Cohort(honest.manifest, (*honest.members, Accepted("zoe", derive("header"))))
    with refuses(Reason.UNKNOWN_MEMBER):
        world.pods[0].lock(offered.manifest, stranger.blob)
    twice = honest.manifest + (4).to_bytes(4, "big") + 4 * honest.blob[36 : 36 + 4 + 5 + 32]
    with refuses(Reason.MALFORMED):
        world.pods[0].lock(offered.manifest, twice)


def test_cohort_of_another_manifest(world: PodWorld, offered: Round) -> None:
    """P-4: the cohort names M itself."""
    other = Cohort(derive("other M"), offered.cohort().members)
    with refuses(Reason.WRONG_CORE):
        world.pods[0].lock(offered.manifest, other.blob)


def test_late_hospital_after_the_lock(world: PodWorld) -> None:
    """§9: an offer after the lock accepts nobody new."""
    found = world.attempt()
    world.offer(0, found, "alice", "bob", "carol")
    world.pods[0].lock(found.manifest, found.cohort("alice", "bob", "carol").blob)
    accepted, refused = world.offer(0, found)
    assert [entry.hospital for entry in accepted.accepted] == ["alice", "bob", "carol"]
    assert refused == {"dave": Reason.LATE}


def forge(
    world: PodWorld, found: Round, cohort: Cohort, signers: list[Signer], pods: tuple[int, ...] = (0, 1, 2)
) -> bytes:
    """A certificate whose locks are signed with keys that are not the manifest's."""
    ids = world.consortium.pod_ids
    locks = tuple(
        signer.sign("lock", codec.encode(Lock(found.checked.M, cohort.digest, len(cohort.members), ids[pod])))
        for signer, pod in zip(signers, range(3), strict=True)
    )
    return codec.encode(CohortCertificate(cohort.blob, locks))


def test_forged_certificate(world: PodWorld, offered: Round) -> None:
    """P-5, P-19: identity keys, foreign keys, too few locks, one pod twice: nothing is released, nothing locked."""
    cohort = offered.cohort()
    keys = world.consortium.pods
    good = codec.decode(CohortCertificate, world.certificate(offered, pods=(1, 2, 3)))
    cases = {
        forge(world, offered, cohort, [pod.identity for pod in keys[:3]]): Reason.BAD_SIGNATURE,
        forge(world, offered, cohort, [pod.round for pod in keys[:3]]): Reason.BAD_SIGNATURE,
        codec.encode(replace(good, locks=good.locks[:2])): Reason.BELOW_QUORUM,
        codec.encode(replace(good, locks=(good.locks[0], good.locks[0], good.locks[1]))): Reason.MALFORMED,
        codec.encode(replace(good, locks=())): Reason.BELOW_QUORUM,
        codec.encode(good) + b"\0": Reason.MALFORMED,
    }
    for certificate, reason in cases.items():
        with refuses(reason):
            list(world.pods[0].release(offered.manifest, certificate, [1], 0, 1))
    assert not world.pods[0].state.record(STUDY).locks


def test_release_without_a_certificate(world: PodWorld, offered: Round) -> None:
    """P-5: no bytes, an abandon certificate or a bare cohort open nothing."""
    for nothing in (b"", offered.cohort().blob, world.consortium.abandon_certificate(offered.checked)):
        with refuses(Reason.MALFORMED):
            list(world.pods[0].release(offered.manifest, nothing, [1], 0, 1))


def test_piece_not_its_own(world: PodWorld, offered: Round) -> None:
    """P-5, P-20: piece 0 is not pod 0's; repeated, unordered and no pieces neither."""
    certificate = world.certificate(offered)
    for pieces in ([0], [1, 0], [1, 1], [2, 1], [], [99]):
        with refuses(Reason.NOT_PERMITTED):
            list(world.pods[0].release(offered.manifest, certificate, pieces, 0, 1))


def test_range_outside_the_vector(world: PodWorld, offered: Round) -> None:
    """§10: a claimed range is checked before anything is made."""
    certificate = world.certificate(offered)
    for first, chunks in ((0, 0), (0, 2), (1, 1), (2**32 - 1, 2**32 - 1)):
        with refuses(Reason.MALFORMED):
            list(world.pods[0].release(offered.manifest, certificate, [1], first, chunks))


# --- manifests and proposals ----------------------------------------------------------------------------------------


def test_second_manifest_for_one_attempt(world: PodWorld) -> None:
    """P-18, §4 step 3: one manifest per (r, a) per pod."""
    manifest = world.propose()
    parsed = codec.decode(Manifest, manifest)
    fewer = codec.encode(replace(parsed, commitments=parsed.commitments[:3]))
    world.pods[0].endorse(manifest)
    with refuses(Reason.CONFLICT):
        world.pods[0].endorse(fewer)
    with refuses(Reason.CONFLICT):
        world.pods[0].lock(fewer, Cohort(digest("manifest", fewer), ()).blob)


def test_second_proposal_for_one_attempt(world: PodWorld) -> None:
    """P-16: the same (r, a) with another deadline is another proposal."""
    world.propose()
    with refuses(Reason.CONFLICT):
        world.pods[0].propose(world.consortium.proposal(deadline=world.clock.now + 1), [])


def test_manifest_with_an_older_commitment_of_mine(world: PodWorld) -> None:
    """P-18: the commitment must be this boot's, byte for byte; one of another pod in my name does not verify."""
    proposal = world.consortium.proposal()
    old = world.pods[0].propose(proposal, [])
    parsed = codec.decode(Manifest, world.propose())
    substituted = world.consortium.commitment(proposal, 0, world.consortium.core())
    with refuses(Reason.WRONG_CORE):
        world.pods[0].endorse(codec.encode(replace(parsed, commitments=(substituted, *parsed.commitments[1:]))))
    without = codec.encode(replace(parsed, commitments=parsed.commitments[1:]))
    with refuses(Reason.WRONG_CORE):
        world.pods[0].endorse(without)
    assert old == parsed.commitments[0]
    with refuses(Reason.BAD_SIGNATURE):
        stolen = replace(substituted, signature=parsed.commitments[1].signature)
        world.pods[0].endorse(codec.encode(replace(parsed, commitments=(stolen, *parsed.commitments[1:]))))


def test_quorum_downgraded_and_pod_counted_twice(world: PodWorld) -> None:
    """P-17: fewer than q commitments, one twice, or not ascending are no manifest."""
    parsed = codec.decode(Manifest, world.propose())
    one, two, three, _ = parsed.commitments
    for listed, reason in (((one, two), Reason.BELOW_QUORUM), ((one, one, two), Reason.MALFORMED),
                           ((two, one, three), Reason.MALFORMED)):  # fmt: skip
        with refuses(reason):
            world.pods[0].endorse(codec.encode(replace(parsed, commitments=listed)))


def test_never_committed_manifest(world: PodWorld) -> None:
    """P-18: a manifest that this pod never committed to is not endorsed."""
    with refuses(Reason.WRONG_PHASE):
        world.pods[0].endorse(world.consortium.manifest_blob())


def test_not_endorsed_manifest_is_not_served(world: PodWorld) -> None:
    """P-18: Offer, Lock, Release only for the endorsed M."""
    manifest = world.propose()
    cohort = Cohort(digest("manifest", manifest), ())
    with refuses(Reason.WRONG_PHASE):
        world.pods[0].lock(manifest, cohort.blob)
    with refuses(Reason.WRONG_PHASE):
        world.pods[0].offer(manifest, lambda: pytest.fail("nothing may be fetched"))


def test_replayed_round(world: PodWorld) -> None:
    """P-16, §9: an older proposal is burned once a higher round was committed; a closed one is closed."""
    old = world.consortium.proposal()
    world.propose(world.consortium.core(round=2))
    with refuses(Reason.BURNED):
        world.pods[0].propose(old, [])
    world.pods[0].close(world.close_round(2))
    with refuses(Reason.CLOSED):
        world.pods[0].propose(old, [])


@pytest.mark.parametrize("changes", [{"minimum_cohort": 2}, {"parameters": 2**30}, {"ring_bits": 8}])
def test_core_outside_the_charter(world: PodWorld, changes: dict[str, int]) -> None:
    """P-12, §6: a lower n_min, too many parameters or another ring is refused."""
    with refuses(Reason.WRONG_CORE):
        world.pods[0].propose(world.consortium.proposal(world.consortium.core(**changes)), [])


def test_lanes_that_could_wrap(world: PodWorld) -> None:
    """§6: n_max·B must fit the ring, refused by the pod as well."""
    lanes = world.consortium.core().lanes
    wide = (*lanes[:-1], replace(lanes[-1], bound=2**30))
    with refuses(Reason.MALFORMED):
        world.pods[0].propose(world.consortium.proposal(world.consortium.core(lanes=wide)), [])


def test_unpinned_charter_and_foreign_aggregator(world: PodWorld) -> None:
    """P-2, P-3: a charter that is not pinned, a proposal or close by another key."""
    with refuses(Reason.WRONG_CORE):
        world.pods[0].propose(world.consortium.proposal(world.consortium.core(charter=derive("mine"))), [])
    stranger = replace(world.consortium, aggregator=Signer.from_seed(derive("stranger")))
    with refuses(Reason.BAD_SIGNATURE):
        world.pods[0].propose(stranger.proposal(), [])
    with refuses(Reason.BAD_SIGNATURE):
        world.pods[0].close(stranger.aggregator.sign("close", world.close_round(1).blob))
    with refuses(Reason.WRONG_CORE):
        world.pods[0].close(world.close_round(1, by=derive("mine")))
    world.pods[0].rosters = {}
    with refuses(Reason.NOT_FOUND):
        world.pods[0].propose(world.consortium.proposal(), [])


def test_signature_under_another_label(world: PodWorld) -> None:
    """P-3: a proposal blob signed as something else, and trailing bytes, are refused."""
    blob = world.consortium.proposal().blob
    with refuses(Reason.BAD_SIGNATURE):
        world.pods[0].propose(world.consortium.aggregator.sign("result", blob), [])
    with refuses(Reason.MALFORMED):
        world.pods[0].propose(world.consortium.aggregator.sign("proposal", blob + b"\x38\x01"), [])


# --- boxes and headers ----------------------------------------------------------------------------------------------


def offer_items(world: PodWorld, found: Round, items: list[tuple[Signed, bytes]]) -> tuple[AcceptList, list[Reason]]:
    signed, refused = world.pods[0].offer(found.manifest, lambda: items)
    return codec.decode(AcceptList, signed.blob), [Reason(why.partition(":")[0]) for _, why in refused]


def resigned(world: PodWorld, submission: Submission, **changes: object) -> Signed:
    name = submission.parsed.hospital
    return world.consortium.hospitals[name].sign("header", codec.encode(replace(submission.parsed, **changes)))


def test_copied_and_replayed_boxes(world: PodWorld) -> None:
    """P-9: another hospital's, another pod's, another attempt's box does not open, even under a matching header."""
    first = world.attempt()
    found = world.attempt(attempt=2)
    alice, bob = found.submissions["alice"], found.submissions["bob"]
    for box in (bob.boxes[0], alice.boxes[1], first.submissions["alice"].boxes[0], b"", os.urandom(200)):
        boxes = (
            replace(alice.parsed.boxes[0], digest=hashlib.sha256(box).digest()),
            *alice.parsed.boxes[1:],
        )
        accepted, reasons = offer_items(world, found, [(resigned(world, alice, boxes=boxes), box)])
        assert (accepted.accepted, reasons) == ((), [Reason.MALFORMED])
        assert offer_items(world, found, [(alice.header, box)])[1] in ([Reason.BAD_DIGEST], [Reason.CONFLICT])


def test_replayed_header(world: PodWorld) -> None:
    """P-9: a header of another attempt is not for this manifest."""
    first = world.attempt()
    found = world.attempt(attempt=2)
    old = first.submissions["alice"]
    assert offer_items(world, found, [(old.header, old.boxes[0])])[1] == [Reason.WRONG_CORE]


def test_inconsistent_seeds(world: PodWorld) -> None:
    """§9: a seed that is not its com: the hospital is left out, the others stay."""
    found = world.attempt()
    alice, bob = found.submissions["alice"], found.submissions["bob"]
    wrong = (alice.parsed.commitments[0], derive("x"), *alice.parsed.commitments[2:])
    items = [(resigned(world, alice, commitments=wrong), alice.boxes[0]), (bob.header, bob.boxes[0])]
    accepted, reasons = offer_items(world, found, items)
    assert [entry.hospital for entry in accepted.accepted] == ["bob"]
    assert reasons == [Reason.BAD_DIGEST]


def test_two_headers_of_one_hospital(world: PodWorld) -> None:
    """§4 step 6: in one offer, and in a later one: the first stands."""
    found = world.attempt()
    alice = found.submissions["alice"]
    second = resigned(world, alice, vector=derive("other y"))
    accepted, reasons = offer_items(world, found, [(alice.header, alice.boxes[0]), (second, alice.boxes[0])])
    assert reasons == [Reason.CONFLICT]
    assert accepted.accepted[0].header == digest("header", alice.header.blob)
    accepted, reasons = offer_items(world, found, [(second, alice.boxes[0])])
    assert reasons == [Reason.CONFLICT]
    assert accepted.accepted[0].header == digest("header", alice.header.blob)


def test_forged_and_unknown_hospital(world: PodWorld) -> None:
    """P-2: the header must be signed by the key that the charter has for that hospital."""
    found = world.attempt()
    alice = found.submissions["alice"]
    forged = world.consortium.hospitals["bob"].sign("header", alice.header.blob)
    zoe = Signer.from_seed(derive("zoe")).sign("header", codec.encode(replace(alice.parsed, hospital="zoe")))
    items = [(forged, alice.boxes[0]), (zoe, alice.boxes[0]), (Signed(b"\xff", bytes(64)), b"")]
    accepted, reasons = offer_items(world, found, items)
    assert (accepted.accepted, reasons) == ((), [Reason.BAD_SIGNATURE, Reason.UNKNOWN_MEMBER, Reason.MALFORMED])


def test_ledger_restored_from_a_backup(world: PodWorld) -> None:
    """L-4: the ledger's sequence went back: the hospital is left out in the next round."""
    marks = {"alice": LedgerMark(9, derive("nine"))}
    world.offer_all(world.attempt(ledger=marks))
    found = world.attempt(world.consortium.core(round=2), ledger={"alice": LedgerMark(8, derive("eight again"))})
    _, refused = world.offer(0, found)
    assert refused == {"alice": Reason.ROLLED_BACK}


def test_repeated_and_broken_items_cost_nobody_else(world: PodWorld) -> None:
    """A bad header costs its own hospital only."""
    found = world.attempt()
    items = [(found.submissions[name].header, found.submissions[name].boxes[0]) for name in found.submissions]
    items.insert(1, (found.submissions["alice"].header, found.submissions["alice"].boxes[0]))
    items.insert(0, (Signed(b"\xff", bytes(64)), b""))
    accepted, reasons = offer_items(world, found, items)
    assert len(accepted.accepted) == 4
    assert reasons == [Reason.MALFORMED]


# --- abandon --------------------------------------------------------------------------------------------------------


def test_lock_then_abandon_even_after_restart(world: PodWorld, offered: Round) -> None:
    """P-14: a locked pod signs no abandon, whatever happened to its process."""
    world.pods[0].lock(offered.manifest, offered.cohort().blob)
    with refuses(Reason.LOCKED):
        world.abandon(0, offered)
    world.restart(0)
    with refuses(Reason.LOCKED):
        world.abandon(0, offered)


def test_abandon_then_lock(world: PodWorld, offered: Round) -> None:
    """P-14: after its abandon a pod neither locks nor believes a certificate."""
    world.abandon(0, offered)
    with refuses(Reason.ABANDONED):
        world.pods[0].lock(offered.manifest, offered.cohort().blob)
    with refuses(Reason.ABANDONED):
        list(world.pods[0].release(offered.manifest, world.certificate(offered, pods=(1, 2, 3)), [1], 0, 1))


def test_both_quorums_cannot_be_had(world: PodWorld, offered: Round) -> None:
    """P-1, P-14: with q = 3 of 4, three locks leave one pod for an abandon: never a certificate."""
    world.certificate(offered, pods=(0, 1, 2))
    given_up = []
    for index in world.pods:
        with contextlib.suppress(ServiceError):
            given_up.append(world.abandon(index, offered))
    assert len(given_up) == 1


def test_abandon_for_another_manifest_than_endorsed(world: PodWorld, offered: Round) -> None:
    """P-14: (study, r, a) has one M here."""
    with refuses(Reason.CONFLICT):
        world.pods[0].abandon(world.consortium.roster.charter, offered.ref, derive("M"))
    with refuses(Reason.WRONG_CORE):
        world.pods[0].abandon(world.consortium.roster.charter, Ref(b"short", 1, 1), derive("M"))


# --- store and high-water marks --------------------------------------------------------------------------------------


def everything_is_refused(world: PodWorld, index: int, reason: Reason) -> None:
    pod = world.pods[index]
    with refuses(reason):
        pod.propose(world.consortium.proposal(world.consortium.core(round=9)), [])
    with refuses(reason):
        pod.abandon(world.consortium.roster.charter, Ref(STUDY, 9, 1), derive("M"))
    assert not pod.live


def test_nothing_is_signed_before_the_marks(world: PodWorld) -> None:
    """P-11: a booted pod signs its own mark and nothing else."""
    found = world.attempt()
    pod = world.boot(0)
    everything_is_refused(world, 0, Reason.NOT_LIVE)
    with refuses(Reason.NOT_LIVE):
        pod.endorse(found.manifest)
    assert codec.decode(HighWaterMark, pod.mark(derive("n"), "pod-1").blob).marks[0].endorsed_round == 1


def test_stale_or_foreign_marks_do_not_count(world: PodWorld) -> None:
    """P-11: another nonce, marks about another pod, its own mark, one pod twice, forged ones: fewer than q − 1."""
    stale = world.marks(0)
    pod = world.boot(0)
    fresh = world.marks(0, others=[1])
    about_another = [world.pods[2].mark(pod.state.boot, "pod-1")]
    own = [pod.mark(pod.state.boot, pod.id)]
    forged = [Signed(world.marks(0, others=[2])[0].blob, bytes(64))]
    for marks in (stale, fresh, [*fresh, *fresh], [*fresh, *stale], [*fresh, *about_another], [*fresh, *own],
                  [*fresh, *forged]):  # fmt: skip
        with refuses(Reason.BELOW_QUORUM):
            pod.deliver(marks)
    everything_is_refused(world, 0, Reason.NOT_LIVE)
    pod.deliver([*forged, *world.marks(0, others=[1, 3])])
    assert pod.live


def test_wiped_store(world: PodWorld) -> None:
    """P-11: empty although a peer has seen it: refuses for good, also after a restart; a new id starts clean."""
    world.attempt()
    world.stop(0)
    shutil.rmtree(world.place(0))
    world.boot(0)
    for _ in range(2):
        with refuses(Reason.ROLLED_BACK):
            world.go_live(0)
        everything_is_refused(world, 0, Reason.ROLLED_BACK)
        world.boot(0)
        everything_is_refused(world, 0, Reason.ROLLED_BACK)
    assert world.pods[0].standing()[1] == "rolled back"


def test_empty_and_seen_by_nobody_is_a_first_start(world: PodWorld) -> None:
    """P-11: no peer has seen anything: live."""
    world.stop(0)
    shutil.rmtree(world.place(0))
    assert world.restart(0).live


def test_volume_from_a_backup(world: PodWorld) -> None:
    """P-11, P-15: the volume is from before a commit that peers have seen in a manifest."""
    world.attempt()
    world.stop(0)
    shutil.copytree(world.place(0), world.folder / "backup")
    world.restart(0)
    world.attempt(attempt=2)
    world.stop(0)
    shutil.rmtree(world.place(0))
    shutil.copytree(world.folder / "backup", world.place(0))
    world.boot(0)
    with refuses(Reason.ROLLED_BACK):
        world.go_live(0)


def test_volume_from_before_the_lock(world: PodWorld) -> None:
    """P-11: peers saw the lock signature in a certificate; a volume from before it is found by that."""
    found = world.attempt()
    world.offer_all(found)
    world.stores[0].close()
    shutil.copytree(world.place(0), world.folder / "backup")
    reopened = CustodyStore(world.place(0), demo=True)
    list(reopened.load())
    world.stores[0] = world.pods[0]._store = reopened
    certificate = world.certificate(found)
    list(world.pods[1].release(found.manifest, certificate, [0], 0, 1))
    world.stop(0)
    shutil.rmtree(world.place(0))
    shutil.copytree(world.folder / "backup", world.place(0))
    world.boot(0)
    with refuses(Reason.ROLLED_BACK):
        world.pods[0].deliver(world.marks(0, others=[1, 2]))


def test_an_old_mark_still_shows_a_rollback(world: PodWorld) -> None:
    """P-11: a mark for an earlier nonce does not count for the quorum, but is proof all the same."""
    world.attempt()
    old = world.marks(0, others=[1])
    world.stop(0)
    shutil.rmtree(world.place(0))
    with refuses(Reason.ROLLED_BACK):
        world.boot(0).deliver(old)


def test_mark_of_a_stranger_proves_nothing(world: PodWorld) -> None:
    """P-2: only pods of the charter can stop a pod; a hospital's key cannot."""
    mark = HighWaterMark(world.pods[0].state.boot, "pod-0", "alice", (Mark(STUDY, 9, 1, 9, 1, 9, 1),))
    with refuses(Reason.BELOW_QUORUM):
        world.boot(0).deliver([world.consortium.hospitals["alice"].sign("highwater", codec.encode(mark))])


def test_two_processes_on_one_store(world: PodWorld) -> None:
    """P-15: another process on the same store is refused until the first has ended."""
    code = "from pathlib import Path; from services.keyshare.store import CustodyStore; CustodyStore(Path('{}'), True)"
    second = subprocess.run(
        [sys.executable, "-c", code.format(world.place(0))], capture_output=True, text=True, check=False
    )
    assert "UNSAFE_STORE" in second.stderr
    with refuses(Reason.UNSAFE_STORE):
        CustodyStore(world.place(0), demo=True)


def test_store_on_a_volatile_volume() -> None:
    """P-15: tmpfs is refused unless the charter is a demo."""
    with refuses(Reason.UNSAFE_STORE):
        CustodyStore(Path("/dev/shm/wardround-test-pod"), demo=False)


def test_wrong_length_of_vectors_never_matters(world: PodWorld) -> None:
    """P-6's ground at the pod: what it releases depends on seeds and U alone, never on y."""
    found = world.attempt()
    other = world.consortium.submit(found.checked, "alice", vector(found.checked.table, 17))
    assert other.seeds == found.submissions["alice"].seeds
    world.offer_all(found)
    certificate = world.certificate(found)
    assert world.sums(0, found, certificate, [1]) == world.sums(2, found, certificate, [1])
