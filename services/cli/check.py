"""Is a site ready? Every check stands by itself, so that one fault does not hide the others."""

import csv
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from cryptography import x509

from services.cli.way import Way
from services.common.documents.charter import LoadedCharter, load_signatures
from services.common.documents.policy import load_policy
from services.common.documents.shape import check_study
from services.common.documents.site import PinnedCharters, load_dialing, load_signer, read
from services.common.documents.strict import peek
from services.common.documents.study import LoadedStudy, load_study
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.leaf import LeafFiles, LeafWatch, check_own_leaf

_PUBLISHED_SHARE = 0.9  # of the published patients: a rounded figure, and where the site draws its split it varies


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    class State(Enum):
        """FAILED = the service would not start, or not work."""

        PASSED = "passed"
        WARNED = "warned"
        FAILED = "failed"

    what: str
    state: State
    detail: str


@dataclass
class _Checks:
    """Collects findings; a check that refuses is a finding, not the end."""

    findings: list[Finding] = field(default_factory=list)

    def run(self, what: str, check: Callable[[], str]) -> None:
        """`check` returns what it found good, or raises ServiceError; "?" before its text makes it a warning."""
        try:
            detail, state = check(), Finding.State.PASSED
            if detail.startswith("?"):
                detail, state = detail[1:], Finding.State.WARNED
        except ServiceError as error:
            detail, state = error.detail, Finding.State.FAILED
        self.findings.append(Finding(what, state, detail))


def check_site(config: Path, study: Path | None, connect: bool, now_ms: int) -> list[Finding]:
    """All findings about the site that `config` (of any role) describes."""
    checks = _Checks()
    loaded: dict[str, Any] = {}

    def configuration() -> str:
        loaded["role"], loaded["config"] = _load_config(config)
        return f"{config}: a {loaded['role'].value}, {loaded['config'].id}"

    checks.run("configuration", configuration)
    if "config" not in loaded:
        return checks.findings
    role, found = loaded["role"], loaded["config"]

    def charter() -> str:
        loaded["charter"] = _charter(found, role)
        document = loaded["charter"].document
        words = f"{document.consortium} version {document.version}, pinned"
        return f"?{words}; DEMO charter: safety rules are lifted" if document.demo else words

    checks.run("charter and pin", charter)
    charter_found: LoadedCharter | None = loaded.get("charter")
    checks.run("identity key", lambda: _identity(Path(found.identity_key), found.id, charter_found))
    checks.run("TLS certificate", lambda: _leaf(found, role, charter_found, now_ms))
    checks.run("state folder", lambda: _state(Path(found.state)))
    if role is Role.AGGREGATOR:
        checks.run("study and model", lambda: _study_and_model(found, charter_found))
    if role is Role.HOSPITAL:
        checks.run("policy", lambda: _policy(Path(found.policy), found.id))
        checks.run("data", lambda: _data(Path(found.data), study, found.id))
    if connect and role is not Role.AGGREGATOR:
        way = Way(found, role, charter_found)
        checks.run("address", way.resolve)
        checks.run("aggregator", way.greet)
        checks.run("clocks", way.clocks)
        checks.run("charter there", way.charters)
    return checks.findings


def _load_config(path: Path) -> tuple[Role, Any]:
    keys = peek(read(path), path.name)
    if "policy" in keys:
        from services.hospital_node import config as hospital

        return Role.HOSPITAL, hospital.load_config(path)
    if "listen" in keys:
        from services.aggregator import config as aggregator

        return Role.AGGREGATOR, aggregator.load_config(path)
    return Role.POD, load_dialing(path)


def _charter(config: Any, role: Role) -> LoadedCharter:
    current, *_ = PinnedCharters(config, lambda roster: None).read()
    member = current.find(config.id)
    if member is None or member[0] is not role:
        listed = "not listed" if member is None else f"a {member[0].value}"
        raise ServiceError(
            Reason.UNKNOWN_MEMBER,
            f"{config.id} is {listed} in the charter, this configuration is a {role.value}'s: correct `id` or the "
            "charter",
        )
    signatures = getattr(config, "charter_signatures", None)
    if signatures is not None:
        load_signatures(read(signatures), current, signatures.name)
    return current


