"""Files by digest: a blob is wholly there under its digest or not at all, whatever dies when.

Layout under the folder: `blobs/HEX` finished blobs, `partial/NAME` uploads that go on after a restart,
`tmp/` writes in progress, emptied at start. One process per folder: the lock of the database beside it.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from services.common.errors import Reason, ServiceError
from services.common.store.durable import storing, sync_folder

_BLOCK = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")


class BlobStore:
    """Blobs in `folder`, which is made (0700) when it is missing; left-overs of a crash are removed.

    A `cache` holds what can be had again: nothing waits for the disk, and what an earlier life left is hashed at start.
    """

    def __init__(self, folder: Path, cache: bool = False) -> None:
        self.folder = Path(folder)
        self._blobs = self.folder / "blobs"
        self._cache = cache
        with storing(f"the folder {folder}"):
            shutil.rmtree(self.folder / "tmp", ignore_errors=True)
            for name in ("blobs", "partial", "tmp"):
                (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            sync_folder(self.folder)
        if cache:
            self._drop_damaged()

    def write(
        self,
        chunks: Iterable[bytes | bytearray],
        expected: bytes | None = None,
        name: Callable[[], bytes] | None = None,
    ) -> bytes:
        """Store the concatenated chunks and return their SHA-256 (32 bytes); on the disk when this returns.

        `name`, asked after the last chunk, gives another digest to store them under: that of long vectors is taken on
        all cores.

        Raises BAD_DIGEST when it is not `expected`, STORAGE on a full disk; both leave nothing behind.
        """
        with storing("a blob"):
            handle, written = tempfile.mkstemp(dir=self.folder / "tmp")
            hasher = hashlib.sha256()
            try:
                with os.fdopen(handle, "wb") as file:
                    for chunk in chunks:
                        if name is None:
                            hasher.update(chunk)
                        file.write(chunk)
                    file.flush()
                    self._sync(file.fileno())
                return self._keep(written, hasher.digest() if name is None else name(), expected)
            except BaseException:
                Path(written).unlink(missing_ok=True)
                raise

    def partial(self, name: str, length: int | None = None) -> "Partial":
        """Open the partial blob `name`, made when missing; `length` cuts it to that many bytes.

        Raises MALFORMED for a bad name, NOT_FOUND when fewer than `length` bytes are there. After a crash the
        last bytes appended without `sync` may be missing or wrong: the owner checks chunks, `finish` the whole.
        """
        if _NAME.fullmatch(name) is None:
            raise ServiceError(Reason.MALFORMED, f"partial blob name {name[:80]!r}: use a-z, 0-9, '.', '_' and '-'")
        return Partial(self, name, length)

    def partials(self) -> list[str]:
        """Names of the partial blobs that wait for their rest, ascending."""
        return sorted(file.name for file in (self.folder / "partial").iterdir())

    def path(self, digest: bytes) -> Path:
        """Where the blob of this digest lies; raises NOT_FOUND. Never write to it."""
        found = self._place(digest)
        if not found.is_file():
            raise ServiceError(Reason.NOT_FOUND, f"no blob {digest.hex()}: it was never stored here or is scrubbed")
        return found

    def open(self, digest: bytes) -> BinaryIO:
        """The blob for reading; raises NOT_FOUND."""
        return self.path(digest).open("rb")

    def has(self, digest: bytes) -> bool:
        """Whether the blob is here, whole."""
        return self._place(digest).is_file()

    def delete(self, *digests: bytes) -> None:
        """Scrub the blobs; gone from the disk's folder when this returns, no matter if they were there."""
        for digest in digests:
            self._place(digest).unlink(missing_ok=True)
        self._sync_folder(self._blobs)

    def _place(self, digest: bytes) -> Path:
        if len(digest) != 32:
            raise ServiceError(Reason.MALFORMED, f"a digest has 32 bytes, not {len(digest)}")
        return self._blobs / digest.hex()

    def _keep(self, written: str | Path, digest: bytes, expected: bytes | None) -> bytes:
        """Give a written and fsynced file its name."""
        if expected is not None and digest != expected:
            raise ServiceError(Reason.BAD_DIGEST, f"the bytes have SHA-256 {digest.hex()}, not {expected.hex()}")
        os.rename(written, self._place(digest))
        self._sync_folder(self._blobs)
        return digest

    def _drop_damaged(self) -> None:
        for file in self._blobs.iterdir():
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != file.name:
                file.unlink()

    def _sync(self, handle: int) -> None:
        if not self._cache:
            os.fsync(handle)

    def _sync_folder(self, folder: Path) -> None:
        if not self._cache:
            sync_folder(folder)


class Partial:
    """A blob that arrives in pieces, perhaps over several lives of the process; one user at a time."""

    def __init__(self, store: BlobStore, name: str, length: int | None) -> None:
        self.name = name
        self.path = store.folder / "partial" / name
        self._store = store
        with storing(f"partial blob {name}"):
            new = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if new:
                    store._sync_folder(self.path.parent)
                if length is not None:
                    if self.length < length:
                        raise ServiceError(
                            Reason.NOT_FOUND, f"partial blob {name} holds {self.length} bytes, not {length}: go back"
                        )
                    os.ftruncate(self._file, length)
            except BaseException:
                os.close(self._file)
                raise

    @property
    def length(self) -> int:
        """Bytes held."""
        return os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        """Add bytes at the end. Raises STORAGE on a full disk; the length is then what it was."""
        before = self.length
        with storing(f"partial blob {self.name}"):
            try:
                view, written = memoryview(data), 0
                while written < len(view):
                    written += os.pwrite(self._file, view[written:], before + written)
            except BaseException:
                os.ftruncate(self._file, before)
                raise

    def sync(self) -> None:
        """What was appended is on the disk when this returns."""
        with storing(f"partial blob {self.name}"):
            self._store._sync(self._file)

    def finish(self, expected: bytes | None = None) -> bytes:
        """Make it a blob of the store; return its SHA-256, taken over what the file now holds.

        Raises BAD_DIGEST when it is not `expected`; the partial blob is then still there.
        """
        self.sync()
        hasher = hashlib.sha256()
        for offset in range(0, self.length, _BLOCK):
            hasher.update(os.pread(self._file, _BLOCK, offset))
        digest = self._store._keep(self.path, hasher.digest(), expected)
        self._store._sync_folder(self.path.parent)
        self.close()
        return digest

    def discard(self) -> None:
        """Remove it, with all that has arrived."""
        self.path.unlink(missing_ok=True)
        self._store._sync_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        """Leave it for a later life. Safe to call again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
