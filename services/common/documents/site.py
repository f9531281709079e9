"""What every service's configuration has in common, and the files that it names: identity key, charters, pin.

Not here: the TLS leaf, which is read again when it changes (rpc.leaf), and each role's own keys (its config.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from services.common.documents.charter import LoadedCharter, load_charter
from services.common.documents.pin import load_pin, select
from services.common.documents.strict import Section, load, refuse
from services.common.errors import ServiceError
from services.common.secagg.roster import Roster
from services.common.secagg.signing import Signer


class TlsSection(Section):
    """The site's own leaf."""

    certificate: Path = Field(description="PEM file of the TLS leaf; read again when it changes")
    key: Path = Field(description="PEM file of its private key")


class SiteConfig(Section):
    """The keys that all roles share. Paths are relative to the working directory."""

    id: str = Field(description="this site's id in the charter")
    charters: tuple[Path, ...] = Field(
        min_length=1, max_length=8, description="charter files, current and next; the next one may arrive later"
    )
    pins: Path = Field(description="pin.yaml, as `wardround charter verify` writes it")
    identity_key: Path = Field(description="PEM file (PKCS8) of the Ed25519 identity key")
    tls: TlsSection
    state: Path = Field(description="folder of all that must survive, on a volume of its own")
    http: str = Field(default="127.0.0.1:9464", description="host:port of probes and metrics, port 0 = any")
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class DialingConfig(SiteConfig):
    """A hospital's or a pod's: it only dials out, and is administered on its own machine."""

    aggregator: str = Field(description="host:port to dial")
    proxy: str | None = Field(default=None, description="HTTPS forward proxy, http://host:port")
    admin_socket: Path = Field(description="Unix socket for `wardround` on this machine")


def load_dialing(path: Path) -> DialingConfig:
    """The configuration of a site that needs no more than this: a pod's. Raises INVALID_DOCUMENT."""
    return load(DialingConfig, read(path), path.name)


def read(path: Path) -> bytes:
    """The exact bytes of a file. Raises INVALID_DOCUMENT naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise refuse(str(path), f"cannot be read ({error.strerror}): check the path and its permissions") from None


def load_signer(path: Path) -> Signer:
    """The Ed25519 identity key in a PKCS8 PEM file. Raises INVALID_DOCUMENT."""
    try:
        key = serialization.load_pem_private_key(read(path), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise refuse(str(path), "is not an unencrypted Ed25519 key in PEM: take identity.pem of `wardround site init`")
    return Signer(key)


class PinnedCharters:
    """The pinned charters as they are on the disk now; parsed again only when a file has changed (P-2).

    `check` is handed each one's roster and raises where this site has no place in it.
    """

    def __init__(self, config: SiteConfig, check: Callable[[Roster], object]) -> None:
        self._config, self._check = config, check
        self._last: tuple[list[bytes], tuple[LoadedCharter, ...]] = [], ()  # replaced as a whole: scrapes read as well

    def rosters(self) -> dict[bytes, Roster]:
        """Of the same charters, by digest."""
        return {charter.digest: charter.roster for charter in self.read()}

    def read(self) -> tuple[LoadedCharter, ...]:
        """The current charter, then the pinned next one. A file that is not there yet is passed over.

        Raises INVALID_DOCUMENT, and what `check` raises, naming the file.
        """
        config = self._config
        paths = [path for path in config.charters if path.exists()]
        blobs = [read(path) for path in (config.pins, *paths)]
        known, found = self._last
        if blobs != known:
            loaded = [load_charter(blob, path.name) for blob, path in zip(blobs[1:], paths, strict=True)]
            pinned = select(load_pin(blobs[0], config.pins.name), loaded)
            found = (pinned.current,) if pinned.next is None else (pinned.current, pinned.next)
            for charter in found:
                try:
                    self._check(charter.roster)
                except ServiceError as error:
                    raise ServiceError(
                        error.reason,
                        f"{paths[loaded.index(charter)]}: {error.detail}: correct `id`, or send this site's join.yaml "
                        "to the charter's drafter",
                    ) from None
            self._last = blobs, found
        return found
