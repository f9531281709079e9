"""Protocol.md §1 and §9: what the masks hide, and the documented limits, shown on real submissions."""

from itertools import combinations

import numpy as np
import pytest

from services.common.secagg import masking, sealing
from services.common.secagg.encoding import SENTINEL, LaneTable, decode_class
from services.common.secagg.messages import LaneClass
from services.common.secagg.ring import RingSum
from tests.support.consortium import Consortium, Submission, make_consortium
from tests.support.packed import encoded

TABLE = (SENTINEL, LaneClass("parameter", 6, 0, 1000, 1))
SECRETS = {name: np.arange(6, dtype=np.int64) * (i + 1) - 3 for i, name in enumerate(("alice", "bob", "carol", "dave"))}


def run(pods: int, threshold: int) -> tuple[Consortium, LaneTable, bytes, dict[str, Submission]]:
    c = make_consortium(pods, threshold)
    checked = c.manifest(c.core(lanes=TABLE, parameters=6, ring_bits=24))
    table = checked.table
    sent = {name: c.submit(checked, name, encoded(table, {"parameter": secret})) for name, secret in SECRETS.items()}
    return c, table, checked.M, sent


def opened(c: Consortium, manifest: bytes, sent: Submission, hospital: str, pods: tuple[int, ...]) -> dict[int, bytes]:
    """The seeds that `pods` together hold of one hospital, from its boxes."""
    seeds = {}
    for pod in pods:
        held = c.roster.committee.pieces_of(pod)
        info = sealing.box_info(manifest, hospital, pod)
        seeds.update(
            zip(
                held,
                sealing.unpack_seeds(sealing.open_box(c.pods[pod].sealing, sent.boxes[pod], info), len(held)),
                strict=True,
            )
        )
    return seeds


def unmask(table: LaneTable, manifest: bytes, hospital: str, y: bytes, seeds: dict[int, bytes]) -> np.ndarray:
    total = RingSum(table.ring, len(y))
    total.add(y)
    for piece, seed in seeds.items():
        key = masking.stream_key(seed, manifest, hospital, piece)
        for chunk in masking.sum_streams([key], table.ring, len(y), 0, 1, bytes):
            total.subtract(chunk)
    return decode_class(table, "parameter", total.result()[12:])


@pytest.mark.parametrize(("pods", "threshold"), [(4, 2), (5, 3), (3, 3)])
def test_t_pods_open_everything_and_t_minus_1_do_not(pods: int, threshold: int) -> None:
    """Documented limit: t pods with the aggregator are out of model."""
    c, table, manifest, sent = run(pods, threshold)
    alice = sent["alice"]
    for together in combinations(range(pods), threshold):
        seeds = opened(c, manifest, alice, "alice", together)
        assert np.array_equal(unmask(table, manifest, "alice", alice.y, seeds), SECRETS["alice"])
    for fewer in combinations(range(pods), threshold - 1):
        seeds = opened(c, manifest, alice, "alice", fewer)
        assert len(seeds) < len(c.roster.committee.pieces)
        assert not np.array_equal(unmask(table, manifest, "alice", alice.y, seeds), SECRETS["alice"])


def test_all_but_one_hospital_of_one_mind_read_the_last_vector() -> None:
    """Documented limit: with n_min = 4, k + 1 = 3 colluders subtract their own vectors from the sum."""
    c, table, manifest, sent = run(4, 2)
    total = RingSum(table.ring, table.total_bytes)
    for submission in sent.values():
        total.add(submission.y)
    for piece in range(len(c.roster.committee.pieces)):
        keys = [masking.stream_key(sent[h].seeds[piece], manifest, h, piece) for h in sent]
        for chunk in masking.sum_streams(keys, table.ring, table.total_bytes, 0, 1, bytes):
            total.subtract(chunk)
    released = decode_class(table, "parameter", total.result()[12:])
    assert np.array_equal(released, sum(SECRETS.values()))
    colluders = SECRETS["bob"] + SECRETS["carol"] + SECRETS["dave"]
    assert np.array_equal(released - colluders, SECRETS["alice"])


def test_two_cohorts_that_differ_by_one_hospital_read_it() -> None:
    """Why P-4 allows one cohort per M: the partition attack's two sums differ by exactly one vector."""
    _c, table, manifest, sent = run(4, 2)

    def released(hospitals: tuple[str, ...]) -> np.ndarray:
        total = RingSum(table.ring, table.total_bytes)
        for h in hospitals:
            total.add(sent[h].y)
        for piece in range(4):
            keys = [masking.stream_key(sent[h].seeds[piece], manifest, h, piece) for h in hospitals]
            for chunk in masking.sum_streams(keys, table.ring, table.total_bytes, 0, 1, bytes):
                total.subtract(chunk)
        return decode_class(table, "parameter", total.result()[12:])

    difference = released(("alice", "bob", "carol", "dave")) - released(("alice", "bob", "carol"))
    assert np.array_equal(difference, SECRETS["dave"])


def test_masks_of_another_attempt_do_not_fit() -> None:
    """P-9, P-4: seeds are bound to M through the stream key."""
    c, table, _manifest, sent = run(4, 2)
    seeds = dict(enumerate(sent["alice"].seeds))
    other = c.manifest(c.core(lanes=TABLE, parameters=6, ring_bits=24), attempt=2).M
    assert not np.array_equal(unmask(table, other, "alice", sent["alice"].y, seeds), SECRETS["alice"])
