"""The pin: the charter that a member consented to by hand (P-26), as `wardround charter verify` writes it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from services.common.documents.charter import LoadedCharter
from services.common.documents.strict import Document, hex_bytes, load
from services.common.errors import Reason, ServiceError


class Pin(Document):
    """`current` is in force; `next` takes force at a new round once enough members report it."""

    wardround: Literal["pin/v1"]
    current: str = Field(description="SHA-256 of the charter in force, 64 hex digits")
    next: str | None = Field(default=None, description="SHA-256 of the amendment that this member agreed to")


@dataclass(frozen=True)
class Pinned:
    """The charters whose exact bytes this member pinned."""

    current: LoadedCharter
    next: LoadedCharter | None


def load_pin(blob: bytes, name: str = "pin.yaml") -> Pin:
    """Parse a pin file. Raises INVALID_DOCUMENT."""
    pin = load(Pin, blob, name)
    hex_bytes(pin.current, 32, name, "current")
    if pin.next is not None:
        hex_bytes(pin.next, 32, name, "next")
    return pin


def select(pin: Pin, charters: Iterable[LoadedCharter]) -> Pinned:
    """P-2: only a pinned charter is used. Raises INVALID_DOCUMENT if `current` is not among `charters`.

    `next` may be pinned before its file has arrived.
    """
    found: Sequence[LoadedCharter] = tuple(charters)
    by_digest = {charter.digest.hex(): charter for charter in found}
    if pin.current not in by_digest:
        have = ", ".join(digest[:12] for digest in by_digest) or "none"
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"the pinned charter {pin.current[:12]}… is not among the charter files ({have}): put the file that was "
            "pinned there, or run `wardround charter verify` on the new one and pin it",
        )
    return Pinned(by_digest[pin.current], by_digest.get(pin.next) if pin.next else None)
