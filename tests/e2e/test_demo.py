"""The whole federation as real processes over mTLS, with a hospital and a pod killed in mid-round, verified offline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.run import files_of, load_run, write_sums
from services.cli.verify import verify_run
from services.common.errors import ServiceError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "services.cli", "demo", "--output", str(folder), "--rounds", "2", "--kill-one"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed dave and elm" in done.stdout
    return folder


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.timeout(300)
def test_round_ends_without_the_killed_ones_and_they_come_back(demo: Path) -> None:
    run = load_run(demo)
    assert [one.number for one in run.rounds] == [1, 2, 3]
    # Dave is killed while round 2 is open (he may have submitted before, on a slow machine), and is back for round 3.
    assert run.rounds[1].released["cohort"] in (3, 4)
    assert verify_run(demo) > 50


def test_passport_names_what_was_spent_and_says_synthetic(demo: Path) -> None:
    content = json.loads((demo / "passport.json").read_text())
    claimed = content["privacy"]["claim"]["epsilon"]
    for splits in content["privacy"]["epsilon_by_site_and_split"].values():
        assert 0 < splits["train"] <= claimed
    assert content["privacy"]["unit"] == "patient"
    assert content["study"]["synthetic_data"] is True
    assert "Synthetic data" in (demo / "passport.md").read_text()
    assert content["data"]["check_required"] is True
    digests = content["data"]["checked_by_site"]
    assert len({digest for (digest,) in digests.values()}) == len(digests) == 4
    assert "| alice | passed |" in (demo / "passport.md").read_text()
    said: list[str] = []
    verify_run(demo, said.append)
    assert "data checked, and the same since, by the ledgers of alice, bob, carol, dave" in said
    assert (demo / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert (demo / "model.safetensors").exists()


def test_no_secret_is_in_a_log(demo: Path) -> None:
    for log in (demo / "logs").glob("*.log"):
        assert "PRIVATE KEY" not in log.read_text()


def test_every_flipped_byte_is_found(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(demo / "evidence", copy / "evidence")
    for number, path in enumerate([*files_of(copy / "evidence"), copy / "evidence" / "SHA256SUMS"]):
        before = path.read_bytes()
        flip(path, 7919 * number + 13)
        with pytest.raises(ServiceError):
            verify_run(copy)
        path.write_bytes(before)
    verify_run(copy)


def test_a_forger_who_mends_the_sums_is_found_too(demo: Path, tmp_path: Path) -> None:
    """Signatures, chains and recomputation stand behind the list of digests, which anybody can write again."""
    copy = tmp_path / "run"
    shutil.copytree(demo / "evidence", copy / "evidence")
    signed = [path for path in files_of(copy / "evidence") if path.name != "log.jsonl"]
    for number, path in enumerate(signed):
        before = path.read_bytes()
        flip(path, 104_729 * number + 31)
        write_sums(copy / "evidence")
        with pytest.raises(ServiceError):
            verify_run(copy)
        path.write_bytes(before)


def test_a_missing_file_is_found(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(demo / "evidence", copy / "evidence")
    next((copy / "evidence").rglob("header-*.signed")).unlink()
    write_sums(copy / "evidence")
    with pytest.raises(ServiceError, match=r"another header|missing"):
        verify_run(copy)


def test_a_model_that_no_round_made_is_found(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(demo / "evidence", copy / "evidence")
    models = copy / "evidence" / "aggregator" / "models"
    content = bytearray((models / "v0001.safetensors").read_bytes())
    content[-1] ^= 1
    (models / "v0009.safetensors").write_bytes(bytes(content))
    write_sums(copy / "evidence")
    with pytest.raises(ServiceError, match=r"no round led to the model v0009"):
        verify_run(copy)
