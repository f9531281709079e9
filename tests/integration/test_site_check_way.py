"""`wardround site check --connect` goes the service's own way to a real aggregator and names what stands in it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.cli import way
from services.cli.__main__ import main
from services.common.documents.emit import emit
from services.common.documents.pin import Pin
from services.common.ids import Role
from tests.support.fake_federation import Federation, federation
from tests.support.proxy import ConnectProxy


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path / "centre") as found:
        yield found


def pod_config(whole: Federation, folder: Path, **changes: object) -> Path:
    """A pod's files; its own process need not run."""
    world, id = whole.world, "pod-1"
    folder.mkdir(exist_ok=True)
    (folder / "charter.yaml").write_bytes(world.documents.charter.blob)
    (folder / "pin.yaml").write_bytes(world.documents.pin())
    key = world.sites[id].signer._private_key
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "identity.pem").write_bytes(pem)
    (folder / "identity.pem").chmod(0o600)
    leaf = world.leaf(Role.POD, id)
    lines = {
        "id": id,
        "charters": [str(folder / "charter.yaml")],
        "pins": str(folder / "pin.yaml"),
        "identity_key": str(folder / "identity.pem"),
        "tls": {"certificate": str(leaf.certificate), "key": str(leaf.key)},
        "state": str(folder / "state"),
        "admin_socket": str(folder / "admin.sock"),
        "aggregator": world.address,
    }
    path = folder / "pod.yaml"
    path.write_text(json.dumps(lines | changes))
    return path


def check(config: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["site", "check", "--config", str(config), "--connect"])
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).split())


def test_the_whole_way_is_gone(whole: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(pod_config(whole, tmp_path / "pod"), capsys)
    assert code == 0, said
    assert "knows pod pod-1" in said
    assert "is pinned at the aggregator, too" in said
    with ConnectProxy() as proxy:
        config = pod_config(whole, tmp_path / "pod", proxy=proxy.url)
        code, said = check(config, capsys)
        assert code == 0, said
        assert proxy.targets == [whole.world.address]


def test_what_stands_in_the_way_is_named(
    whole: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(way, "_SECONDS", 1.0)
    for changes, words in (
        ({"aggregator": "nowhere.invalid:443"}, "nowhere.invalid has no address here"),
        ({"aggregator": "127.0.0.1:1"}, "open outbound TCP 1 to it"),
        ({"proxy": "http://127.0.0.1:1"}, "cannot be reached as centre."),
    ):
        code, said = check(pod_config(whole, tmp_path / "pod", **changes), capsys)
        assert code == 1
        assert words in said, said


def test_a_stranger_is_told_so(whole: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This site's charter lists it; the aggregator's own charter is an older one that it must compare."""
    config = pod_config(whole, tmp_path / "pod")
    document = whole.world.documents.charter.document
    blob = emit(document.model_copy(update={"version": 2}))
    (tmp_path / "pod" / "charter.yaml").write_bytes(blob)
    pin = Pin(wardround="pin/v1", current=hashlib.sha256(blob).hexdigest())
    (tmp_path / "pod" / "pin.yaml").write_bytes(emit(pin))
    code, said = check(config, capsys)
    assert code == 1
    assert "the aggregator has pinned" in said
    assert "compare the files by their words" in said


def test_clocks_that_differ_are_refused(
    whole: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = pod_config(whole, tmp_path / "pod"), way.SystemClock().now_ms

    for seconds, code, words in ((-20, 0, "20.0 s ahead: set both by NTP"), (90, 1, "s behind, at most 60")):

        class Wrong:
            def now_ms(self, seconds: int = seconds) -> int:
                return now() + 1000 * seconds

        monkeypatch.setattr(way, "SystemClock", Wrong)
        found, said = check(config, capsys)
        assert (found, words in said) == (code, True), said
