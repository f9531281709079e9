"""Training of one round at a site: own steps by DP-SGD (`local`) or plain SGD (`none`), resumable at any step; or the
site's part of one global step (`shared`), which the caller noises before anything of it is stored or sent.

Under `local` a step is: a Poisson sample of patients → clipped sum in integers → discrete Gaussian noise → divided
by a constant → SGD. Sample, choice of image, turns and noise come from fresh keys of the operating system; no torch
or numpy generator touches them. Steps that a checkpoint holds are kept; every later step draws anew, so a crash
spends nothing: what a lost step had computed was never seen by anyone.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as safetensors_bytes
from torch import nn

from services.common.documents.study import Study
from services.common.errors import Reason, ServiceError
from services.common.store.durable import replace_file, sync_folder
from services.hospital_node import metrics
from services.hospital_node.architectures import HEADS, build
from services.hospital_node.dataset import Dataset
from services.hospital_node.gradients import clipped_sums, gradients, head_sum
from services.hospital_node.inputs import FeatureInputs, Inputs, open_inputs
from services.hospital_node.models import load_vector

_CHECKPOINTS = 10  # in a round; a crash loses at most a tenth of it
_CHECKPOINT = "training.safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compute:
    """Where the site computes. `device`: auto, cpu or cuda; `threads`: 0 = torch's choice.

    `backbones`: folder with the weights files of frozen backbones, under any name.
    """

    device: str = "auto"
    threads: int = 0
    backbones: Path | None = None


_DEFAULT = Compute()


@dataclass(frozen=True)
class Task:
    """What a checkpoint belongs to: it is used for exactly this and nothing else."""

    study_digest: bytes
    round: int
    model_digest: bytes


@dataclass(frozen=True)
class TrainResult:
    """`delta` = trained minus start weights, float64 (d). The rest stays at the site (P-6)."""

    delta: NDArray[np.float64]
    steps: int
    seconds: float
    images_per_second: float


@dataclass
class _Progress:
    """The optimiser between two steps; float64, so that small steps are not lost in a long round."""

    weights: NDArray[np.float64]
    velocity: NDArray[np.float64]
    step: int = 0


def open_device(compute: Compute) -> torch.device:
    """The device that `compute` names, and torch's threads set. Raises NOT_FOUND for a missing GPU."""
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ServiceError(
            Reason.NOT_FOUND, "device is cuda, but torch finds no GPU here: set device to cpu, or mend the driver"
        )
    wants_gpu = compute.device == "cuda" or (compute.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wants_gpu else "cpu")


def show_gpu(compute: Compute) -> None:
    """The most GPU memory that training has taken, for the metrics; nothing on a CPU."""
    device = open_device(compute)
    if device.type == "cuda":
        metrics.gpu_memory(
            torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
        )


def prepare(
    dataset: Dataset, study: Study, compute: Compute, should_stop: Callable[[], bool] = lambda: False
) -> Inputs:
    """Decode every image once, and compute features that are not cached yet, before any round. Raises INVALID_DATA.

    Afterwards the time of a round does not depend on a first decode, and no bad file can end one.
    """
    inputs = open_inputs(dataset, study.model, open_device(compute), compute.backbones, should_stop)
    if inputs.augmentable:
        dataset.check_images(should_stop=should_stop)
    return inputs


