"""A leaf on disk that is renewed under a running process: read again whenever its files change."""

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from services.common.documents.charter import LoadedCharter
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.certificates import check_leaf, identity_of

_log = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class LeafFiles:
    """Where a leaf lies: PEM certificate and PEM private key."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Leaf:
    """A certificate with the key that belongs to it; `generation` counts the renewals since the start."""

    certificate: bytes
    key: bytes = field(repr=False)
    generation: int


class LeafWatch:
    """The newest whole pair of a leaf's files. Thread-safe."""

    def __init__(self, files: LeafFiles) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._leaf = _read(files, 0)

    def current(self) -> Leaf:
        """The newest pair. A half-made renewal is passed over, with a warning, until it is whole."""
        with self._lock:
            try:
                stamp = _stamp(self.files)
                if stamp != self._stamp:
                    self._leaf = _read(self.files, self._leaf.generation + 1)
                    self._stamp = stamp
            except ServiceError as error:
                _log.warning("the TLS leaf on disk is not usable yet, the old one stays: %s", error.detail)
            return self._leaf


def check_own_leaf(files: LeafFiles, role: Role, id: str, charter: LoadedCharter, now_ms: int) -> x509.Certificate:
    """The site's own leaf, if peers that hold `charter` will take it at `now_ms`.

    Raises INVALID_DOCUMENT or NOT_PERMITTED naming the file: unreadable, another's name, another root, not valid now.
    """
    leaf = x509.load_pem_x509_certificate(LeafWatch(files).current().certificate)
    try:
        named, consortium = identity_of(leaf), charter.document.consortium
        if (named.consortium, named.role, named.id) != (consortium, role, id):
            raise ServiceError(
                Reason.NOT_PERMITTED,
                f"it names {named.role.value} {named.id} of {named.consortium}, not {role.value} {id} of "
                f"{consortium}: issue it with `wardround site renew`",
            )
        found = charter.find(id)
        if found is None or found[0] is not role:
            raise ServiceError(Reason.UNKNOWN_MEMBER, f"the charter does not list {role.value} {id}")
        check_leaf(leaf, [found[1].tls_root.encode()], now_ms)
    except ServiceError as error:
        raise ServiceError(error.reason, f"{files.certificate}: {error.detail}") from None
    return leaf


def _stamp(files: LeafFiles) -> _Stamp:
    try:
        found = [path.stat() for path in (files.certificate, files.key)]
    except OSError as error:
        raise _unusable(files, error.strerror or "unreadable") from error
    return tuple((entry.st_mtime_ns, entry.st_ino, entry.st_size) for entry in found)


def _read(files: LeafFiles, generation: int) -> Leaf:
    try:
        certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
        held = serialization.load_pem_private_key(key, None).public_key()
        if x509.load_pem_x509_certificate(certificate).public_key() != held:
            raise _unusable(files, "the key is not that of the certificate")
    except OSError as error:
        raise _unusable(files, error.strerror or "unreadable") from error
    except (ValueError, TypeError) as error:
        raise _unusable(files, "not PEM, or encrypted") from error
    return Leaf(certificate, key, generation)


def _unusable(files: LeafFiles, cause: str) -> ServiceError:
    return ServiceError(
        Reason.INVALID_DOCUMENT, f"TLS leaf {files.certificate} with key {files.key}: {cause}; issue it again"
    )
