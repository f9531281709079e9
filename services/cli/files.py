"""Writing files for a person: nothing is overwritten, secrets are the owner's alone."""

import os
from pathlib import Path

from services.common.errors import Reason, ServiceError
from services.common.store.durable import storing, sync_folder

SECRET = 0o600
PUBLIC = 0o644


def refuse_existing(paths: list[Path]) -> None:
    """Raise CONFLICT if one of them exists."""
    found = [path for path in paths if path.exists()]
    if found:
        raise ServiceError(
            Reason.CONFLICT, f"{found[0]} exists and is not overwritten: choose another place, or move it away first"
        )


def write_new(path: Path, content: bytes, mode: int = PUBLIC) -> None:
    """Create `path` with exactly this content, on the disk when it returns. Raises CONFLICT if it exists, STORAGE."""
    with storing(str(path)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            refuse_existing([path])
            raise
        except OSError as error:
            raise ServiceError(
                Reason.STORAGE, f"{path} cannot be written ({error.strerror}): choose another place"
            ) from None
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        sync_folder(path.parent)
