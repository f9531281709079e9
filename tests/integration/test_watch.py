"""`wardround watch` against the real aggregator: what it says, that it survives a restart, and who may look."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.__main__ import REFUSED, main
from services.cli.live import snapshot_of
from services.cli.operator import CERTIFICATE, KEY
from services.cli.watch import as_plain, follow
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from tests.support.aggregator_world import CENTRE, World, until
from tests.support.fake_federation import NAMES, Federation, federation, over
from wardround.admin.v1.admin_pb2 import Status


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path, rounds=2, through_round=1) as found:
        yield found


def options(world: World, role: Role = Role.OPERATOR, id: str = "olga", signer: str = CENTRE) -> list[str]:
    leaf, folder = world.leaf(role, id, signer), world.folder / f"operator-{id}"
    folder.mkdir()
    leaf.certificate.rename(folder / CERTIFICATE)
    leaf.key.rename(folder / KEY)
    return ["--address", world.address, "--charter", str(world.folder / "charter.yaml"), "--operator", str(folder)]


def test_once_says_what_is_waited_for(whole: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    until(lambda: len(whole.running.coordinator.snapshot.live) == 4)
    whole.join("alice")
    until(lambda: whole.running.coordinator.snapshot.watching == {"alice"})
    arguments = ["watch", *options(whole.world)]
    assert main([*arguments, "--once", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "hospitals (1 organisations of 3)" in said["waiting_for"]
    assert said["study"]["sha256"] == whole.world.study.digest.hex()
    assert (said["pods"]["live"], said["pods"]["quorum"]) == (4, 3)
    assert said["hospitals"]["members"] == {"alice": "watching", "bob": "away", "carol": "away", "dave": "away"}
    assert main([*arguments, "--once"]) == 0
    assert "waiting for pods (4 of 3) and hospitals" in capsys.readouterr().out


def test_a_round_is_seen_and_a_restart_of_the_aggregator_is_survived(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=2, through_round=1) as whole:
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        caller, seen, lost = whole.world.operator(), list[Status](), list[ServiceError]()

        def look(status: Status) -> None:
            seen.append(status)
            if len(seen) == 1:
                whole.running.stop(0.2)

        def again(error: ServiceError, seconds: float) -> None:
            assert 0 < seconds <= 30
            lost.append(error)
            if len(lost) == 1:
                whole.running = whole.world.start(listen=whole.world.address, through_round=2)

        follow(caller, look, again)
        caller.close()
        assert lost[0].reason is Reason.UNREACHABLE
        assert "raise through_round" in seen[0].waiting
        assert "raise through_round" in snapshot_of(seen[0]).line()
        assert seen[-1].finished
        assert as_plain(seen[-1])["round"] == 2
        # Which states a stream catches is a matter of timing; that each is one of these is not.
        known = {"away", "connected", "live", "watching", "submitted"}
        assert {member.phase for status in seen for member in status.members} <= known


def test_a_hospital_may_not_watch(whole: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", *options(whole.world, Role.HOSPITAL, "alice", "alice"), "--once"]) == REFUSED
    assert capsys.readouterr().err


def test_once_does_not_wait_for_ever(whole: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(whole.world)
    arguments[1] = "127.0.0.1:1"
    assert main(["watch", *arguments, "--once"]) == REFUSED
    assert capsys.readouterr().err.startswith("wardround: ")
