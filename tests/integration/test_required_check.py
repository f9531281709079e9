"""A study that requires checked data (`data.require_check`, ADR 0016): the node, its ledger, and `verify`."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from services.cli.__main__ import main
from services.cli.run import Round
from services.cli.verify import _check_sites
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.common.secagg.blob import encode
from services.common.secagg.signing import digest
from services.hospital_node.client import round_state
from services.hospital_node.events import Checked, Debit, Joined
from services.hospital_node.ledger import Ledger
from services.hospital_node.node import Node
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site
from tests.support.hospital_world import World, make_world
from tests.support.pictures import encoded, texture, ward


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), 5_000, data={"require_check": True})


@pytest.fixture
def site(world: World, tmp_path: Path) -> Iterator[Site]:
    ward(tmp_path / "alice")
    aggregator = FakeAggregator(world)
    made = Site(world, aggregator, tmp_path / "alice", aggregator.start())
    yield made
    made.close()
    aggregator.stop()


def checked(site: Site) -> None:
    assert main(["data", "check", str(site.folder)]) == 0
    site.reopen()  # the node looks at most every ten seconds


def send(site: Site, number: int) -> None:
    site.aggregator.open_round(number)
    manifest = site.aggregator.collect()
    site.step()
    header = digest("header", site.aggregator.submissions()[-1].header.blob)
    site.aggregator.finish(manifest, {"alice": header, "bob": derive("bob"), "carol": derive("carol")})


def test_unchecked_data_are_refused_before_a_model_is_fetched(site: Site) -> None:
    site.aggregator.open_round(1)
    refused = site.refusal()
    assert refused.reason is Reason.POLICY_REFUSES
    assert "data-check.json is missing" in refused.detail
    assert "model" not in site.aggregator.calls


def test_the_aggregator_is_told_no_more_than_that_the_site_stays_out(site: Site) -> None:
    node = Node(site.participation, site.client, site.participation._consents, lambda progress: None)
    site.aggregator.open_round(1)
    refused = site.refusal()
    node._refuse(round_state(site.aggregator.state), node._decided(), refused)
    assert site.aggregator.declined == [(1, "POLICY_REFUSES")]


def test_what_is_signed_says_that_the_data_were_checked_and_when_they_changed(world: World, site: Site) -> None:
    """One event before the first debit, none while the data stay, another after they changed and passed again."""
    checked(site)
    send(site, 1)
    send(site, 2)
    kinds = [type(event) for event in site.participation.ledger.events()]
    assert kinds[:3] == [Joined, Checked, Debit]
    assert kinds.count(Checked) == 1

    next((site.folder / "images").iterdir()).write_bytes(encoded(texture(77), "PNG"))
    site.reopen()
    site.aggregator.open_round(3)
    assert "has changed since it was checked" in site.refusal().detail
    checked(site)
    send(site, 3)
    events = [event for event in site.participation.ledger.events() if isinstance(event, Checked)]
    assert len({event.data for event in events}) == len(events) == 2
    assert {(event.study, event.verdict) for event in events} == {(world.study.digest.hex(), "passed")}


def test_data_that_change_while_the_node_runs_are_opened_anew(site: Site) -> None:
    checked(site)
    send(site, 1)
    assert "reopen" not in site.trainer.lines()
    next((site.folder / "images").iterdir()).write_bytes(encoded(texture(78), "PNG"))
    assert main(["data", "check", str(site.folder)]) == 0
    site.participation._consents._data._looked = float("-inf")  # type: ignore[attr-defined]  # ten seconds are over
    send(site, 2)
    assert site.trainer.lines().count("reopen") == 1


class Evidence(NamedTuple):
    """As much of a run as the check of the sites reads."""

    evidence: Path
    study: LoadedStudy
    rounds: tuple[Round, ...]


class Sent(NamedTuple):
    number: int
    folder: Path


def evidence(world: World, site: Site, folder: Path, ledger: Ledger) -> Evidence:
    place, rounds = folder / "hospitals" / "alice", folder / "rounds" / "0001"
    place.mkdir(parents=True)
    rounds.mkdir(parents=True)
    (place / "ledger.jsonl").write_text("".join(line + "\n" for line in ledger.export()))
    sent = site.aggregator.submissions()[0]
    (rounds / "header-1-alice.signed").write_bytes(encode(sent.header))
    return Evidence(folder, world.study, (Sent(1, rounds),))  # type: ignore[arg-type]  # as much as is read


def test_verify_finds_a_header_without_a_check_before_it(world: World, site: Site, tmp_path: Path) -> None:
    checked(site)
    send(site, 1)
    found = evidence(world, site, tmp_path / "good", site.participation.ledger)
    assert _check_sites(found) == ["alice"]  # type: ignore[arg-type]  # as much as is read


def test_verify_of_a_ledger_that_never_says_checked_fails(
    world: World, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that passes the requirement over: what it signed shows it."""
    monkeypatch.setattr("services.hospital_node.consent.require_check", lambda *_: None)
    send(site, 1)
    found = evidence(world, site, tmp_path / "bad", site.participation.ledger)
    with pytest.raises(ServiceError, match="alice: it sent a header, and its ledger says of no data check before it"):
        _check_sites(found)  # type: ignore[arg-type]  # as much as is read
