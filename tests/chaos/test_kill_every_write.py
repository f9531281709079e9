"""kill −9 before EVERY write of a hospital's round, then a new life (privacy.md §7: L-1, L-4; protocol.md P-10).

Every write: each write and truncation that SQLite makes, also inside one commit; each write, fsync, rename and
removal of a file; each header, chunk and receipt on the line. The default run takes every eleventh, the slow one all.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.kill_points import sqlite_has_a_seam

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not sqlite_has_a_seam(), reason="this Python has SQLite built in: its writes cannot be watched"
)


def check(kill: dict[str, Any]) -> None:
    """What must hold, wherever it died. Round 1 left two events (joined, debit), round 2 adds two (train, gate)."""
    after, end = kill["after_kill"], kill["in_the_end"]  # both have been walked by `ledger verify`
    new = after["opened"][1:]
    assert len(after["ledger"]) in (2, 4)
    assert not new or len(after["ledger"]) == 4  # L-1: nothing leaves before its debit
    assert len(after["submissions"]) == len(after["ledger"]) // 2  # debit and pending record are one
    assert end["ledger"][: len(after["ledger"])] == after["ledger"]  # no debit lost, nothing rewritten
    assert len(end["ledger"]) == 4  # none doubled for identical bytes
    assert set(new) <= set(end["opened"])
    assert len(set(end["opened"])) == 2  # one header in round 2, whoever sent it
    assert end["submissions"] == [[1, end["opened"][0]], [2, end["opened"][-1]]]
    scaffold = end["control"] > 0
    assert (end["receipts"], end["chain"], end["blobs"], end["kept"]) == ([1, 2], 2, int(scaffold), [])
    # One vector left, of one draw; a draw whose vector was kept is the one that left, and is never noised again.
    (left,) = kill["left"]
    assert left["header"] == end["opened"][-1]
    assert left["draw"] == pytest.approx(end["trainings"] + 1, abs=0.4)  # the newest; the first was round 1's
    if after["kept"] or len(after["ledger"]) == 4:
        assert end["trainings"] == after["trainings"] == 1
    if scaffold:  # c_i has moved by what was sent in both rounds, once, and only with the result that counted it
        assert end["control"] == 1 + end["trainings"] + 1
        assert after["control"] == (end["control"] if after["chain"] == 2 else 1)


def run(folder: Path, mechanism: str, every: int) -> list[dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_every_write", str(folder), mechanism, str(every)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("mechanism", ["local", "shared", "scaffold"])
def test_killed_before_many_a_write(tmp_path: Path, mechanism: str) -> None:
    kills = run(tmp_path, mechanism, 11)
    assert len(kills) > 5
    assert all((kill["in_the_end"]["control"] > 0) is (mechanism == "scaffold") for kill in kills)
    for kill in kills:
        check(kill)
    assert kills[-1]["ended"] == 0  # the last number lies beyond the round's end: all places were counted


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mechanism", ["local", "shared", "scaffold"])
def test_killed_before_every_write(tmp_path: Path, mechanism: str) -> None:
    kills = run(tmp_path, mechanism, 1)
    for kill in kills:
        check(kill)
    assert all((kill["in_the_end"]["control"] > 0) is (mechanism == "scaffold") for kill in kills)
    places = [kill["before"] for kill in kills[:-1]]
    assert {"sqlite pwrite64", "fsync", "os.rename", "os.remove", "write"} <= set(places)
    assert {"sending open", "sending chunk", "sending receipt"} <= set(places)
    # The debit is there or not: there is one write before which it was not and after which it is, inside a commit.
    debited = [len(kill["after_kill"]["ledger"]) == 4 for kill in kills]
    assert debited == sorted(debited)
    assert places[debited.index(True) - 1] == "sqlite pwrite64"
    assert places[debited.index(True)] == "sending open"
