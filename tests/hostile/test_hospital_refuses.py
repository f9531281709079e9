"""protocol.md §9, the hospital's side: whatever is wrong, nothing leaves. Real gRPC over real mutual TLS."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import Core
from services.common.secagg.signing import digest
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site, lanes_of
from tests.support.hospital_world import World, make_world, model_file

D = 5_000
NONE = {
    "privacy": {"mechanism": "none", "epsilon": None, "delta": None, "noise_multiplier": 0.0,
                "none_accepted": "synthetic images only, nobody is behind them"},
    "evaluation": {"gate_noise_multiplier": 0.0, "final_noise_multiplier": 0.0},
}  # fmt: skip
ACCEPTS_NONE = {"mechanisms": ["none"], "no_privacy": "accepted"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), D, **NONE)


@pytest.fixture(params=[False, True], ids=["asked", "sent along"])
def aggregator(world: World, request: pytest.FixtureRequest) -> Iterator[FakeAggregator]:
    """Manifest and newest result are answers, or come with the state: what is refused is the same."""
    fake = FakeAggregator(world)
    fake.sends_along = request.param
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def site(world: World, aggregator: FakeAggregator, tmp_path: Path) -> Iterator[Site]:
    made = Site(world, aggregator, tmp_path / "alice", aggregator.address, **ACCEPTS_NONE)
    yield made
    made.close()


def others(header: bytes) -> dict[str, bytes]:
    return {"alice": header, "bob": derive("header", "bob"), "carol": derive("header", "carol")}


def run_round(aggregator: FakeAggregator, site: Site, number: int) -> bytes:
    """A whole honest round; the header digest that alice sent."""
    aggregator.open_round(number)
    site.step()
    checked = aggregator.collect()
    site.step()
    header = digest("header", aggregator.submissions()[-1].header.blob)
    aggregator.finish(checked, others(header))
    site.step()
    return header


def test_honest_round_arrives_and_opens_to_the_quantised_update(aggregator: FakeAggregator, site: Site) -> None:
    aggregator.open_round(1)
    site.step()
    assert site.trainer.lines() == ["train 1", "forget"]
    assert not aggregator.submissions()
    checked = aggregator.collect()
    site.step()
    (arrived,) = aggregator.submissions()
    # 0.125 · 2^f, no noise: an integer worked out by hand from the lane's fraction bits.
    lane = checked.table.lane_class("parameter")
    assert np.array_equal(lanes_of(aggregator, arrived, "parameter"), np.full(D, 2**lane.fraction_bits // 8))
    assert lanes_of(aggregator, arrived, "sentinel").tolist() == [1, 1, 1, 1]
    assert lanes_of(aggregator, arrived, "weight").tolist() == [1]
    site.step()
    assert len(aggregator.opened) == 1  # the receipt is held: nothing is sent twice


def test_gate_and_final_rounds_carry_exact_counts_under_none(aggregator: FakeAggregator, site: Site) -> None:
    second = model_file(D, 0.5)
    aggregator.models[hashlib.sha256(second).digest()] = second
    aggregator.open_round(1)
    checked = aggregator.collect()
    site.step()
    header = digest("header", aggregator.submissions()[-1].header.blob)
    aggregator.finish(checked, others(header), model=hashlib.sha256(second).digest())
    aggregator.open_round(2)
    aggregator.collect()
    site.step()
    assert lanes_of(aggregator, aggregator.submissions()[-1], "gate").tolist() == [5, 3, 8, 4]
    # What left without noise has no finite ε: the figures of the site say so, and so does its ledger.
    figures = site.participation.consent.figures(aggregator.world.study.digest)
    assert figures["epsilon_spent"] == math.inf
    assert figures["dataset_epsilon_spent"] == math.inf
    assert figures["epsilon_left"] == 0.0
    aggregator.finish(aggregator.manifests[1], others(digest("header", aggregator.submissions()[-1].header.blob)))
    aggregator.open_round(4)  # round 3 stalled: no link, P-25
    aggregator.collect()
    site.step()
    assert lanes_of(aggregator, aggregator.submissions()[-1], "confusion").tolist() == [5, 3, 1, 3]
    assert lanes_of(aggregator, aggregator.submissions()[-1], "histogram").tolist() == [1] * 16
    assert site.trainer.lines().count("evaluate test") == 1


@pytest.mark.parametrize(
    "field", ["scale", "clip", "minimum_cohort", "ring_bits", "parameters", "model", "previous_result"]
)
def test_p21_proposal_that_differs_from_the_own_core_is_refused(
    aggregator: FakeAggregator, site: Site, field: str
) -> None:
    """P-21: another scale, clip, n_min, ring, d, model or previous result than charter + study + chain give."""
    aggregator.open_round(1)
    core = aggregator.core(1)
    *rest, parameter = core.lanes
    changed: Core = {
        "scale": lambda: replace(core, lanes=(*rest, replace(parameter, fraction_bits=parameter.fraction_bits - 1))),
        "clip": lambda: replace(core, lanes=(*rest, replace(parameter, bound=parameter.bound - 1))),
        "minimum_cohort": lambda: replace(core, minimum_cohort=4),
        "ring_bits": lambda: replace(core, ring_bits=24, lanes=(*rest, replace(parameter, bound=1000))),
        "parameters": lambda: replace(core, parameters=D - 1),
        "model": lambda: replace(core, model=derive("another model")),
        "previous_result": lambda: replace(core, previous_result=derive("another result")),
    }[field]()
    aggregator.collect(core=changed)
    refusal = site.refusal()
    assert refusal.reason is Reason.WRONG_CORE
    assert {"scale": "lanes", "clip": "lanes"}.get(field, field) in refusal.detail
    assert site.debits() == 0


def test_another_model_is_not_even_downloaded(aggregator: FakeAggregator, site: Site) -> None:
    """§9, another model to one hospital: the chain of signed results says which one it must be."""
    crafted = model_file(D, 9.0)
    aggregator.models[hashlib.sha256(crafted).digest()] = crafted
    aggregator.model = hashlib.sha256(crafted).digest()
    aggregator.open_round(1)
    assert site.refusal().reason is Reason.WRONG_CORE
    assert "model" not in aggregator.calls


def test_model_whose_bytes_are_others_is_refused(aggregator: FakeAggregator, site: Site) -> None:
    aggregator.models[aggregator.model] = model_file(D, 1.0)
    aggregator.open_round(1)
    assert site.refusal().reason is Reason.BAD_DIGEST
    assert site.trainer.lines() == []


def test_p17_forged_endorsements_and_too_few_are_refused(aggregator: FakeAggregator, site: Site) -> None:
    """P-17: under another key, of one pod twice, fewer than q: each refused by the hospital."""
    aggregator.open_round(1)
    checked, good = aggregator.make_manifest(aggregator.core(1), 1)
    stranger = aggregator.world.consortium.pods[0].identity  # the identity key is not the round key
    forged = [stranger.sign("endorse", good[0].blob), *good[1:]]
    for endorsements, reason in (
        (forged, Reason.BAD_SIGNATURE),
        ([good[0], good[0], good[1]], Reason.CONFLICT),
        (good[:2], Reason.BELOW_QUORUM),
    ):
        aggregator.offer(checked, endorsements)
        assert site.refusal().reason is reason
    assert site.debits() == 0


def test_p16_second_core_for_a_round_is_refused(aggregator: FakeAggregator, site: Site) -> None:
    """P-16: after a submission in r another core of r is refused, even with the abandon certificate."""
    aggregator.open_round(1)
    first = aggregator.collect()
    site.step()
    aggregator.abandon(first)
    # The study's own core moves because the chain does: a result of round 1 would be a replay, so lie about n_min.
    aggregator.collect(2, core=replace(aggregator.core(1), minimum_cohort=4))
    assert site.refusal().reason is Reason.WRONG_CORE


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "seeds"])
def test_p10_masks_never_cover_another_vector_whatever_became_of_the_disk(
    aggregator: FakeAggregator, site: Site, damage: str
) -> None:
    """P-10, L-1: y is made again from x and its seeds; if it is not the y of the header, nothing of it leaves."""
    aggregator.open_round(1)
    aggregator.collect()
    aggregator.hold_receipt = True
    with pytest.raises(ServiceError):
        site.step()
    (opened,) = aggregator.opened
    aggregator.arrived.clear()  # the aggregator lost all of it
    (pending,) = site.store.submissions(site.world.study.digest)
    vector = site.store.vector(pending.study, 1)
    assert vector is not None
    x, seeds = site.store.blobs.path(vector.x), site.store.blobs.path(pending.seeds)
    good, good_seeds = x.read_bytes(), seeds.read_bytes()
    if damage == "flipped":
        x.write_bytes(good[:9000] + bytes([good[9000] ^ 1]) + good[9001:])
    elif damage == "cut":
        x.write_bytes(good[:-1])
    elif damage == "gone":
        x.unlink()
    else:
        seeds.write_bytes(bytes(len(good_seeds)))
    aggregator.hold_receipt = False
    with pytest.raises(ServiceError) as refused:
        site.step()
    assert refused.value.reason is Reason.STORAGE
    assert not any(arrived.chunks for arrived in aggregator.arrived.values())
    x.write_bytes(good)
    seeds.write_bytes(good_seeds)
    site.reopen()
    site.step()
    (whole,) = aggregator.submissions()
    assert whole.chunks == opened.chunks
    assert (whole.header, whole.boxes, whole.chunk_digests) == (opened.header, opened.boxes, opened.chunk_digests)
    assert site.debits() == 1


def test_p16_a_submitted_vector_is_not_replaced_under_another_charter(aggregator: FakeAggregator, site: Site) -> None:
    """P-16: were a new one drawn for the same round, what was submitted could not be sent again."""
    aggregator.open_round(1)
    first = aggregator.collect()
    site.step()
    aggregator.abandon(first)
    aggregator.collect(2)
    with site.store.database.transaction() as connection:  # as if the round had begun under another pinned charter
        connection.execute("UPDATE vectors SET charter = ?", (derive("another charter"),))
    kept = site.store.vector(site.world.study.digest, 1)
    assert site.refusal().reason is Reason.WRONG_CORE
    assert site.store.vector(site.world.study.digest, 1) == kept
    assert site.trainer.lines().count("train 1") == 1


def test_p10_resubmission_needs_the_abandon_certificate_of_every_sent_attempt(
    aggregator: FakeAggregator, site: Site
) -> None:
    """P-10: attempt 2 without, with another attempt's, then with the right certificate: the same x, no second debit."""
    aggregator.open_round(1)
    first = aggregator.collect()
    site.step()
    assert site.debits() == 1
    aggregator.collect(2)
    assert site.refusal().reason is Reason.BURNED
    stranger, _ = aggregator.make_manifest(aggregator.core(1), 1)  # another M of the same attempt
    aggregator.abandons = [aggregator.world.consortium.abandon_certificate(stranger)]
    aggregator.collect(2)
    assert site.refusal().reason is Reason.BURNED
    aggregator.abandons = [aggregator.world.consortium.abandon_certificate(first, pods=(0, 1))]  # below the quorum
    aggregator.collect(2)
    assert site.refusal().reason is Reason.BURNED
    aggregator.abandons = []
    aggregator.abandon(first)
    aggregator.collect(3)
    site.step()
    assert site.debits() == 1
    one, two = aggregator.submissions()
    assert one.chunks != two.chunks  # fresh masks …
    assert lanes_of(aggregator, two, "parameter").tolist() == lanes_of(aggregator, one, "parameter").tolist()
    assert site.trainer.lines().count("train 1") == 1  # … over the same x


