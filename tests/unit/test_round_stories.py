"""Rounds as the report tells them: phases, attempts and who is missing, from the aggregator's log."""

import json

import pytest

from services.aggregator import facts as f
from services.cli.history import read_log, tell
from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import OUTCOME_ACCEPTED, Signed
from services.common.store.records import to_json

SIGNED = Signed(b"blob", bytes(64))
HASH = bytes(32)


def submitted(at: int, hospital: str) -> f.Submitted:
    return f.Submitted(at, hospital, SIGNED, HASH, HASH, SIGNED)


def concluded(at: int) -> f.Concluded:
    return f.Concluded(at, OUTCOME_ACCEPTED, "", SIGNED, HASH, SIGNED, HASH, HASH, 1, "")


ROUND = (
    f.Opened(1_000, 1, HASH, HASH, HASH, 0, "train", 2_000),
    f.Proposed(2_000, 1, SIGNED, 9_000, 20_000),
    f.AttemptFailed(3_000, "one pod did not endorse"),
    f.Proposed(3_500, 2, SIGNED, 9_000, 20_000),
    f.Manifested(3_600, b"m", HASH, ("ash", "birch")),
    f.Collecting(3_800),
    submitted(4_000, "alice"),
    submitted(4_100, "bob"),
    submitted(4_200, "carol"),
    f.Declined(4_300, "dave", "BUDGET_EXHAUSTED"),
    f.Offering(5_000),
    f.CohortFixed(5_100, b"u", HASH, ("alice", "bob"), (("carol", "ash"),), ""),
    f.Certified(5_300, b"c"),
    f.Verified(5_600, ("ash",), ("birch",), (), "one"),
    concluded(5_900),
)


def test_a_round_is_told_with_its_attempts_phases_and_absences() -> None:
    (story,) = tell(ROUND)
    assert (story.number, story.kind, story.total) == (1, "train", pytest.approx(4.9))
    assert story.seconds == pytest.approx(
        {
            "training": 1.5,
            "proposed": 1.1,
            "endorsing": 0.2,
            "collecting": 1.2,
            "offering": 0.1,
            "locking": 0.2,
            "releasing": 0.3,
            "verified": 0.3,
        }
    )
    assert [(one.number, one.ended, one.reason) for one in story.attempts] == [
        (1, "failed", "one pod did not endorse"),
        (2, "accepted", ""),
    ]
    fates = {name: story.fate(name) for name in ("alice", "carol", "dave", "erin")}
    assert fates == {"alice": "cohort", "carol": "left out", "dave": "declined", "erin": "absent"}
    assert story.named == ("birch",)


def test_a_stalled_round_says_why_and_the_next_one_begins_anew() -> None:
    stalled, second = tell(
        (
            *ROUND[:9],
            f.AbandonDecided(6_000, "two pods are gone"),
            f.Stalled(9_000, "no abandon certificate"),
            f.Opened(10_000, 2, HASH, HASH, HASH, 0, "final", 10_500),
        )
    )
    assert (stalled.stalled, stalled.last.ended) == ("no abandon certificate", "stalled")
    assert stalled.fate("alice") == "submitted"
    assert stalled.seconds["abandoning"] == 3.0
    assert (second.number, second.kind, second.attempts, second.total) == (2, "final", [], 0)


def test_the_log_is_read_as_it_was_exported() -> None:
    rows = [to_json(fact) for fact in ROUND]
    lines = [json.dumps({"version": i, "kind": kind, "payload": payload}) for i, (kind, payload) in enumerate(rows)]
    assert read_log(lines) == list(ROUND)
    with pytest.raises(ServiceError) as caught:
        read_log([lines[0], "{}"])
    assert caught.value.reason is Reason.MALFORMED
    assert "line 2" in caught.value.detail
