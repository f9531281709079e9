"""The aggregator's configuration file: strict YAML, an unknown key is a refusal."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from services.common.documents.strict import Document, Section, load
from services.common.errors import Reason, ServiceError

_THROUGH = "WARDROUND_THROUGH_ROUND"


class TlsSection(Section):
    """The leaf of this site; read again when its files change."""

    certificate: Path
    key: Path


class Config(Document):
    """What `python -m services.aggregator --config FILE` reads. Relative paths are relative to the process."""

    id: str
    charters: tuple[Path, ...] = Field(min_length=1)
    pins: Path
    charter_signatures: Path | None = None
    identity_key: Path = Field(description="PEM PKCS8 Ed25519")
    tls: TlsSection
    state: Path
    http: str = "127.0.0.1:9464"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    listen: str = Field(description="host:port, port 0 = any; the bound address is written to state/listen.address")
    study: Path
    through_round: int = Field(default=0, ge=0, description="a target that only rises; WARDROUND_THROUGH_ROUND wins")
    initial_model: Path
    grace_seconds: float = Field(default=2, gt=0, description="a silent pod is waited for once q have answered")
    patience_seconds: float = Field(default=30, gt=0, description="q pods are waited for")
    most_abandoned: int = Field(default=3, ge=1, le=64, description="abandoned attempts before a round is stalled")


def load_config(path: Path, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> Config:
    """Read and check the file. Raises INVALID_DOCUMENT with one sentence."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ServiceError(Reason.INVALID_DOCUMENT, f"cannot read {path} ({error.strerror})") from error
    config = load(Config, blob, path.name)
    target = environment.get(_THROUGH)
    if target is None:
        return config
    if not target.isdecimal():
        raise ServiceError(Reason.INVALID_DOCUMENT, f"{_THROUGH}={target!r} is not a round number: give 0 or more")
    return config.model_copy(update={"through_round": int(target)})
