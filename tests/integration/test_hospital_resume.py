"""A study that an alarm stopped at a hospital goes on when a person says so, past exactly one result."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.common.rpc.unix import dial_admin
from services.common.secagg.signing import digest
from services.hospital_node import resume
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_world import World, make_world
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), 5_000)


class Hospital:
    """A hospital process against the fake aggregator."""

    def __init__(self, world: World, folder: Path) -> None:
        self.folder = folder
        self.study = world.study.digest
        self.aggregator = FakeAggregator(world)
        self.config = world.write_site(folder, self.aggregator.start())
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hospital_runner", str(self.config)],
            cwd=ROOT,
            stderr=(self.folder / "stderr.log").open("ab"),
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(60)

    def status(self, phase: str) -> admin_pb2.Status:
        """The first status in that phase."""
        with dial_admin(self.folder / "admin.sock") as channel:
            stub = admin_pb2_grpc.AdministrationServiceStub(channel)
            for answer in stub.WatchStatus(admin_pb2.WatchStatusRequest(), timeout=60, wait_for_ready=True):
                if answer.status.phase == phase:
                    return answer.status
        raise AssertionError(phase)

    def gauge(self, name: str) -> str:
        address = (self.folder / "state" / "http.address").read_text().strip()
        text = urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read().decode()
        return next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(f"wardround_{name}"))

    def round(self, number: int, *others: str) -> None:
        """One round in which this hospital takes part, published over it and `others`."""
        before = len(self.aggregator.submissions())
        self.aggregator.open_round(number)
        checked = self.aggregator.collect()
        self.aggregator.wait(lambda: len(self.aggregator.submissions()) > before, 60)
        header = digest("header", self.aggregator.submissions()[-1].header.blob)
        self.aggregator.finish(checked, {"alice": header, **{name: derive(name) for name in others}})

    def resume(self, *more: str) -> int:
        return main(["hospital", "resume", self.study.hex(), "--socket", str(self.folder / "admin.sock"), *more])


@pytest.fixture
def hospital(world: World, tmp_path: Path) -> Iterator[Hospital]:
    made = Hospital(world, tmp_path / "alice")
    made.start()
    yield made
    made.kill()
    made.aggregator.stop()


def test_resume_passes_over_exactly_what_is_acknowledged(
    hospital: Hospital, capsys: pytest.CaptureFixture[str]
) -> None:
    """L-3: stopped over a restart, cleared by name only, and stopped again by the next result that does not hold."""
    hospital.round(1, "bob")  # two hospitals where three must be
    hospital.status("refused")
    hospital.kill()
    hospital.start()
    again = hospital.status("refused")
    assert "stopped here" in again.detail
    assert again.figures["epsilon_spent"] > 0  # what was spent is shown although nothing goes on
    assert float(hospital.gauge("privacy_epsilon_spent")) == pytest.approx(again.figures["epsilon_spent"])
    assert hospital.gauge("study_halted") == "1.0"

    assert hospital.resume() == 0
    said = capsys.readouterr().out
    words = f"round 1, result {hospital.aggregator.previous.hex()[:12]}"
    assert words in said
    assert again.detail.removeprefix("this study is stopped here: ") in said
    assert hospital.resume("--confirm", words.replace("round 1", "round 2")) == 1
    assert words in capsys.readouterr().err
    assert hospital.gauge("study_halted") == "1.0"
    assert resume.main(
        ["--study", hospital.study.hex(), "--socket", str(hospital.folder / "admin.sock"), "--confirm", words]
    ) == 0  # fmt: skip  # without the command, as in a container

    hospital.status("waiting")
    assert hospital.gauge("study_halted") == "0.0"
    hospital.round(2, "bob", "carol")
    hospital.round(3, "bob")
    assert "stopped here" in hospital.status("refused").detail
    capsys.readouterr()
    assert hospital.resume() == 0
    assert f"round 3, result {hospital.aggregator.previous.hex()[:12]}" in capsys.readouterr().out


def test_resume_of_a_study_that_runs_says_so(hospital: Hospital, capsys: pytest.CaptureFixture[str]) -> None:
    hospital.aggregator.open_round(1)
    hospital.status("trained")
    assert hospital.resume() == 1
    assert "is not stopped at this hospital" in capsys.readouterr().err


def test_resume_without_a_running_node_names_the_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hospital", "resume", "0" * 64, "--socket", str(tmp_path / "none.sock")]) == 1
    assert str(tmp_path / "none.sock") in capsys.readouterr().err
    assert resume.main(["--study", "abc", "--socket", str(tmp_path / "none.sock")]) == 2