def train_round(
    vector: NDArray[np.float32],
    dataset: Dataset,
    study: Study,
    task: Task,
    *,
    progress: Path | None,
    keys: Callable[[], bytes],
    should_stop: Callable[[], bool],
    compute: Compute = _DEFAULT,
    inputs: Inputs | None = None,
    correction: NDArray[np.float64] | None = None,
) -> TrainResult | None:
    """Train from `vector` (d); resumes from the folder `progress`. None when `should_stop()` said so between steps.

    `progress` None: no checkpoint is kept, as in a simulation. `inputs` of this study, where the caller keeps them open
    between rounds. `correction` (d): c - c_i of SCAFFOLD, the same in every life of a round, is added to each gradient.

    `keys()` gives a fresh 32-byte key of the operating system at every call. Raises NOT_FINITE (a failed training:
    nothing is submitted), INVALID_DATA, INVALID_DOCUMENT, STORAGE.
    """
    module, opened = _open(vector, dataset, study, compute, inputs)
    gradient_of, steps = gradients(module, opened, dataset, study, keys)
    rate = study.training.learning_rate
    if rate is None:
        raise ServiceError(Reason.INVALID_DOCUMENT, "training.learning_rate is missing: no step can be taken here")
    start = vector.astype(np.float64)
    resumed = None if progress is None else _resume(progress, task, start.size)
    state = resumed or _Progress(start.copy(), np.zeros_like(start))
    every = max(1, steps // _CHECKPOINTS)
    began, seen, first = time.monotonic(), 0, state.step
    while state.step < steps:
        if should_stop():
            return None
        load_vector(module, state.weights)
        gradient, images = gradient_of()
        if correction is not None:
            gradient = gradient + correction
        _descend(state, start, gradient, rate, study)
        seen += images
        if progress is not None and (state.step % every == 0 or state.step == steps):
            _save(progress, task, state)
    seconds = time.monotonic() - began
    _log.info("trained round %d: steps %d to %d in %.1f s", task.round, first, steps, seconds)
    return TrainResult(state.weights - start, steps - first, seconds, seen / seconds if seconds > 0 else 0.0)


def clipped_gradient_sum(
    vector: NDArray[np.float32],
    dataset: Dataset,
    study: Study,
    *,
    keys: Callable[[], bytes],
    compute: Compute = _DEFAULT,
    inputs: Inputs | None = None,
) -> NDArray[np.float64]:
    """`shared`: the sum of this site's clipped patient gradients at `vector`, float64 (d), WITHOUT noise.

    One draw of sampling: after a crash it is drawn anew, which spends nothing, since nobody saw the lost one.
    Raises INVALID_DATA, INVALID_DOCUMENT.
    """
    if study.model.architecture in HEADS and isinstance(inputs, FeatureInputs):
        return head_sum(vector, inputs, dataset, study, keys)[0]  # such a round is too short to build a module for
    module, opened = _open(vector, dataset, study, compute, inputs)
    return clipped_sums(module, opened, dataset, study, keys)()[0]


def _open(
    vector: NDArray[np.float32], dataset: Dataset, study: Study, compute: Compute, inputs: Inputs | None
) -> tuple[nn.Module, Inputs]:
    device = open_device(compute)
    module = build(study.model)
    load_vector(module, vector)
    module.to(device).train()
    return module, inputs or open_inputs(dataset, study.model, device, compute.backbones)


def discard_progress(progress: Path) -> None:
    """Forget the checkpoint once the round's vector is stored or the round is given up."""
    path = progress / _CHECKPOINT
    if path.exists():
        path.unlink()
        sync_folder(progress)


def _descend(
    state: _Progress, start: NDArray[np.float64], gradient: NDArray[np.float64], rate: float, study: Study
) -> None:
    """One SGD step with momentum; FedProx adds the gradient of μ/2·|w - w_t|² (Li 2020, arXiv:1812.06127).

    Weight decay and the proximal term act on weights that are public or follow from noised gradients: under `local`
    they come after the noise, are no function of a patient beside it, and cost no privacy (docs/privacy.md).
    """
    section = study.training
    state.velocity *= section.momentum
    state.velocity += gradient + section.weight_decay * state.weights
    if section.proximal:
        state.velocity += section.proximal * (state.weights - start)
    state.weights -= rate * state.velocity
    state.step += 1
    if not np.isfinite(state.weights).all():
        raise ServiceError(
            Reason.NOT_FINITE,
            f"training diverged in step {state.step}: the study's training.learning_rate is too large",
        )


def _save(progress: Path, task: Task, state: _Progress) -> None:
    """Replace the checkpoint: weights, optimiser and step in one file, so they never disagree."""
    label = {"task": _label(task), "step": str(state.step)}
    blob = safetensors_bytes({"weights": state.weights, "velocity": state.velocity}, label)
    replace_file(progress / _CHECKPOINT, [blob])


def _resume(progress: Path, task: Task, parameters: int) -> _Progress | None:
    """The checkpoint of exactly this task; another's, or one that cannot be read, counts as none."""
    path = progress / _CHECKPOINT
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as stored:
            label = stored.metadata() or {}
            state = _Progress(stored.get_tensor("weights"), stored.get_tensor("velocity"), int(label.get("step", "0")))
    except (safetensors.SafetensorError, ValueError) as error:
        _log.warning("the checkpoint %s cannot be read (%s): training begins anew", path, error)
        return None
    if label.get("task") != _label(task) or state.weights.shape != (parameters,):
        return None
    return state


def _label(task: Task) -> str:
    return f"{task.study_digest.hex()}/{task.round}/{task.model_digest.hex()}"