def test_p10_a_pending_record_counts_as_sent(aggregator: FakeAggregator, site: Site) -> None:
    """P-10: killed after the debit and before the first byte, the vector "may have been sent" all the same."""

    class Killed(BaseException):
        pass

    def die(name: str) -> None:
        if name == "debited":
            raise Killed

    aggregator.open_round(1)
    aggregator.collect()
    site.reopen(checkpoint=die)
    with pytest.raises(Killed):
        site.step()
    assert not aggregator.opened
    site.reopen()
    aggregator.collect(2)
    assert site.refusal().reason is Reason.BURNED


def test_second_manifest_of_one_attempt_is_a_conflict(aggregator: FakeAggregator, site: Site) -> None:
    """Own mark (r, a, M): another M under the attempt already used is refused, abandon certificate or not."""
    aggregator.open_round(1)
    first = aggregator.collect()
    site.step()
    aggregator.abandon(first)
    aggregator.collect(1, seconds=50)
    assert site.refusal().reason is Reason.CONFLICT


def test_replayed_round_is_refused(aggregator: FakeAggregator, site: Site) -> None:
    """§9: a manifest of round 1 after round 2 was submitted; and the old round offered again as open."""
    run_round(aggregator, site, 1)
    old = aggregator.manifests[1]
    aggregator.open_round(2)
    site.world.write_policy(site.folder / "policy.yaml", **ACCEPTS_NONE, repeat="allowed")
    aggregator.collect()
    site.step()
    aggregator.open_round(1)
    aggregator.manifests[1] = old
    aggregator.offer(old, aggregator.world.consortium.endorsements(old))
    aggregator.publish(closed_round=0)
    assert site.refusal().reason is Reason.CLOSED


