"""`wardround ledger` on what a real participation left behind (L-5)."""

import json
import math
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.common.secagg.signing import digest
from services.hospital_node.ledger import Ledger
from services.hospital_node.store import Store
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site
from tests.support.hospital_world import World, make_world
from tests.support.ledgers import debit, gaussian_epsilon, joined, planned

D = 4096


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), D, privacy={"scale_bits": 18})


@pytest.fixture(scope="module")
def used(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a site that has taken part in two rounds, the second with a gate; its service has stopped."""
    aggregator = FakeAggregator(world)
    site = Site(world, aggregator, tmp_path_factory.mktemp("site") / "alice", aggregator.start())
    for number in (1, 2):
        aggregator.open_round(number)
        checked = aggregator.collect()
        site.step()
        header = digest("header", aggregator.submissions()[-1].header.blob)
        aggregator.finish(checked, {"alice": header, "bob": derive("bob"), "carol": derive("carol")})
    site.close()
    aggregator.stop()
    return site.folder


@pytest.fixture
def folder(used: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a test may damage."""
    shutil.copytree(used / "state", tmp_path / "state")
    return tmp_path / "state"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in ("ledger", *words)])
    out, err = capsys.readouterr()
    return code, out, err


def tamper(state: Path, statement: str) -> None:
    connection = sqlite3.connect(state / "hospital.sqlite")
    connection.executescript(f"DROP TRIGGER ledger_stays; DROP TRIGGER ledger_lasts; {statement};")
    connection.close()


def test_show_says_what_is_spent_and_left(
    world: World, used: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "show", folder, "--json")
    assert code == 0
    found = json.loads(out)
    (study,) = found["studies"]
    privacy = world.study.document.privacy
    account = account_of(folder)
    spent = account.study(world.study.digest.hex())
    assert (study["study"], study["rounds"], study["debits"]) == (world.study.digest.hex(), 2, 3)
    assert 0 <= study["epsilon"] - spent < 1e-4
    assert study["epsilon_by_split"].keys() == {"train", "validation"}
    assert study["epsilon_cap"] == privacy.epsilon
    assert 0 <= (privacy.epsilon or 0) - spent - study["epsilon_left"] < 2e-4
    assert study["rounds_left"] == 1  # of the study's three
    assert study["epsilon_solo"] == study["epsilon"]  # `local` trusts nobody anyway
    assert found["dataset"]["name"] == "ward"
    assert found["dataset"]["bound"] == "sum"
    assert found["dataset"]["epsilon"] == study["epsilon"]
    code, out, _ = run(capsys, "show", folder, "--policy", used / "policy.yaml")
    assert code == 0
    assert f"lesions {world.study.digest.hex()[:12]}…" in out
    assert f"{math.ceil(spent * 1e4) / 1e4:.3f}" in out
    assert "data set ward" in out


