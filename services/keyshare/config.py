"""The pod's configuration: what every dialling site has, and nothing else."""

from pathlib import Path

from services.common.documents.site import DialingConfig, read
from services.common.documents.strict import load


class PodConfig(DialingConfig):
    """All of `python -m services.keyshare --config FILE.yaml`; `state` is never restored from a backup (P-15)."""


def load_config(path: Path) -> PodConfig:
    """The configuration in `path`. Raises INVALID_DOCUMENT."""
    return load(PodConfig, read(path), path.name)
