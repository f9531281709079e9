"""Reading and writing files for a person: nothing is overwritten, secrets are the owner's alone."""

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.errors import Reason, ServiceError
from services.common.secagg.signing import Signer
from services.common.store.durable import storing, sync_folder

SECRET = 0o600
PUBLIC = 0o644


def read(path: Path) -> bytes:
    """The exact bytes of a file. Raises INVALID_DOCUMENT naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"{path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from None


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


def load_signer(path: Path) -> Signer:
    """The Ed25519 identity key in a PKCS8 PEM file. Raises INVALID_DOCUMENT."""
    try:
        key = serialization.load_pem_private_key(read(path), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"{path} is not an unencrypted Ed25519 key in PEM: take identity.pem of site init"
        )
    return Signer(key)
