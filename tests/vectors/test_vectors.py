"""The committed known-answer vectors (protocol.md §10) against the code and against an independent opener."""

import json
from pathlib import Path

import numpy as np
import pytest

from services.common.secagg import masking, sealing, signing
from services.common.secagg.cohort import Cohort
from services.common.secagg.digests import VectorDigest
from services.common.secagg.messages import Accepted
from services.common.secagg.ring import CHUNK_BYTES, Ring, RingSum, chunk_lengths
from tests.support import independent_hpke

VECTORS = json.loads(Path(__file__).with_name("secagg.json").read_text())


@pytest.mark.parametrize("case", VECTORS["keystreams"], ids=lambda case: case["hospital"])
def test_keys_commitments_and_streams(case: dict[str, str]) -> None:
    manifest, seed, piece = bytes.fromhex(case["manifest"]), bytes.fromhex(case["seed"]), int(case["piece"])
    key = masking.stream_key(seed, manifest, case["hospital"], piece)
    assert key.hex() == case["key"]
    assert masking.commitment(manifest, case["hospital"], piece, seed).hex() == case["commitment"]
    stream = b"".join(masking.sum_streams([key], Ring(24), 2 * CHUNK_BYTES + 96, 0, 3, bytes))
    assert stream[:48].hex() == case["bytes_0"]
    assert stream[CHUNK_BYTES - 48 : CHUNK_BYTES + 48].hex() == case["bytes_1048512"]
    assert stream[2 * CHUNK_BYTES :].hex() == case["bytes_2097120"]


@pytest.mark.parametrize("case", VECTORS["packings"], ids=lambda case: str(case["bits"]))
def test_ring_packing(case: dict[str, object]) -> None:
    ring = Ring(int(str(case["bits"])))
    packed = ring.pack(np.array(case["values"], np.int64).astype(np.uint32))
    assert packed.hex() == case["packed"]
    assert ring.lift(ring.unpack(packed)).tolist() == case["lifted"]
    total = RingSum(ring, len(packed))
    for _ in range(3):
        total.add(packed)
    assert total.result().hex() == case["three_times"]


def test_digests_of_every_label() -> None:
    found = VECTORS["digests"]
    assert set(found["labels"]) == signing.LABELS
    blob = bytes.fromhex(found["blob"])
    assert {name: signing.digest(name, blob).hex() for name in found["labels"]} == found["labels"]


@pytest.mark.parametrize("case", VECTORS["digests"]["vectors"], ids=lambda case: str(case["bytes"]))
def test_vector_digests(case: dict[str, int]) -> None:
    digest = VectorDigest(case["bytes"])
    for length in chunk_lengths(case["bytes"]):
        digest.add(bytes([case["fill"]]) * length)
    assert digest.result().hex() == case["digest"]


def test_cohort_bytes() -> None:
    case = VECTORS["digests"]["cohort"]
    members = tuple(Accepted(name, bytes.fromhex(header)) for name, header in case["members"])
    cohort = Cohort(bytes.fromhex(case["manifest"]), members)
    assert (cohort.blob.hex(), cohort.digest.hex()) == (case["blob"], case["digest"])


@pytest.mark.parametrize("case", VECTORS["boxes"], ids=lambda case: f"{case['suite']}-{case['hospital']}")
def test_boxes_open_here_and_with_an_independent_opener(case: dict[str, str]) -> None:
    """The library's ML-KEM-768 + X25519 IS X-Wing, kem 0x647a."""
    suite, pod = int(case["suite"]), int(case["pod"])
    lattice, exchange, box = (bytes.fromhex(case[k]) for k in ("lattice_seed", "exchange_key", "box"))
    info = sealing.box_info(bytes.fromhex(case["manifest"]), case["hospital"], pod)
    assert info.hex() == case["info"]
    key = sealing.load_sealing_key(suite, lattice, exchange)
    assert sealing.open_box(key, box, info).hex() == case["plaintext"]
    if suite == 1:
        opened = independent_hpke.open_x_wing(lattice, exchange, box, info)
    else:
        opened = independent_hpke.open_x25519(exchange, box, info)
    assert opened.hex() == case["plaintext"]