def test_p10_next_round_takes_a_new_vector_and_scrubs_the_old_one(aggregator: FakeAggregator, site: Site) -> None:
    """P-10: the same vector never goes out under r+1: x of round 1 is gone, round 2 trains and debits anew."""
    site.world.write_policy(site.folder / "policy.yaml", **ACCEPTS_NONE, repeat="allowed")
    run_round(aggregator, site, 1)
    assert list((site.folder / "state" / "vectors" / "blobs").iterdir()) == []
    run_round(aggregator, site, 2)
    assert site.trainer.lines().count("train 2") == 1
    assert [d.round for d in site.participation.ledger.debits()] == [1, 2, 2]  # round 2 has a gate


def test_p10_under_none_a_second_vector_for_one_model_needs_repeat_allowed(
    aggregator: FakeAggregator, site: Site
) -> None:
    """P-10, `none`: the model stayed, so a second exact vector would tell a difference: refused before download."""
    run_round(aggregator, site, 1)
    aggregator.calls.clear()
    aggregator.open_round(2)
    refusal = site.refusal()
    assert refusal.reason is Reason.POLICY_REFUSES
    assert "repeat: allowed" in refusal.detail
    assert "model" not in aggregator.calls


def test_late_and_expired_proposals_are_refused(aggregator: FakeAggregator, site: Site) -> None:
    aggregator.open_round(1)
    aggregator.collect(seconds=-1)
    assert site.refusal().reason is Reason.LATE
    aggregator.collect(expires=25 * 3600)  # round keys may live 24 hours under this charter
    assert site.refusal().reason is Reason.WRONG_CORE


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_is_not_submitted(aggregator: FakeAggregator, site: Site, poison: float) -> None:
    """§6: the finite check comes first; nothing of a failed training is stored, debited or told."""
    site.trainer.value = poison
    aggregator.open_round(1)
    aggregator.collect()
    assert site.refusal().reason is Reason.NOT_FINITE
    assert site.debits() == 0
    assert aggregator.declined == []
    assert list((site.folder / "state" / "vectors" / "blobs").iterdir()) == []


