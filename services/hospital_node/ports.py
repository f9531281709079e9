"""What participation needs of its surroundings, as narrow ports; tests bring small classes of their own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from services.common.documents.charter import LoadedCharter
from services.common.documents.policy import LoadedPolicy
from services.common.documents.study import LoadedStudy
from services.hospital_node.release import Counts

Split = Literal["train", "validation", "test"]
STEPS = (
    "consented",
    "model-fetched",
    "trained",
    "vector-stored",
    "vector-kept",
    "manifest-checked",
    "masked",
    "in-transaction",
    "debited",
    "chunk-sent",
    "uploaded",
    "receipt-kept",
    "result-checked",
    "scrubbed",
)
"""The places of a round at which a process may die; `Participation` passes each through `checkpoint`."""


class Trainer(Protocol):
    """The learning side: participation never sees torch."""

    def train(
        self,
        study: LoadedStudy,
        round_number: int,
        model: Path,
        model_digest: bytes,
        should_stop: Callable[[], bool],
        control: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float64] | None:
        """Trained minus start weights (d), or None when stopped; resumes from its own checkpoint.

        Under scaffold `control` is c_i (d), and a second row is its change: (2, d).

        Under `shared`: the sum of clipped patient gradients (d) of one fresh sample, WITHOUT noise, never stored.
        """
        ...

    def evaluate(self, study: LoadedStudy, model: Path, split: Split) -> Counts:
        """Exact counts of the model over one split; every patient votes once."""
        ...

    def reopen(self) -> None:
        """The images have changed: read them again before they are next used."""
        ...

    def forget(self) -> None:
        """Drop the checkpoint: the round's vector is stored, or will never be sent."""
        ...


class Consents(Protocol):
    """The site's own documents, read afresh: only pinned charters (P-2)."""

    def charters(self) -> dict[bytes, LoadedCharter]:
        """By digest: current and next."""
        ...

    def held_charters(self) -> dict[bytes, LoadedCharter]:
        """Those, and every other that was ever pinned here: results of rounds that ran under them are followed."""
        ...

    def policy(self) -> LoadedPolicy:
        """The policy in force now."""
        ...

    def checked_data(self) -> str:
        """The keyed digest, hex, of the images while they are those that passed their check; else POLICY_REFUSES."""
        ...


@dataclass
class Progress:
    """What the node is doing, for people and gauges; nothing here depends on data.

    `figures` are of rounds; ε is computed when somebody asks (`Consent.figures`).
    """

    phase: str = "starting"
    detail: str = ""
    study: bytes = b""
    study_name: str = ""
    round: int = 0
    attempt: int = 0
    model_version: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    def take(self, study: bytes, round_number: int, attempt: int) -> None:
        """What the aggregator has open; figures are of one study."""
        if study != self.study:
            self.study_name, self.figures = "", {}
        self.study, self.round, self.attempt = study, round_number, attempt
