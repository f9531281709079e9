"""P-26 with real processes: an amendment goes from site to site while rounds go on, and nobody restarts for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from services.cli import demo, synthetic
from services.cli.evidence import administration, status
from services.cli.federation import Federation, Site
from services.cli.processes import stop_all
from services.cli.run import load_run
from services.cli.verify import verify_run
from services.common.documents.charter import CharterSignatures, LoadedCharter, load_charter
from services.common.documents.emit import emit
from services.common.documents.pin import Pin
from services.common.documents.site import load_signer
from services.common.ids import Role
from tests.support.aggregator_world import until
from wardround.admin.v1 import admin_pb2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HOSPITALS = ("alice", "bob", "carol", "dave")


def amended(laid: Federation) -> tuple[LoadedCharter, bytes]:
    """The second version, and the pods' signatures on it."""
    second = load_charter(emit(laid.charter.document.model_copy(update={"version": 2})))
    signatures = {
        site.id: load_signer(site.folder / "identity.pem").sign("charter", second.blob).signature.hex()
        for site in laid.of(Role.POD)
    }
    signed = CharterSignatures(wardround="signatures/v1", charter=second.digest.hex(), signatures=signatures)
    return second, emit(signed)


def own_files(laid: Federation) -> None:
    """Every site its own charter, where the next one will lie beside it."""
    yaml = YAML(typ="safe", pure=True)
    for site in laid.sites:
        path = site.folder / "config.yaml"
        config = yaml.load(path.read_text())
        (site.folder / "charter.yaml").write_bytes(laid.charter.blob)
        config["charters"] = [str(site.folder / name) for name in ("charter.yaml", "charter-next.yaml")]
        if site.role is Role.AGGREGATOR:
            signatures = site.folder / "charter.signatures.yaml"
            signatures.write_bytes((laid.root / "charter.signatures.yaml").read_bytes())
            config["charter_signatures"] = str(signatures)
        with path.open("w") as out:
            yaml.dump(config, out)


def swap(path: Path, content: bytes) -> None:
    """As a mounted ConfigMap changes: the new file is there at once."""
    fresh = path.with_name(path.name + ".fresh")
    fresh.write_bytes(content)
    fresh.rename(path)


def announce(site: Site, first: LoadedCharter, second: LoadedCharter) -> None:
    swap(site.folder / "charter-next.yaml", second.blob)
    pin = Pin(wardround="pin/v1", current=first.digest.hex(), next=second.digest.hex())
    swap(site.folder / "pin.yaml", emit(pin))


def promote(site: Site, second: LoadedCharter, signatures: bytes) -> None:
    swap(site.folder / "charter.yaml", second.blob)
    if site.role is Role.AGGREGATOR:
        swap(site.folder / "charter.signatures.yaml", signatures)
    swap(site.folder / "pin.yaml", emit(Pin(wardround="pin/v1", current=second.digest.hex())))
    (site.folder / "charter-next.yaml").unlink(missing_ok=True)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[demo.Running]:
    monkeypatch.chdir(tmp_path)  # sockets' paths are short, relative ones
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    synthetic.write_sites(Path("data"), HOSPITALS, patients=40, image_size=12)
    folders = {name: Path("data") / name for name in HOSPITALS}
    demo.check_drawn(folders)
    laid = demo.lay_out(
        Path("run"), folders, 4, 2, "small-cnn", "local", 60, 50.0, 12, None, synthetic_data=True, quick_deadline=True
    )
    own_files(laid)
    found = demo.start(laid)
    yield found
    stop_all(list(found.services.values()))


def test_an_amendment_takes_force_while_rounds_go_on_and_a_hospital_that_was_away_follows(
    running: demo.Running,
) -> None:
    laid = running.federation
    first, (second, signatures) = laid.charter, amended(laid)
    lives = {name: service.process.pid for name, service in running.services.items() if service.process is not None}
    with administration(laid, laid.aggregator, running.address) as centre:

        def now() -> admin_pb2.Status:
            found: admin_pb2.Status = until(lambda: status(centre), 60, "the aggregator should answer")
            return found

        def in_force() -> bytes:
            """The evidence begins with the charter of the newest round."""
            parts = centre.ExportEvidence(admin_pb2.ExportEvidenceRequest(), timeout=60)
            blob = next(parts).chunk
            parts.cancel()
            return load_charter(blob).digest

        until(lambda: now().round >= 2, 120, "the second round")
        assert in_force() == first.digest
        running.services["dave"].terminate()
        running.services["dave"].wait(30)
        seen = []
        for site in laid.sites:
            announce(site, first, second)
            seen.append(now().round)
        until(lambda: in_force() == second.digest, 120, "a round under the second charter")
        changed = now().round
        until(lambda: now().round > changed, 120, "the round after it")
        for site in laid.sites:
            promote(site, second, signatures)
        running.services["dave"].start()
        until(lambda: now().hospitals_enrolled == 4, 120, "dave is back")
        back = now().round
        until(lambda: now().round > back + 2, 180, "rounds with dave")
        assert now().round > changed > max(seen) - 1
    assert {name: s.process.pid for name, s in running.services.items() if s.process and name != "dave"} == {
        name: pid for name, pid in lives.items() if name != "dave"
    }
    demo.gather(running)
    run = load_run(laid.root)
    assert set(run.charters) == {first.digest, second.digest}
    charters = [one.result.charter for one in run.rounds]
    assert charters == sorted(charters, key=[first.digest, second.digest].index), "once, and never back"
    assert run.rounds[-1].released["cohort"] == 4, "dave followed the results of rounds under a charter long gone"
    said: list[str] = []
    assert verify_run(laid.root, said.append) > 100
    assert sum("signed by" in line for line in said) == 2
