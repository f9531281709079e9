"""The hospital's configuration, and its documents on disk: read afresh, used only when pinned (P-2)."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.common.documents.charter import LoadedCharter, load_charter
from services.common.documents.policy import LoadedPolicy, load_policy
from services.common.documents.site import DialingConfig, PinnedCharters, read
from services.common.documents.strict import load
from services.common.store.durable import replace_file
from services.hospital_node.datacheck import DataCheck
from services.hospital_node.dataset import split_key
from services.hospital_node.policy import check_hospital


class HospitalConfig(DialingConfig):
    """All of `python -m services.hospital_node --config FILE.yaml`."""

    policy: Path = Field(description="policy.yaml, read again at every round")
    data: Path = Field(description="folder with the images and metadata.csv, read only")
    backbones: Path | None = Field(default=None, description="folder with weights files of frozen backbones")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0, le=256, description="CPU threads of training, 0 = all")


def load_config(path: Path) -> HospitalConfig:
    """The configuration in `path`. Raises INVALID_DOCUMENT."""
    return load(HospitalConfig, read(path), path.name)


class SiteDocuments:
    """Charters, pin and policy as they are on the disk now; parsed again only when their bytes change."""

    def __init__(self, config: HospitalConfig) -> None:
        self._config = config
        self._charters = PinnedCharters(config, lambda roster: roster.hospital(config.id))
        self._policy: LoadedPolicy | None = None
        self._held: dict[bytes, LoadedCharter] = {}
        self._data = DataCheck(config.data, lambda: split_key(config.state))

    def charters(self) -> dict[bytes, LoadedCharter]:
        """The pinned charters by digest, the current one first. Raises INVALID_DOCUMENT."""
        return {charter.digest: charter for charter in self._charters.read()}

    def held_charters(self) -> dict[bytes, LoadedCharter]:
        """The pinned charters, and those that were pinned here before: kept in the state folder. Raises STORAGE.

        A hospital that was down while an amendment took force still follows the results of the rounds before it.
        """
        folder, pinned = self._config.state / "charters", self.charters()
        if not self._held:
            stored = (load_charter(path.read_bytes(), path.name) for path in sorted(folder.glob("*.yaml")))
            self._held = {charter.digest: charter for charter in stored}
        for digest, charter in pinned.items():
            if digest not in self._held:
                replace_file(folder / f"{digest.hex()}.yaml", [charter.blob])
        self._held |= pinned
        return dict(self._held)

    def checked_data(self) -> str:
        """The keyed digest, hex, of images that passed their check and are those still. Raises POLICY_REFUSES."""
        return self._data.told()

    def policy(self) -> LoadedPolicy:
        """The policy in force now. Raises INVALID_DOCUMENT, also for another hospital's."""
        blob = read(self._config.policy)
        policy = self._policy
        if policy is None or policy.blob != blob:
            policy = load_policy(blob, self._config.policy.name)
            check_hospital(policy, self._config.id)
            self._policy = policy
        return policy  # whatever another thread has read meanwhile