def test_policy_refuses_before_anything_is_downloaded(world: World, aggregator: FakeAggregator, tmp_path: Path) -> None:
    """Deny by default: with an empty policy not even the study's bytes are fetched."""
    site = Site(world, aggregator, tmp_path / "alice", aggregator.address, studies=[])
    try:
        aggregator.open_round(1)
        assert site.refusal().reason is Reason.POLICY_REFUSES
        assert aggregator.calls == []
        site.world.write_policy(site.folder / "policy.yaml", **ACCEPTS_NONE)
        site.step()  # the policy is read again: consent takes effect without a restart
        assert "model" in aggregator.calls
    finally:
        site.close()


def test_study_with_other_bytes_is_refused(aggregator: FakeAggregator, site: Site) -> None:
    """Exact bytes: one more comment in the study is another study."""
    aggregator.studies[aggregator.world.study.digest] += b"# more\n"
    aggregator.open_round(1)
    assert site.refusal().reason is Reason.BAD_DIGEST


def test_unpinned_charter_is_refused(aggregator: FakeAggregator, site: Site) -> None:
    """P-2: keys come from the pinned charter; a round under another one is refused by its digest."""
    aggregator.open_round(1)
    aggregator.publish(charter=derive("another charter"))
    assert "not pinned" in site.refusal().detail


