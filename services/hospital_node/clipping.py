"""Per-patient clipped gradient sums (privacy.md §1, §3, §4, §9).

Per-sample gradients come from Opacus's GradSampleModule (hooks: it survives what functorch does not); mean over a
patient's rows, finite check, clip and sum are ours, the last three in float64. No noise here: the caller adds
integer noise to `noise.integer_sum`. Dangers: 0 · inf is NaN, so a non-finite gradient is replaced BEFORE the clip; and
float32 results move in the last bits with a batch's shape, so every forward pass has the same shape (the 2⁻¹⁰ of
`noise.sensitivity_rint` covers the rest).
"""

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from services.common.dp.clip import Clip
from services.common.errors import Reason, ServiceError

# Opacus asks for gradients of outputs only, which is what it needs: torch's warning is for those who want inputs'.
warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")

_CHUNK = 1 << 22  # float64 numbers converted at once: 32 MiB


def clipped_sum(
    module: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    clip: Clip,
    micro_batch: int = 32,
    count_non_finite: Callable[[int], None] | None = None,
    weights: torch.Tensor | None = None,
) -> npt.NDArray[np.float64]:
    """Σ over patients of clip(mean over K rows of ∇ cross-entropy), float64 (d,): trainable parameters, names sorted.

    images [patients, K, C, H, W] (or [patients, K, features] for a head), labels int64 [patients] or [patients, K],
    all on the module's device; `micro_batch` patients a forward pass; `weights` (classes) multiply the loss of a row by
    its class, before the clip. A patient whose gradient is not finite counts
    as zero; `count_non_finite` is told how many there were, for the site's own eyes only. No patients: zeros. The
    module's mode, gradients and hooks are left as found.

    Raises INVALID_DOCUMENT for a module that has no per-sample gradient: a statistic over the batch (BatchNorm), or
    a trainable parameter that the loss does not reach.
    """
    names = sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    parameters = dict(module.named_parameters())
    ends = np.cumsum([0, *(parameters[name].numel() for name in names)])
    device = images.device
    total = torch.zeros(int(ends[-1]), dtype=torch.float64, device=device)
    if not len(images):
        return total.cpu().numpy()
    if labels.dim() == 1:
        labels = labels[:, None].expand(images.shape[:2])
    refused = 0
    kept = {name: parameters[name].grad for name in names}
    # Opacus hooks are silent in a layer that is in evaluation mode; layers without parameters keep their mode.
    asleep = [
        layer
        for layer in module.modules()
        if not layer.training and any(own.requires_grad for own in layer.parameters(recurse=False))
    ]
    wrapped = _wrap(module)
    try:
        for layer in asleep:
            layer.training = True
        for start in range(0, len(images), micro_batch):
            rows, present = _fill(images[start : start + micro_batch], micro_batch)
            truth, _ = _fill(labels[start : start + micro_batch], micro_batch)
            gradients = _patient_gradients(wrapped, parameters, names, rows, truth, weights)
            gradients = [gradient[:present] for gradient in gradients]
            factors, finite = _factors(gradients, clip)
            refused += present - int(finite.sum())
            for gradient, first, last in zip(gradients, ends[:-1], ends[1:], strict=True):
                _add(total[first:last], gradient, factors, finite)
    finally:
        wrapped.to_standard_module()
        for layer in asleep:
            layer.training = False
        for name in names:
            parameters[name].grad = kept[name]
    if count_non_finite is not None:
        count_non_finite(refused)
    return total.cpu().numpy()


def _wrap(module: nn.Module) -> GradSampleModule:
    for name, layer in module.named_modules():
        # Opacus looks at trainable layers only; one without weights mixes patients all the same.
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None):
            raise ServiceError(
                Reason.INVALID_DOCUMENT, f"layer {name} takes a statistic over the batch: use GroupNorm in its place"
            )
    try:
        return GradSampleModule(module, batch_first=True, loss_reduction="sum", strict=True)
    except NotImplementedError as refusal:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"the model has no per-patient gradient, choose another architecture: {refusal}"
        ) from refusal


def _fill(batch: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
    """The batch filled up with zeros to `size` patients, and how many are real."""
    missing = size - len(batch)
    return (torch.cat([batch, batch.new_zeros((missing, *batch.shape[1:]))]) if missing else batch), len(batch)


def _patient_gradients(
    wrapped: GradSampleModule,
    parameters: dict[str, nn.Parameter],
    names: list[str],
    rows: torch.Tensor,
    truth: torch.Tensor,
    weights: torch.Tensor | None,
) -> list[torch.Tensor]:
    """For each name the mean gradient over a patient's K rows, (patients, numel)."""
    patients, count = rows.shape[:2]
    wrapped.zero_grad(set_to_none=True)
    with torch.enable_grad():
        scores = wrapped(rows.flatten(0, 1))
        loss = functional.cross_entropy(scores, truth.flatten(), weight=weights, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    found = []
    for name in names:
        sample = getattr(parameters[name], "grad_sample", None)
        if not isinstance(sample, torch.Tensor):
            raise ServiceError(
                Reason.INVALID_DOCUMENT,
                f"parameter {name} has no per-patient gradient, for the loss does not reach it: choose another model",
            )
        found.append(sample.reshape(patients, -1) if count == 1 else sample.reshape(patients, count, -1).mean(dim=1))
    wrapped.zero_grad(set_to_none=True)
    return found


def _factors(gradients: list[torch.Tensor], clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """The clip's factor of each patient over ALL parameters, float64 (patients,), 0 where not finite; and which are.

    Squares are taken in float64, where no float32 overflows.
    """
    squares = torch.zeros(len(gradients[0]), dtype=torch.float64, device=gradients[0].device)
    for gradient in gradients:
        step = max(1, _CHUNK // max(1, gradient.shape[1]))
        for start in range(0, len(gradient), step):
            squares[start : start + step] += gradient[start : start + step].double().square().sum(dim=1)
    norms = squares.sqrt()
    return torch.from_numpy(clip.factors(norms.cpu().numpy())).to(norms.device), norms.isfinite()


def _add(total: torch.Tensor, gradient: torch.Tensor, factors: torch.Tensor, finite: torch.Tensor) -> None:
    """total += Σ factor · gradient in float64; what is not finite is zero first."""
    step = max(1, _CHUNK // max(1, gradient.shape[1]))
    for start in range(0, len(gradient), step):
        keep = finite[start : start + step, None]
        part = torch.where(keep, gradient[start : start + step], 0).double()
        total += factors[start : start + step] @ part
