"""The aggregator's configuration file: strict YAML, an unknown key is a refusal."""

import os
from pathlib import Path

from pydantic import Field, PrivateAttr

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
    initial_model: Path | None = Field(
        default=None, description="the study's initial model as a file; without it `wardround model push` brings it"
    )
    grace_seconds: float = Field(default=2, gt=0, description="a silent pod is waited for once q have answered")
    patience_seconds: float = Field(default=30, gt=0, description="q pods are waited for")
    most_abandoned: int = Field(default=3, ge=1, le=64, description="abandoned attempts before a round is stalled")
    _environment: str | None = PrivateAttr(default=None)

    def target(self) -> int:
        """The round to run through. Raises INVALID_DOCUMENT: like a bad study, a bad target is a bad plan."""
        if self._environment is None:
            return self.through_round
        if not self._environment.isdecimal():
            raise ServiceError(
                Reason.INVALID_DOCUMENT, f"{_THROUGH}={self._environment!r} is not a round number: give 0 or more"
            )
        return int(self._environment)


def load_config(path: Path, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> Config:
    """Read and check the file; WARDROUND_THROUGH_ROUND is kept. Raises INVALID_DOCUMENT with one sentence."""
    config = load(Config, read(path), path.name)
    config._environment = environment.get(_THROUGH)
    return config
