"""The pod's configuration, and its charters on disk: read afresh, used only when pinned (P-2)."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.common.documents.charter import LoadedCharter, load_charter
from services.common.documents.pin import load_pin, select
from services.common.documents.strict import Section, load, refuse


class TlsSection(Section):
    """The site's own leaf."""

    certificate: str = Field(description="PEM file of the TLS leaf; read again when it changes")
    key: str = Field(description="PEM file of its private key")


class PodConfig(Section):
    """All of `python -m services.keyshare --config FILE.yaml`. Paths are relative to the working directory."""

    id: str = Field(description="this pod's id in the charter")
    charters: tuple[str, ...] = Field(min_length=1, max_length=8, description="charter files, current and next")
    pins: str = Field(description="pin.yaml, as `wardround charter verify` writes it")
    identity_key: str = Field(description="PEM file (PKCS8) of the Ed25519 identity key")
    tls: TlsSection
    state: str = Field(description="folder of the store, on a volume of its own that is never restored")
    http: str = Field(default="127.0.0.1:9464", description="host:port of probes and metrics, port 0 = any")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    aggregator: str = Field(description="host:port to dial")
    proxy: str | None = Field(default=None, description="HTTPS forward proxy, http://host:port")
    admin_socket: str = Field(description="Unix socket for `wardround` on this machine")


def load_config(path: Path) -> PodConfig:
    """The configuration in `path`. Raises INVALID_DOCUMENT."""
    return load(PodConfig, read(path), path.name)


def read(path: Path) -> bytes:
    """The exact bytes of a file. Raises INVALID_DOCUMENT naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise refuse(str(path), f"cannot be read ({error.strerror}): check the path and its permissions") from None


class PinnedCharters:
    """The charters as they are on the disk now; parsed again only when a file has changed."""

    def __init__(self, config: PodConfig) -> None:
        self._config = config
        self._blobs: list[bytes] = []
        self._found: tuple[LoadedCharter, ...] = ()

    def read(self) -> tuple[LoadedCharter, ...]:
        """The current charter, then the pinned next one; this pod is in each. INVALID_DOCUMENT, UNKNOWN_MEMBER."""
        config = self._config
        blobs = [read(Path(path)) for path in (config.pins, *config.charters)]
        if blobs != self._blobs:
            pin = load_pin(blobs[0], config.pins)
            pinned = select(pin, map(load_charter, blobs[1:], config.charters))
            found = (pinned.current,) if pinned.next is None else (pinned.current, pinned.next)
            for charter in found:
                charter.roster.pod_index(config.id)
            self._blobs, self._found = blobs, found
        return self._found
