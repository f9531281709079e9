"""The aggregator's configuration file: strict YAML, an unknown key is a refusal."""

import os
from pathlib import Path

from pydantic import Field

from services.common.documents.site import SiteConfig, read
from services.common.documents.strict import load
from services.common.errors import Reason, ServiceError

_THROUGH = "WARDROUND_THROUGH_ROUND"


class Config(SiteConfig):
    """What `python -m services.aggregator --config FILE` reads."""

    charter_signatures: Path | None = None
    listen: str = Field(description="host:port, port 0 = any; the bound address is written to state/listen.address")
    study: Path
    through_round: int = Field(default=0, ge=0, description="a target that only rises; WARDROUND_THROUGH_ROUND wins")
    initial_model: Path
    grace_seconds: float = Field(default=2, gt=0, description="a silent pod is waited for once q have answered")
    patience_seconds: float = Field(default=30, gt=0, description="q pods are waited for")
    most_abandoned: int = Field(default=3, ge=1, le=64, description="abandoned attempts before a round is stalled")


def load_config(path: Path, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> Config:
    """Read and check the file. Raises INVALID_DOCUMENT with one sentence."""
    config = load(Config, read(path), path.name)
    target = environment.get(_THROUGH)
    if target is None:
        return config
    if not target.isdecimal():
        raise ServiceError(Reason.INVALID_DOCUMENT, f"{_THROUGH}={target!r} is not a round number: give 0 or more")
    return config.model_copy(update={"through_round": int(target)})
