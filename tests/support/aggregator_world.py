"""The coordinating centre on disk, started in this process or as a real one; and what its users dial."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives import serialization

from services.aggregator.config import load_config
from services.aggregator.service import CONDITIONS, Aggregator
from services.cli.processes import Service, wait_for_file
from services.common.clock import SystemClock
from services.common.documents.study import LoadedStudy
from services.common.ids import Role
from services.common.observe.http import Health
from services.common.rpc.certificates import issue_leaf, server_name
from services.common.rpc.channel import Caller, dial
from services.common.rpc.leaf import Leaf, LeafFiles
from tests.support.documents import CONSORTIUM, Documents, Site, make_documents, make_study

ROOT = Path(__file__).resolve().parents[2]
CENTRE = "centre"


def model_bytes(parameters: int, start: float = 0.0) -> bytes:
    """A model file of one tensor, `parameters` float32 numbers start, start + 1, … (mod 7)."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}).encode()
    values = (np.arange(parameters) % 7 + start).astype("<f4")
    return len(header).to_bytes(8, "little") + header + values.tobytes()


def plain_study(model: bytes, parameters: int = 50, **changes: Any) -> LoadedStudy:
    """One round of mechanism `none` over `model`, no gate, no wait for training; whole sections may be changed."""
    sections = {
        "rounds": 1,
        "model": {"parameters": parameters, "initial": hashlib.sha256(model).hexdigest()},
        "evaluation": {"gate_rounds": (), "final": False},
        "encoding": {"update_bound": 1000.0, "update_clip": 1e6},
        "timing": {"train_seconds": 0.0, "submit_seconds": 20.0, "attempt_seconds": 40.0},
    }
    return make_study("none", **(sections | changes))


@dataclass
class World:
    """Files of one federation under `folder`. `start` runs the aggregator here, `spawn` as a process of its own."""

    folder: Path
    documents: Documents
    study: LoadedStudy
    parameters: int
    through_round: int
    config: dict[str, Any] = field(default_factory=dict)
    address: str = ""

    @property
    def sites(self) -> dict[str, Site]:
        return self.documents.sites

    def write_config(self, **changes: Any) -> Path:
        lines = {
            "id": CENTRE,
            "charters": [str(self.folder / "charter.yaml")],
            "pins": str(self.folder / "pin.yaml"),
            "identity_key": str(self.folder / "identity.pem"),
            "tls": {"certificate": str(self.folder / "centre.crt"), "key": str(self.folder / "centre.key")},
            "state": str(self.folder / "state"),
            "http": "127.0.0.1:0",
            "log_level": "warning",
            "listen": "127.0.0.1:0",
            "study": str(self.folder / "study.yaml"),
            "through_round": self.through_round,
            "initial_model": str(self.folder / "v0.safetensors"),
            "grace_seconds": 0.3,
            "patience_seconds": 5.0,
        }
        lines |= self.config | changes
        path = self.folder / "aggregator.yaml"
        path.write_text(json.dumps(lines))  # JSON is YAML
        return path

    def start(self, **changes: Any) -> Aggregator:
        config = load_config(self.write_config(**changes), {})
        config.state.mkdir(exist_ok=True)
        running = Aggregator(config, Health(CONDITIONS))
        self.address = f"127.0.0.1:{running.server.port}"
        return running

    def spawn(
        self, module: str = "services.aggregator", variables: dict[str, str] | None = None, **changes: Any
    ) -> Service:
        """A real process; listens where the first one did. `module`: what runs in it."""
        if self.address:
            changes["listen"] = self.address
        (self.folder / "state" / "listen.address").unlink(missing_ok=True)
        environment = {"PYTHONPATH": str(ROOT), **(variables or {})}
        service = Service(CENTRE, module, self.write_config(**changes), self.folder / "log", environment)
        service.start()
        self.address = wait_for_file(self.folder / "state" / "listen.address", service, 60)
        return service

    def leaf(self, role: Role, id: str, signer: str | None = None) -> LeafFiles:
        """Files of a fresh leaf for (role, id) under its own root, or that of `signer`."""
        files = LeafFiles(self.folder / f"{id}.crt", self.folder / f"{id}.key")
        root = self.sites[signer or id].root
        names = [server_name(id, CONSORTIUM)] if role is Role.AGGREGATOR else []
        now = SystemClock().now_ms()
        issued = issue_leaf(root.certificate, root.key, role, id, CONSORTIUM, days=1, now_ms=now, server_names=names)
        files.certificate.write_bytes(issued.certificate)
        files.key.write_bytes(issued.key)
        return files

    def caller(self, role: Role, id: str, signer: str | None = None) -> Caller:
        root = self.sites[CENTRE].root.certificate

        def connect(leaf: Leaf) -> grpc.Channel:
            return dial(self.address, server_name(CENTRE, CONSORTIUM), leaf, root)

        return Caller(connect, self.leaf(role, id, signer))

    def operator(self) -> Caller:
        return self.caller(Role.OPERATOR, "olga", CENTRE)


def make_world(
    folder: Path,
    *,
    parameters: int = 50,
    rounds: int = 2,
    through_round: int | None = None,
    mechanism: str = "none",
    study: dict[str, Any] | None = None,
    **charter: Any,
) -> World:
    """A centre with `mechanism`, no wait for training, generous deadlines; `study` sections are merged in."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = make_documents(**charter)
    model = model_bytes(parameters)
    sections: dict[str, Any] = {
        "rounds": rounds,
        "model": {"parameters": parameters, "initial": hashlib.sha256(model).hexdigest()},
        "evaluation": {"gate_rounds": (), "final": False},
        "encoding": {"update_bound": 1000.0, "update_clip": 1e6},
        "timing": {"train_seconds": 0.0, "submit_seconds": 20.0, "attempt_seconds": 40.0},
    }
    for key, change in (study or {}).items():
        base = sections.get(key, {})
        sections[key] = {**base, **change} if isinstance(change, dict) else change
    loaded = make_study(mechanism, **sections)
    world = World(folder, documents, loaded, parameters, rounds if through_round is None else through_round)
    (folder / "charter.yaml").write_bytes(documents.charter.blob)
    (folder / "pin.yaml").write_bytes(documents.pin())
    (folder / "study.yaml").write_bytes(loaded.blob)
    (folder / "v0.safetensors").write_bytes(model)
    key = documents.sites[CENTRE].signer._private_key
    (folder / "identity.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    leaf = world.leaf(Role.AGGREGATOR, CENTRE)
    assert leaf.certificate.exists()
    return world


def until(what: Callable[[], Any], seconds: float = 120, why: str = "") -> Any:
    """Wait until `what()` is true and return it; tests end early, never late."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = what()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError(f"not within {seconds} s: {why or what}")
