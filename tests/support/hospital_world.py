"""A whole consortium on disk for hospital tests: real charter, pins, study, policy, keys, leaves; a small trainer."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.documents.charter import LoadedCharter, Member, join_blob, load_charter
from services.common.documents.study import LoadedStudy, load_study
from services.common.ids import Role
from services.common.secagg import sealing
from services.common.secagg.signing import Signer
from tests.support import tls
from tests.support.consortium import Consortium, PodKeys, derive

HOSPITALS = ("alice", "bob", "carol", "dave")
PODS = ("pod-0", "pod-1", "pod-2", "pod-3")
AGGREGATOR = "centre"
SHARED: dict[str, Any] = {
    "privacy": {"mechanism": "shared", "patients": dict.fromkeys(HOSPITALS, 100)},
    "training": {"learning_rate": None},
    "server": {"strategy": "sgd"},
}
"""Sections of `study_document` for a study under `shared`."""
PARAMETERS = 600_000  # y has more than two chunks


def model_file(parameters: int, fill: float) -> bytes:
    """A safetensors file with one F32 tensor."""
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + np.full(parameters, fill, "<f4").tobytes()


def study_document(parameters: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """A study under `local`, one gate in round 2; `sections` change single keys."""
    document: dict[str, Any] = {
        "wardround": "study/v1",
        "name": "lesions",
        "purpose": "to test what a hospital does",
        "expires": "2099-12-31",
        "rounds": 3,
        "model": {
            "architecture": "small-cnn",
            "image_size": 32,
            "classes": ["nevus", "melanoma"],
            "parameters": parameters,
            "initial": hashlib.sha256(model_file(parameters, 0.0)).hexdigest(),
        },
        "privacy": {
            "mechanism": "local",
            "epsilon": 8.0,
            "delta": 1e-5,
            "clip": 1.0,
            "noise_multiplier": 4.0,
            "scale_bits": 20,
            "expected_batch": 100.0,
        },
        "training": {"learning_rate": 0.1},
        "encoding": {"ring_bits": 32, "update_clip": 10.0, "update_bound": 1.0},
        "evaluation": {
            "gate_rounds": [2],
            "gate_noise_multiplier": 8.0,
            "final": True,
            "final_noise_multiplier": 8.0,
            "histogram_bins": 4,
        },
        "cohort": {"minimum": 3, "colluding_hospitals": 1},
        "timing": {"train_seconds": 1.0, "submit_seconds": 60.0, "attempt_seconds": 600.0},
    }
    for name, changes in sections.items():
        if isinstance(changes, dict):
            document[name] = {**document.get(name, {}), **changes}
        else:
            document[name] = changes
    return document


@dataclass
class World:
    """Everything of one consortium; `consortium` signs for every member."""

    folder: Path
    tls: tls.FakeConsortium
    consortium: Consortium
    charter: LoadedCharter
    study: LoadedStudy
    models: dict[bytes, bytes]

    @property
    def initial(self) -> bytes:
        """Digest of v0."""
        return bytes.fromhex(self.study.document.model.initial)

    def write_policy(self, path: Path, hospital: str = "alice", **changes: Any) -> None:
        """`policy_blob` as a file."""
        path.write_bytes(self.policy_blob(hospital, **changes))

    def policy_blob(self, hospital: str = "alice", **changes: Any) -> bytes:
        """A policy that allows the study; `changes` of the study's entry, or of the policy for its own keys."""
        top = {"hospital": hospital, "dataset": "ward", "dataset_epsilon": 10.0, "dataset_delta": 1e-4}
        entry: dict[str, Any] = {
            "sha256": self.study.digest.hex(),
            "mechanisms": ["local"],
            "epsilon": 8.0,
            "delta": 1e-5,
            "rounds": 3,
            "until": "2099-12-31",
            "minimum_cohort": 3,
            "colluding_hospitals": 1,
        }
        studies = changes.pop("studies", None)
        for key, value in changes.items():
            (top if key in top else entry)[key] = value
        found = [entry] if studies is None else studies
        return yaml({"wardround": "policy/v1", **top, "studies": found}).encode()

    def write_site(self, folder: Path, address: str, hospital: str = "alice", **policy: Any) -> Path:
        """Config and policy of one hospital under `folder`; the config's path."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "charter.yaml").write_bytes(self.charter.blob)
        (folder / "pin.yaml").write_text(yaml({"wardround": "pin/v1", "current": self.charter.digest.hex()}))
        self.write_policy(folder / "policy.yaml", hospital, **policy)
        key = Ed25519PrivateKey.from_private_bytes(derive("identity", hospital))
        (folder / "identity.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        leaf = self.tls.leaf(Role.HOSPITAL, hospital)
        config = folder / "config.yaml"
        config.write_text(
            yaml(
                {
                    "id": hospital,
                    "charters": [str(folder / "charter.yaml")],
                    "pins": str(folder / "pin.yaml"),
                    "identity_key": str(folder / "identity.pem"),
                    "tls": {"certificate": str(leaf.certificate), "key": str(leaf.key)},
                    "state": str(folder / "state"),
                    "http": "127.0.0.1:0",
                    "aggregator": address,
                    "admin_socket": str(folder / "admin.sock"),
                    "policy": str(folder / "policy.yaml"),
                    "data": str(folder),
                }
            )
        )
        return config


def yaml(document: dict[str, Any]) -> str:
    """JSON is YAML 1.2, but dates stand unquoted there."""
    text = json.dumps(document, indent=1)
    return text.replace('"2099-12-31"', "2099-12-31").replace('"2020-01-01"', "2020-01-01")


def make_world(folder: Path, parameters: int = PARAMETERS, **sections: Any) -> World:
    """A demo charter with four pods and four hospitals, and a study of `parameters` numbers."""
    made = tls.make_consortium(folder / "tls", PODS, HOSPITALS, aggregator=AGGREGATOR, name="test")
    signers = {id: Signer.from_seed(derive("identity", id)) for id in (AGGREGATOR, *PODS, *HOSPITALS)}

    def member(role: Role, id: str) -> dict[str, str]:
        plain = Member(
            id=id,
            organisation=f"org-{id}",
            identity_key=signers[id].public.hex(),
            tls_root=made.root(role, id).decode(),
            signature="0" * 128,
        )
        signature = signers[id].sign("join", join_blob(role, plain)).signature.hex()
        return {**plain.model_dump(), "signature": signature}

    charter = load_charter(
        yaml(
            {
                "wardround": "charter/v1",
                "consortium": "test",
                "version": 1,
                "suite": "x25519",
                "committee": {"threshold": 2, "quorum": 3},
                "cohort": {"minimum": 3, "maximum": 8, "colluding_hospitals": 1},
                "aggregator": member(Role.AGGREGATOR, AGGREGATOR),
                "pods": [member(Role.POD, id) for id in PODS],
                "hospitals": [member(Role.HOSPITAL, id) for id in HOSPITALS],
            }
        ).encode()
    )
    pods = []
    for id in PODS:
        private, public = sealing.generate(charter.roster.suite)
        pods.append(PodKeys(signers[id], Signer.from_seed(derive("round", id)), private, public))
    consortium = Consortium(charter.roster, signers[AGGREGATOR], pods, {id: signers[id] for id in HOSPITALS})
    study = load_study(yaml(study_document(parameters, **sections)).encode())
    first = model_file(parameters, 0.0)
    return World(folder, made, consortium, charter, study, {hashlib.sha256(first).digest(): first})


@dataclass
class FixedCounts:
    """Counts of two classes that a test knows."""

    hits: np.ndarray
    totals: np.ndarray
    confusion: np.ndarray
    histogram: np.ndarray


class FixedTrainer:
    """A trainer without learning: every number of the update is `value`; each call is a line in `log`."""

    def __init__(self, log: Path, value: float = 0.125) -> None:
        self.log = log
        self.value = value

    def _note(self, what: str) -> None:
        with self.log.open("a") as file:
            file.write(what + "\n")

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def train(
        self, study: LoadedStudy, round_number: int, model: Path, model_digest: bytes, should_stop: Any, control: Any
    ) -> Any:
        """Under scaffold the control variate changes by a quarter of the value and a quarter of what it is."""
        self._note(f"train {round_number}")
        assert hashlib.sha256(model.read_bytes()).digest() == model_digest
        update = np.full(study.document.model.parameters, self.value, np.float64)
        return update if control is None else np.stack([update, (self.value + control) / 4])

    def evaluate(self, study: LoadedStudy, model: Path, split: str) -> FixedCounts:
        self._note(f"evaluate {split}")
        return FixedCounts(np.array([5, 3]), np.array([8, 4]), np.array([[5, 3], [1, 3]]), np.ones((2, 2, 4), np.int64))

    def reopen(self) -> None:
        self._note("reopen")

    def forget(self) -> None:
        self._note("forget")
