"""Masked vectors and piece sums of the open attempt as files: streamed in, streamed out, scrubbed at the end.

A submission is ONE file: the packed y, then the hospital's opening message (header and boxes), so that one fsync
makes a receipt true. Piece sums are volatile: a pod gives them again, so they are never fsynced and are dropped at
start. Memory O(chunk).
"""

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.common.errors import Reason, ServiceError
from services.common.secagg.digests import VectorDigest, chunk_digest
from services.common.secagg.ring import CHUNK_BYTES, chunk_lengths
from services.common.store.durable import storing, sync_folder


@dataclass
class Upload:
    """A submission that is coming in. `digests` are the announced SHA-256 of every chunk; one stream at a time."""

    path: Path
    total: int
    digests: tuple[bytes, ...]
    next_chunk: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def resume(self) -> None:
        """Count the whole chunks that an earlier stream left and that are what was announced; cut the rest off."""
        lengths = chunk_lengths(self.total)
        held = self.path.stat().st_size if self.path.exists() else 0
        good = 0
        if held:
            with self.path.open("rb") as file:
                while good < len(lengths) and (good + 1) * CHUNK_BYTES <= held + CHUNK_BYTES - lengths[good]:
                    if chunk_digest(file.read(lengths[good])) != self.digests[good]:
                        break
                    good += 1
        with storing("an upload"), self.path.open("ab") as file:
            file.truncate(sum(lengths[:good]))
        self.next_chunk = good

    def append(self, index: int, data: bytes) -> None:
        """Take chunk `index`. Raises MALFORMED out of order or of a wrong length, BAD_DIGEST for other bytes."""
        lengths = chunk_lengths(self.total)
        if index != self.next_chunk or index >= len(lengths):
            raise ServiceError(
                Reason.MALFORMED, f"chunk {index} came where chunk {self.next_chunk} of {len(lengths)} is due"
            )
        if len(data) != lengths[index]:
            raise ServiceError(Reason.MALFORMED, f"chunk {index} has {len(data)} bytes, not {lengths[index]}")
        if chunk_digest(data) != self.digests[index]:
            raise ServiceError(Reason.BAD_DIGEST, f"chunk {index} is not what the header announced: send it again")
        with storing("an upload"), self.path.open("r+b") as file:
            file.seek(index * CHUNK_BYTES)
            file.write(data)
        self.next_chunk += 1

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return self.next_chunk == len(self.digests)

    def seal(self, opening: bytes) -> None:
        """Write `opening` behind the vector; all of it is on the disk when this returns."""
        with storing("an upload"):
            with self.path.open("r+b") as file:
                file.truncate(self.total)
                file.seek(self.total)
                file.write(opening)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.path.parent)


class PieceFile:
    """One pod's sum of one piece, arriving chunk by chunk."""

    def __init__(self, path: Path, total: int) -> None:
        self.path = path
        self._digest = VectorDigest(total)
        self._index = 0
        self._partial = path.with_suffix(".part")
        with storing("a piece sum"):
            self._file = self._partial.open("wb")

    def append(self, index: int, data: bytes) -> None:
        """Take the next chunk. Raises MALFORMED out of order or of a wrong length."""
        if index != self._index:
            raise ServiceError(Reason.MALFORMED, f"chunk {index} of a sum came where chunk {self._index} is due")
        self._digest.add(data)
        with storing("a piece sum"):
            self._file.write(data)
        self._index += 1

    def finish(self, announced: bytes) -> None:
        """Keep it. Raises MALFORMED while chunks are missing, BAD_DIGEST if it is not the `announced` vector."""
        if self._digest.result() != announced:
            raise ServiceError(Reason.BAD_DIGEST, "the sum is not the one that its pod signed: send it again")
        with storing("a piece sum"):
            self._file.close()
            self._partial.rename(self.path)

    def close(self) -> None:
        """Drop what is unfinished. Safe to call again."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class Vectors:
    """The files of open attempts under `folder`, one sub-folder for each (round, attempt)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storing(f"the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in folder.glob("*/sum-*"):
            stale.unlink()
        self._sweeper = ThreadPoolExecutor(1, thread_name_prefix="scrub")

    def submission(self, round_number: int, attempt: int, header: bytes) -> Path:
        """Where the submission with this header digest lies."""
        return self._attempt(round_number, attempt) / f"y-{header.hex()}"

    def piece(self, round_number: int, attempt: int, pod: str, piece: int) -> Path:
        """Where this pod's sum of `piece` lies."""
        return self._attempt(round_number, attempt) / f"sum-{pod}-{piece:02d}"

    def scrub(self, keep: tuple[int, int] | None) -> None:
        """Remove every attempt's files but those of `keep` = (round, attempt), in the background.

        What is over is listed now, and no later attempt has its name. A crash leaves it to the scrub at start.
        """
        for folder in self._folder.iterdir():
            if keep is None or folder.name != _name(*keep):
                self._sweeper.submit(shutil.rmtree, folder, ignore_errors=True)

    def close(self) -> None:
        """Finish scrubbing."""
        self._sweeper.shutdown(wait=True)

    def _attempt(self, round_number: int, attempt: int) -> Path:
        folder = self._folder / _name(round_number, attempt)
        if not folder.exists():
            with storing(f"the folder {folder}"):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                sync_folder(self._folder)
        return folder


def read_opening(path: Path, total: int) -> bytes:
    """The opening message behind the vector of `total` bytes."""
    with path.open("rb") as file:
        file.seek(total)
        return file.read()


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A file descriptor of `path` for os.pread."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def _name(round_number: int, attempt: int) -> str:
    return f"{round_number:06d}-{attempt:02d}"
