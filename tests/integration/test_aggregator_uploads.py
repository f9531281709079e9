"""Uploads that are late, double, contradictory or spoilt: one clear refusal each, and the round goes on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import Signed
from tests.support.aggregator_world import model_bytes, until
from tests.support.fake_federation import Federation, expected, federation, over, vector_of
from tests.support.fake_hospital import FakeHospital, Update
from wardround.round.v1 import round_pb2
from wardround.submission.v1 import submission_pb2 as pb

COLLECTING = round_pb2.ROUND_PHASE_COLLECTING
PARAMETERS = 600_000  # three chunks in the ring of 32 bits


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path, rounds=1, parameters=PARAMETERS) as made:
        made.join("alice", "bob", "carol")
        made.join("dave", auto=False)
        yield made


def refusal(hospital: FakeHospital, update: Update, parts: Iterator[pb.SubmitUpdateRequest] | None = None) -> Reason:
    with pytest.raises(ServiceError) as caught:
        hospital.submit(update, parts)
    return caught.value.reason


def collecting(whole: Federation) -> tuple[FakeHospital, Update]:
    dave = whole.hospitals["dave"]
    return dave, dave.prepare(dave.wait_for(lambda now: now.phase == COLLECTING))


def chunk(index: int, data: bytes) -> pb.SubmitUpdateRequest:
    return pb.SubmitUpdateRequest(chunk=pb.SubmissionChunk(index=index, data=data))


def test_P_7_identical_again_gets_the_same_receipt_another_is_a_conflict(whole: Federation) -> None:
    alice = whole.hospitals["alice"]
    dave, _ = collecting(whole)
    until(lambda: alice.receipts)
    first = next(iter(alice.receipts.values()))
    again = alice.prepare(alice.now)  # other seeds, another header: a different update
    assert refusal(alice, again) is Reason.CONFLICT
    assert whole.state.submissions["alice"].receipt == first
    update = dave.prepare(dave.now)
    receipt = dave.submit(update)
    with_same = dave.submit(update)
    assert with_same == receipt
    assert dave.status(update).receipt.blob == receipt.blob


def test_spoilt_uploads_are_refused_at_once_and_leave_the_good_one_possible(whole: Federation) -> None:
    dave, update = collecting(whole)
    size = len(update.chunks)
    assert size == 3
    opening = update.opening()
    one, two = update.chunks[:2]
    assert refusal(dave, update, iter([opening, chunk(1, two)])) is Reason.MALFORMED, "reordered"
    assert refusal(dave, update, iter([opening, chunk(0, one), chunk(0, one)])) is Reason.MALFORMED, "duplicated"
    assert refusal(dave, update, iter([opening, chunk(0, one), chunk(1, two)])) is Reason.MALFORMED, "truncated"
    assert dave.status(update).next_chunk == 2
    assert refusal(dave, update, iter([opening, chunk(0, one[:-4])])) is Reason.MALFORMED, "short chunk"
    assert refusal(dave, update, iter([opening, chunk(0, one + b"1234")])) is Reason.MALFORMED, "long chunk"
    assert refusal(dave, update, iter([opening, chunk(0, one[::-1])])) is Reason.BAD_DIGEST
    extra = [opening, *(chunk(i, c) for i, c in enumerate(update.chunks)), chunk(3, b"more")]
    assert refusal(dave, update, iter(extra)) is Reason.MALFORMED, "oversized"
    assert refusal(dave, update, iter([chunk(0, one)])) is Reason.MALFORMED, "no opening"
    assert refusal(dave, update, iter([opening, opening])) is Reason.MALFORMED
    assert refusal(dave, update, iter([])) is Reason.MALFORMED
    dave.submit(update)
    dave.wait_for(over(1))
    model = expected(whole, vector_of(model_bytes(PARAMETERS)), ("alice", "bob", "carol", "dave"), 1)
    assert np.array_equal(vector_of(dave.fetch_model(whole.state.model)), model)


def test_claims_are_checked_against_the_manifest_before_anything_is_allocated(whole: Federation) -> None:
    dave, update = collecting(whole)

    def spoilt(**changes: object) -> Iterator[pb.SubmitUpdateRequest]:
        request = update.opening()
        for name, value in changes.items():
            if name == "boxes":
                del request.open.boxes[:]
                request.open.boxes.extend(value)
            else:
                setattr(request.open, name, value)
        return iter([request])

    good = update.opening().open.chunk_digests
    assert refusal(dave, update, spoilt(chunk_digests=good + good)) is Reason.MALFORMED
    assert refusal(dave, update, spoilt(chunk_digests=good[::-1])) is Reason.BAD_DIGEST
    assert refusal(dave, update, spoilt(boxes=update.boxes[:-1])) is Reason.MALFORMED
    assert refusal(dave, update, spoilt(boxes=update.boxes[::-1])) is Reason.BAD_DIGEST, "P-9: boxes keep their place"
    flipped = update.header.signature[:-1] + bytes([update.header.signature[-1] ^ 1])
    forged = Update(update.checked, Signed(update.header.blob, flipped), update.boxes, update.chunks)
    assert refusal(dave, forged) is Reason.BAD_SIGNATURE
    alice = whole.hospitals["alice"]
    foreign = alice.mask(update.checked, bytes(update.checked.table.total_bytes))
    assert refusal(dave, foreign) is Reason.NOT_PERMITTED, "dave may not send alice's header"
    vectors = sorted(path.name[:2] for path in (whole.world.folder / "state" / "vectors").glob("*/*"))
    assert len([name for name in vectors if name == "y-"]) <= 3, "nothing of dave's was allocated"
    assert refusal(dave, update, spoilt(first_chunk=2)) is Reason.MALFORMED


def test_an_upload_goes_on_where_it_stopped(whole: Federation) -> None:
    dave, update = collecting(whole)
    assert refusal(dave, update, iter([update.opening(), chunk(0, update.chunks[0])])) is Reason.MALFORMED
    assert dave.status(update).next_chunk == 1
    dave.submit(update, update.parts(1))
    dave.wait_for(over(1))


def test_late_after_the_cohort_is_being_fixed(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1, study={"timing": {"submit_seconds": 1.0}}) as whole:
        whole.join("alice", "bob", "carol")
        whole.join("dave", auto=False)
        dave, update = collecting(whole)
        until(lambda: whole.state.phase != "collecting")
        assert refusal(dave, update) is Reason.LATE
        dave.wait_for(over(1))
        assert refusal(dave, update) is Reason.LATE


def test_collecting_ends_early_once_everybody_has_submitted_or_declined(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1, study={"timing": {"submit_seconds": 30.0}}) as whole:
        whole.join("alice", "bob", "carol")
        whole.join("dave", auto=False)
        dave, _ = collecting(whole)
        dave.decline(dave.now)
        dave.wait_for(over(1), seconds=60)
        assert whole.running.coordinator.run.state.members == ("alice", "bob", "carol")