def test_member_of_a_cohort_without_having_submitted_is_an_alarm(aggregator: FakeAggregator, site: Site) -> None:
    """§4 step 10: in U with a header that this node never made → the study stops here, also after a restart."""
    aggregator.open_round(1)
    checked, _ = aggregator.make_manifest(aggregator.core(1), 1)
    aggregator.finish(checked, others(derive("a header by a thief")))
    assert "identity key" in site.refusal().detail
    site.reopen()
    aggregator.open_round(2)
    assert "stopped here" in site.refusal().detail
    assert "model" not in aggregator.calls


def test_header_swapped_in_the_cohort_is_an_alarm(aggregator: FakeAggregator, site: Site) -> None:
    """§9, header swapped after accept: U must hold the very header that was sent."""
    aggregator.open_round(1)
    checked = aggregator.collect()
    site.step()
    aggregator.finish(checked, others(derive("another header")))
    assert "identity key" in site.refusal().detail
    assert len(site.participation.ledger.account().exposed) == 1  # L-3: what was sent counts at the own noise


def test_left_out_with_a_receipt_is_kept_as_evidence(aggregator: FakeAggregator, site: Site) -> None:
    """§4 step 10: submitted, receipt held, not in U: no alarm; the certificate and the receipt prove it."""
    aggregator.open_round(1)
    checked = aggregator.collect()
    site.step()
    members = {name: derive("header", name) for name in ("bob", "carol", "dave")}
    aggregator.finish(checked, members)
    site.step()
    ((number, attempt, certificate),) = site.store.left_out()
    assert (number, attempt) == (1, 1)
    assert certificate == aggregator.links[0].certificate
    assert site.store.halted(aggregator.world.study.digest) is None


@pytest.mark.parametrize("lie", ["below the minimum", "another certificate", "too few locks"])
def test_l3_result_without_a_valid_certificate_stops_the_study(
    aggregator: FakeAggregator, site: Site, lie: str
) -> None:
    """L-3: a published cohort below n_min or an invalid certificate stops the study at this hospital."""
    aggregator.open_round(1)
    checked = aggregator.collect()
    site.step()
    header = digest("header", aggregator.submissions()[-1].header.blob)
    if lie == "below the minimum":
        aggregator.finish(checked, {"alice": header, "bob": derive("header", "bob")})
    else:
        aggregator.finish(checked, others(header))
        cohort = aggregator.world.consortium.cohort(checked, others(header))
        pods = (0, 1) if lie == "too few locks" else (1, 2, 3)
        aggregator.links[0].certificate = aggregator.world.consortium.certificate(cohort, pods=pods)
        aggregator.publish()
    debits = site.participation.ledger.debits()
    assert site.refusal().reason is Reason.CONFLICT
    assert site.store.halted(aggregator.world.study.digest) is not None
    assert site.participation.ledger.debits() == debits  # nothing is rewritten …
    assert site.participation.ledger.account().exposed == {(debits[0].study, 1)}  # … the true event is appended
    site.reopen()
    assert site.participation.ledger.account().exposed == {(debits[0].study, 1)}


def test_result_chain_that_does_not_link_is_refused(aggregator: FakeAggregator, site: Site) -> None:
    """§4 step 4: the chain starts at the result that is held; a link of another past is refused, nothing is stored."""
    aggregator.open_round(1)
    checked = aggregator.collect()
    site.step()
    header = digest("header", aggregator.submissions()[-1].header.blob)
    aggregator.finish(checked, others(header), previous_result=derive("another past"))
    assert site.refusal().reason is Reason.WRONG_CORE
    assert site.store.chain(aggregator.world.study.digest).round == 0


def test_receipt_for_another_header_is_not_stored(aggregator: FakeAggregator, site: Site) -> None:
    aggregator.open_round(1)
    aggregator.collect()
    site.step()
    receipt = aggregator.submissions()[0].receipt
    aggregator.finish(aggregator.manifests[1], others(digest("header", aggregator.submissions()[0].header.blob)))
    site.world.write_policy(site.folder / "policy.yaml", **ACCEPTS_NONE, repeat="allowed")
    aggregator.open_round(2)
    aggregator.collect()
    aggregator.hold_receipt = True
    with pytest.raises(ServiceError):
        site.step()
    last = list(aggregator.arrived.values())[-1]
    last.receipt = receipt
    with pytest.raises(ServiceError) as refused:
        site.step()
    assert refused.value.reason is Reason.CONFLICT
    assert site.store.submissions(aggregator.world.study.digest)[-1].receipt is None