def test_policy_in_force_replaces_the_caps_of_the_joining(
    world: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.write_policy(tmp_path / "policy.yaml", epsilon=20.0, dataset_epsilon=30.0)
    _, out, _ = run(capsys, "show", folder, "--json", "--policy", tmp_path / "policy.yaml")
    found = json.loads(out)
    assert (found["studies"][0]["epsilon_cap"], found["dataset"]["epsilon_cap"]) == (20.0, 30.0)
    world.write_policy(tmp_path / "policy.yaml", studies=[])
    _, out, _ = run(capsys, "show", folder, "--json", "--policy", tmp_path / "policy.yaml")
    assert json.loads(out)["studies"][0]["rounds_left"] == 0


def account_of(state: Path):  # type: ignore[no-untyped-def]  # Account
    store = Store(state)
    try:
        return Ledger(store.database).account()
    finally:
        store.close()


def test_export_and_state_verify_and_show_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ledger.jsonl"
    assert run(capsys, "export", folder, "--out", out)[0] == 0
    code, verified, _ = run(capsys, "verify", out)
    assert code == 0
    assert "4 events in one chain" in verified  # joined, train, train, validation
    last = json.loads(out.read_text().splitlines()[-1])["head"]
    assert last in verified
    from_state = run(capsys, "verify", folder)[1]
    assert last in from_state
    assert "2 submissions, each debited before it was signed" in from_state
    told = json.loads(run(capsys, "verify", folder, "--json")[1])
    assert told == {"events": 4, "head": last, "submissions": 2}
    assert run(capsys, "show", out, "--json")[1] == run(capsys, "show", folder, "--json")[1]
    code, _, err = run(capsys, "export", folder, "--out", out)
    assert (code, "not overwritten" in err) == (1, True)


@pytest.mark.parametrize(
    ("statement", "link"),
    [
        ("UPDATE ledger SET event = CAST(replace(CAST(event AS TEXT), 'train', 'test') AS BLOB) WHERE sequence = 3", 3),
        ("DELETE FROM ledger WHERE sequence = 2", 2),
        ("UPDATE ledger SET head = x'00' WHERE sequence = 4", 4),
        ("UPDATE ledger_start SET random = x'00'", 1),
    ],
    ids=["changed", "removed", "head", "start"],
)
def test_l5_verify_names_the_first_broken_link(
    folder: Path, capsys: pytest.CaptureFixture[str], statement: str, link: int
) -> None:
    tamper(folder, statement)
    for command in ("verify", "show", "export"):
        code, _, err = run(capsys, command, folder)
        assert code == 1
        assert f"broken at event {link}:" in err
        assert len(err.splitlines()) == 1


def test_cut_chain_is_found_by_the_submissions_that_it_paid_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chain that is cut at its end is whole by itself; the pending records in the same file are not silent."""
    tamper(folder, "DELETE FROM ledger WHERE sequence > 2")
    code, _, err = run(capsys, "verify", folder)
    assert code == 1
    assert "the submission of round 2, attempt 1, was signed at event 4" in err


def test_nothing_is_changed_and_a_running_service_is_not_disturbed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run(capsys, "show", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    store = Store(folder)
    try:
        code, _, err = run(capsys, "show", folder)
    finally:
        store.close()
    assert (code, "admin socket" in err) == (1, True)


def test_two_studies_and_an_exposed_round_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "state")
    ledger = Ledger(store.database)
    other = "dd" * 32
    shared = {"mechanism": "shared", "scale": 3000}
    with store.database.transaction() as connection:
        ledger.debit(connection, joined(planned(4), study=other), [debit(1, study=other, **shared)])
        ledger.debit(connection, joined(planned(3)), [debit(1, **shared), debit(2, **shared)])
        ledger.expose(connection, "aa" * 32, 2, "a cohort of 2")
    store.close()
    _, out, _ = run(capsys, "show", tmp_path / "state")
    assert "lesions: round 2 counts with this hospital's own noise alone" in out
    found = json.loads(run(capsys, "show", tmp_path / "state", "--json")[1])
    first, second = found["studies"]
    assert first["epsilon"] == pytest.approx(gaussian_epsilon(6.0, 1), rel=1e-3)
    assert first["epsilon_solo"] == pytest.approx(gaussian_epsilon(3.0, 1), rel=1e-3)
    assert second["exposed_rounds"] == [2]
    assert second["epsilon"] > gaussian_epsilon(6.0, 2)
    assert found["dataset"]["epsilon"] >= first["epsilon"]


def test_none_is_not_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "state")
    with store.database.transaction() as connection:
        plain = debit(1, mechanism="none", noise_multiplier=0.0, scale=0, delta=0.0)
        Ledger(store.database).debit(connection, joined(delta=0.0), [plain])
    store.close()
    assert "not bounded" in run(capsys, "show", tmp_path / "state")[1]
    found = json.loads(run(capsys, "show", tmp_path / "state", "--json")[1])
    assert (found["studies"][0]["epsilon"], found["dataset"]["epsilon"], found["dataset"]["epsilon_left"]) == (
        None,
        None,
        0.0,
    )


def test_empty_ledger_and_wrong_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path / "state").close()
    assert run(capsys, "verify", tmp_path / "state")[0] == 0
    assert run(capsys, "show", tmp_path / "state")[0] == 0
    (tmp_path / "empty").mkdir()
    for place, words in ((tmp_path / "empty", "hospital.sqlite"), (tmp_path / "nothing", "cannot be read")):
        code, _, err = run(capsys, "show", place)
        assert (code, words in err) == (1, True)
    stray = tmp_path / "ledger.jsonl"
    stray.write_text("nonsense\n")
    assert "line 1" in run(capsys, "verify", stray)[2]


def test_export_without_the_joining_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "state")
    with store.database.transaction() as connection:
        Ledger(store.database).append(connection, [debit(1)])
    store.close()
    assert "never joined" in run(capsys, "show", tmp_path / "state")[2]