def _identity(path: Path, id: str, charter: LoadedCharter | None) -> str:
    signer = load_signer(path)
    member = charter.find(id) if charter is not None else None
    if member is not None and member[1].identity_key != signer.public.hex():
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"{path} is not the key of {id} in the charter: use the key that signed its join.yaml",
        )
    held = path.stat()
    # In Kubernetes root owns the file, and this process reads it as a member of its pod's own group.
    if held.st_mode & (0o077 if held.st_uid == os.getuid() else 0o007):
        return f"?{path} may be read by others: chmod 600 {path}"
    return f"{path} fits the charter" if member is not None else f"{path}"


def _leaf(config: Any, role: Role, charter: LoadedCharter | None, now_ms: int) -> str:
    files = LeafFiles(config.tls.certificate, config.tls.key)
    if charter is None:
        leaf = x509.load_pem_x509_certificate(LeafWatch(files).current().certificate)
    else:
        leaf = check_own_leaf(files, role, config.id, charter, now_ms)
    ends, begins = leaf.not_valid_after_utc.timestamp(), leaf.not_valid_before_utc.timestamp()
    left = ends - now_ms / 1000
    words = f"valid for {left / 86400:.1f} more days"
    return f"?{words}: `wardround site renew` soon" if left < (ends - begins) / 3 else words


def _state(path: Path) -> str:
    with _touching(path, "the state folder must be writable by this user: create it, or mend its owner"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    room = os.statvfs(path)
    return f"{path} is writable, {room.f_bavail * room.f_frsize / 2**30:.1f} GiB free"


def _policy(path: Path, id: str) -> str:
    policy = load_policy(read(path), path.name).document
    if policy.hospital != id:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"{path} is the policy of {policy.hospital}, this hospital is {id}: take its own"
        )
    return f"allows {len(policy.studies)} studies" if policy.studies else "?allows no study: nothing will be sent"


def _data(folder: Path, study: Path | None, id: str) -> str:
    if study is not None:
        return _dataset(folder, load_study(read(study), study.name), id)
    from services.hospital_node.dataset import check_folder

    return f"{check_folder(folder)} images in {folder}; add --study to check every row"


def _dataset(folder: Path, study: LoadedStudy, id: str) -> str:
    from services.hospital_node.dataset import load_dataset

    model = study.document.model
    with tempfile.TemporaryDirectory() as scratch:  # the real state folder keeps the site's split key
        found = load_dataset(folder, model.classes, model.image_size, Path(scratch))
    words, published = f"{len(found)} images, unit: {found.unit}", study.document.privacy.patients.get(id, 0)
    if len(found.fold("train")) < _PUBLISHED_SHARE * published:
        # Told here alone: a hospital that stayed away for it would publish how many patients it has.
        return (
            f"?{words}: fewer training {found.unit}s than the {published} that the study publishes for {id}; its noise "
            "is as large, its help smaller: correct privacy.patients before the study runs, not after"
        )
    return words if found.unit == "patient" else f"?{words}: ε protects one {found.unit}, not a whole patient"


def _study_and_model(config: Any, charter: LoadedCharter | None) -> str:
    study = load_study(read(config.study), config.study.name)
    if charter is not None:
        check_study(charter, study)
    document = study.document
    words = f"study {document.name}, {document.rounds} rounds, through round {config.target()}"
    if config.initial_model is None:
        return f"{words}; its initial model comes with `wardround model push`"
    model = config.initial_model
    with _touching(model, "the initial model must be readable: correct `initial_model`"), model.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    if digest != document.model.initial:
        raise ServiceError(
            Reason.BAD_DIGEST,
            f"{model} has SHA-256 {digest[:12]}…, the study wants {document.model.initial[:12]}…: give the file that "
            "`study draft` wrote",
        )
    return f"{words}, initial model present"


@contextmanager
def _touching(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ServiceError(Reason.INVALID_DATA, f"{path}: {reason}; {advice}") from None
