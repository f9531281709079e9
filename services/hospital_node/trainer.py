"""The port `Trainer` over this site's images. Imports torch, so only `__main__` imports this module, and late."""

import logging
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.common.documents.study import LoadedStudy
from services.hospital_node.control import control_change
from services.hospital_node.dataset import Dataset, Split, load_dataset
from services.hospital_node.evaluation import evaluate
from services.hospital_node.inputs import Inputs
from services.hospital_node.models import layout_of, read_control, read_model_file
from services.hospital_node.release import Counts
from services.hospital_node.training import (
    Compute,
    Task,
    clipped_gradient_sum,
    discard_progress,
    prepare,
    show_gpu,
    train_round,
)

_log = logging.getLogger(__name__)


class SiteTrainer:
    """Trains in this process, in the caller's thread (docs/adr/0007-training-in-process.md)."""

    def __init__(self, data: Path, state: Path, compute: Compute) -> None:
        self._data = data
        self._state = state
        self._progress = state / "progress"
        self._compute = compute
        self._opened: tuple[bytes, Dataset, Inputs] | None = None

    def train(
        self,
        study: LoadedStudy,
        round_number: int,
        model: Path,
        model_digest: bytes,
        should_stop: Callable[[], bool],
        control: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float64] | None:
        """As the port says; None when stopped. Raises NOT_FINITE, INVALID_DATA, STORAGE."""
        dataset, inputs = self._open(study, should_stop)
        if study.document.privacy.mechanism == "shared":
            return clipped_gradient_sum(
                self._vector(study, model), dataset, study.document, keys=_keys, compute=self._compute, inputs=inputs
            )
        server = self._server_control(study, model) if control is not None else None
        result = train_round(
            self._vector(study, model),
            dataset,
            study.document,
            Task(study.digest, round_number, model_digest),
            progress=self._progress,
            keys=_keys,
            should_stop=should_stop,
            compute=self._compute,
            inputs=inputs,
            correction=None if control is None or server is None else server.astype(np.float64) - control,
        )
        show_gpu(self._compute)
        if result is None or server is None:
            return None if result is None else result.delta
        return np.stack([result.delta, control_change(server, result.delta, study.document)])

    def evaluate(self, study: LoadedStudy, model: Path, split: Split) -> Counts:
        """Exact counts over one split. Raises INVALID_DATA."""
        dataset, inputs = self._open(study, lambda: False)
        return evaluate(self._vector(study, model), dataset, split, study.document, self._compute, inputs)

    def reopen(self) -> None:
        """The images have changed: they are read again for the next round."""
        self._opened = None

    def forget(self) -> None:
        """Drop the checkpoint of the round."""
        discard_progress(self._progress)

    def _vector(self, study: LoadedStudy, model: Path) -> npt.NDArray[np.float32]:
        return read_model_file(model, layout_of(study.document.model))

    def _server_control(self, study: LoadedStudy, model: Path) -> npt.NDArray[np.float32]:
        return read_control(model, layout_of(study.document.model))

    def _open(self, study: LoadedStudy, should_stop: Callable[[], bool]) -> tuple[Dataset, Inputs]:
        """The data set as this study sees it; every image is decoded once, before anything of a round is timed."""
        if self._opened is None or self._opened[0] != study.digest:
            section = study.document.model
            dataset = load_dataset(self._data, section.classes, section.image_size, self._state)
            inputs = prepare(dataset, study.document, self._compute, should_stop)
            if should_stop():
                return dataset, inputs  # perhaps not whole: opened again for the next round
            self._opened = (study.digest, dataset, inputs)
            _log.info("the data set is open; its unit is the %s", dataset.unit)
        return self._opened[1:]


def _keys() -> bytes:
    """32 fresh bytes of the operating system (P-8)."""
    return secrets.token_bytes(32)
