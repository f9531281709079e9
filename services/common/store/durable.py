"""What stands between "written" and "on the disk": fsync of folders, one word for a failing disk."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from services.common.errors import Reason, ServiceError

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_DISK_FAULTS = _DENIED | {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE}


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Turn a full, failing or forbidden disk inside the block into STORAGE; `what` names the thing being written."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FAULTS:
            raise storage_error(what, os.strerror(error.errno), denied=error.errno in _DENIED) from error
        raise


def storage_error(what: str, cause: str, denied: bool = False) -> ServiceError:
    """A STORAGE refusal that says what was not written and what to do; `denied`: this user may not write there."""
    step = (
        f"let user {os.getuid()} write there (in Kubernetes: a volume that is not read-only, and fsGroup)"
        if denied
        else "free or enlarge the volume"
    )
    return ServiceError(Reason.STORAGE, f"{what} was not written ({cause}): nothing half-written is left; {step}")


def sync_folder(folder: Path) -> None:
    """fsync a folder: a name made, renamed or removed in it is on the disk after this."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `path` whole or not at all, readable by its owner only; after this it is on the disk.

    Raises STORAGE. One writer for each path: a second one would share the name of the unfinished file.
    """
    partial = path.with_name(path.name + ".new")
    with storing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                for part in parts:
                    out.write(part)
                out.flush()
                os.fsync(out.fileno())
            partial.rename(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)
