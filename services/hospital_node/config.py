"""The hospital's configuration, and its documents on disk: read afresh, used only when pinned (P-2)."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.common.documents.charter import LoadedCharter, load_charter
from services.common.documents.pin import load_pin, select
from services.common.documents.policy import LoadedPolicy, load_policy
from services.common.documents.strict import Section, load
from services.common.errors import Reason, ServiceError
from services.common.rpc.leaf import LeafFiles
from services.hospital_node.policy import check_hospital


class TlsSection(Section):
    """The site's own leaf."""

    certificate: str = Field(description="PEM file of the TLS leaf; read again when it changes")
    key: str = Field(description="PEM file of its private key")


class HospitalConfig(Section):
    """All of `python -m services.hospital_node --config FILE.yaml`. Paths are relative to the working directory."""

    id: str = Field(description="this hospital's id in the charter")
    charters: tuple[str, ...] = Field(min_length=1, max_length=8, description="charter files, current and next")
    pins: str = Field(description="pin.yaml, as `wardround charter verify` writes it")
    identity_key: str = Field(description="PEM file (PKCS8) of the Ed25519 identity key")
    tls: TlsSection
    state: str = Field(description="folder of ledger and vectors, on a volume of its own")
    http: str = Field(default="127.0.0.1:9464", description="host:port of probes and metrics, port 0 = any")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    aggregator: str = Field(description="host:port to dial")
    proxy: str | None = Field(default=None, description="HTTPS forward proxy, http://host:port")
    admin_socket: str = Field(description="Unix socket for `wardround` on this machine")
    policy: str = Field(description="policy.yaml, read again at every round")
    data: str = Field(description="folder with the images and metadata.csv, read only")
    backbones: str | None = Field(default=None, description="folder with weights files of frozen backbones")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0, le=256, description="CPU threads of training, 0 = all")


def load_config(path: Path) -> HospitalConfig:
    """The configuration in `path`. Raises INVALID_DOCUMENT."""
    return load(HospitalConfig, read(path), path.name)


def read(path: Path) -> bytes:
    """The exact bytes of a document. Raises INVALID_DOCUMENT naming the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"{path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from None


def leaf_files(config: HospitalConfig) -> LeafFiles:
    """Where the site's TLS leaf lies."""
    return LeafFiles(Path(config.tls.certificate), Path(config.tls.key))


class SiteDocuments:
    """Charters, pin and policy as they are on the disk now; parsed again only when their bytes change."""

    def __init__(self, config: HospitalConfig) -> None:
        self._config = config
        self._parsed: dict[bytes, LoadedCharter] = {}
        self._policy: LoadedPolicy | None = None

    def charters(self) -> dict[bytes, LoadedCharter]:
        """The pinned charters by digest, the current one first. Raises INVALID_DOCUMENT."""
        blobs = [read(Path(path)) for path in self._config.charters]
        parsed = {blob: self._parsed.get(blob) or load_charter(blob) for blob in blobs}
        self._parsed = parsed
        pinned = select(load_pin(read(Path(self._config.pins)), Path(self._config.pins).name), parsed.values())
        found = [pinned.current] if pinned.next is None else [pinned.current, pinned.next]
        for charter in found:
            charter.roster.hospital(self._config.id)
        return {charter.digest: charter for charter in found}

    def policy(self) -> LoadedPolicy:
        """The policy in force now. Raises INVALID_DOCUMENT, also for another hospital's."""
        blob = read(Path(self._config.policy))
        if self._policy is None or self._policy.blob != blob:
            policy = load_policy(blob, Path(self._config.policy).name)
            check_hospital(policy, self._config.id)
            self._policy = policy
        return self._policy
