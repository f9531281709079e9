"""A ledger to look at: a site's state folder, its running service, or an exported file. Nothing is ever changed.

A state folder is copied under the store's own lock and the copy is opened: SQLite may have to undo a commit that a
crash cut, and an auditor's look must not be what does that to the site's file.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from services.common.errors import Reason, ServiceError
from services.common.rpc.unix import dial_admin
from services.common.secagg.blob import decode
from services.common.secagg.messages import Header, LedgerMark
from services.common.store.database import files
from services.hospital_node.ledger import Entry, Ledger, parse_export
from services.hospital_node.store import DATABASE, Store
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc


@dataclass(frozen=True)
class Sent:
    """A submission that left or may have left: the vector it masks, and the ledger's mark in its signed header."""

    round: int
    attempt: int
    vector: str
    mark: LedgerMark


@dataclass(frozen=True)
class Source:
    """The links, parsed and not verified. `start` (head_0) and `sent` are known from a state folder only."""

    entries: tuple[Entry, ...]
    start: bytes | None
    sent: tuple[Sent, ...]


def open_source(source: Path) -> Source:
    """Read `source`: a folder with `hospital.sqlite`, an admin socket, or a ledger.jsonl.

    Raises NOT_FOUND, MALFORMED, UNREACHABLE, and UNSAFE_STORE while a service has the folder open.
    """
    if source.is_dir():
        return _from_state(source)
    if source.is_socket():
        return Source(tuple(parse_export(_from_service(source).decode().splitlines())), None, ())
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceError(
            Reason.NOT_FOUND,
            f"{source} cannot be read ({error}): give a hospital's state folder, its admin socket, or a ledger.jsonl",
        ) from None
    return Source(tuple(parse_export(text.splitlines())), None, ())


def _from_state(folder: Path) -> Source:
    if not (folder / DATABASE).is_file():
        raise ServiceError(
            Reason.NOT_FOUND, f"{folder} holds no {DATABASE}: give the folder that the hospital's `state` names"
        )
    with tempfile.TemporaryDirectory() as scratch:
        with _held(folder):
            for file in files(folder / DATABASE):
                shutil.copyfile(file, Path(scratch) / file.name)
        store = Store(Path(scratch))
        try:
            entries, start = Ledger.read(store.database)
            sent = tuple(
                Sent(one.round, one.attempt, one.vector_name, decode(Header, one.header.blob).ledger)
                for one in store.all_submissions()
            )
        finally:
            store.close()
    return Source(entries, start, sent)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Nobody writes while the file is copied. Raises UNSAFE_STORE when a service has it open."""
    lock = folder / f"{DATABASE}.lock"
    if not lock.exists():  # copied from elsewhere: no service ever ran on it
        yield
        return
    handle = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ServiceError(
            Reason.UNSAFE_STORE,
            f"the hospital's service is running on {folder}: give its admin socket instead, or stop it first",
        ) from None
    finally:
        os.close(handle)


def _from_service(socket: Path) -> bytes:
    found, name = b"", ""
    try:
        with dial_admin(socket) as channel:
            stub = admin_pb2_grpc.AdministrationServiceStub(channel)
            for part in stub.ExportEvidence(admin_pb2.ExportEvidenceRequest(), timeout=60):
                name = part.path or name
                if name == "ledger.jsonl":
                    found += part.chunk
    except grpc.RpcError as error:
        raise ServiceError(Reason.UNREACHABLE, f"{socket} does not answer ({error}): is the service running?") from None
    return found
