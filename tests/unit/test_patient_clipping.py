"""Per-patient clipped sums: norms against torch.func, and the sensitivity meter of privacy.md §8 (§1, §3, §4, §9)."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from services.common.dp.clip import Clip
from services.common.dp.noise import integer_sum, sensitivity_rint
from services.common.errors import Reason, ServiceError
from services.hospital_node.clipping import clipped_sum

SCALE_BITS, CLIP = 18, 0.5


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def patients(count: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(2)
    return (
        torch.randn(count, rows, 3, 8, 8, generator=source),
        torch.randint(0, 5, (count,), generator=source),
    )


def per_patient(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean gradients over the rows of each patient by torch.func in float64, (patients, d) by sorted name."""
    values = {name: value.detach().double() for name, value in module.named_parameters() if value.requires_grad}

    def loss(values: dict[str, torch.Tensor], rows: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        scores = functional_call(module, values, (rows,))
        return nn.functional.cross_entropy(scores, label.expand(len(rows)))

    found = vmap(grad(loss), (None, 0, 0))(values, images.double(), labels)
    return torch.cat([found[name].reshape(len(images), -1) for name in sorted(found)], dim=1)


@pytest.mark.parametrize("micro_batch", [1, 4, 32])
@pytest.mark.parametrize("clip", [0.5, 2.6, 1000.0])
def test_equals_the_clipped_sum_of_torch_func(micro_batch: int, clip: float) -> None:
    module, (images, labels) = convolutional(), patients(11)
    exact = per_patient(module, images, labels)
    norms = exact.norm(dim=1, keepdim=True)
    expected = (exact * (clip / norms).clamp(max=1)).sum(dim=0).numpy()
    found = clipped_sum(module, images, labels, Clip(clip), micro_batch)
    assert found.dtype == np.float64
    assert np.linalg.norm(found - expected) < 1e-5 * min(clip, float(norms.max()))


@pytest.mark.parametrize("clip", [1e-3, 0.5])
def test_one_patient_never_exceeds_the_clip(clip: float) -> None:
    module, (images, labels) = convolutional(), patients(6)
    for i in range(6):
        found = clipped_sum(module, images[i : i + 1] * 10.0**i, labels[i : i + 1], Clip(clip))
        assert np.linalg.norm(found) <= clip


def test_rows_are_averaged_before_the_clip() -> None:
    """Two opposite views of a patient cancel; clipped one by one they would not. Row labels may differ as well."""
    module, image = nn.Linear(4, 2), torch.ones(1, 1, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    both = clipped_sum(module, image.repeat(1, 2, 1), torch.tensor([[0, 1]]), Clip(1e-3))
    assert np.abs(both).max() == 0
    again = clipped_sum(module, image.repeat(1, 64, 1), torch.tensor([1]), Clip(1.0))
    assert np.allclose(again, clipped_sum(module, image, torch.tensor([1]), Clip(1.0)))


def test_parameters_come_by_sorted_name_and_frozen_ones_do_not() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b_first, self.a_second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a_second(self.b_first(x))

    module, rows, labels = Crossed(), torch.randn(3, 1, 3), torch.tensor([0, 1, 1])
    module.a_second.bias.requires_grad_(False)
    found = clipped_sum(module, rows, labels, Clip(1e6))
    loss = nn.functional.cross_entropy(module(rows[:, 0]), labels, reduction="sum")
    a, b = torch.autograd.grad(loss, [module.a_second.weight, module.b_first.weight])
    assert np.allclose(found, torch.cat([a.flatten(), b.flatten()]).numpy(), atol=1e-6)


def test_an_empty_batch_is_zeros() -> None:
    module, (images, labels) = convolutional(), patients(3)
    found = clipped_sum(module, images[:0], labels[:0], Clip(CLIP))
    assert found.shape == (sum(p.numel() for p in module.parameters()),)
    assert not found.any()
    assert integer_sum(found, SCALE_BITS).dtype == np.int64


def test_the_module_is_left_as_found() -> None:
    module, (images, labels) = convolutional().eval(), patients(5)
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(2):
        with torch.no_grad():
            clipped_sum(module, images, labels, Clip(CLIP), 2)
    assert not any(layer.training for layer in module.modules())
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())
    assert not any(hasattr(parameter, "grad_sample") for parameter in module.parameters())
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    assert module[5].weight.grad is None


def test_dropout_follows_the_mode_of_the_module() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    rows, labels = torch.ones(3, 1, 4), torch.tensor([0, 1, 1])
    asleep = [clipped_sum(module.eval(), rows, labels, Clip(CLIP)) for _ in range(2)]
    assert np.array_equal(*asleep)
    assert not np.array_equal(asleep[0], clipped_sum(module.train(), rows, labels, Clip(CLIP)))
    assert all(layer.training for layer in module.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38], ids=str)
def test_a_patient_that_is_not_finite_counts_as_zero_and_spoils_nobody(bad: float) -> None:
    module, (images, labels) = convolutional(), patients(7)
    spoiled, counted = images.clone(), list[int]()
    spoiled[3, 1] = bad
    keep = [0, 1, 2, 4, 5, 6]
    found = clipped_sum(module, spoiled, labels, Clip(CLIP), 4, counted.append)
    assert counted == [1]
    assert np.linalg.norm(found - clipped_sum(module, images[keep], labels[keep], Clip(CLIP), 4)) < 1e-6
    all_bad = clipped_sum(module, torch.full_like(images, bad), labels, Clip(CLIP), 4, counted.append)
    assert counted == [1, 7]
    assert not all_bad.any()


def within(with_patient: np.ndarray, without: np.ndarray, bound: float) -> bool:
    """‖a − b‖₂ ≤ bound in exact integers."""
    square = sum(int(x) ** 2 for x in (with_patient - without).tolist())
    return square <= Fraction(bound) ** 2


ADVERSARIES = {
    "nan": lambda x: torch.full_like(x, float("nan")),
    "huge": lambda x: torch.full_like(x, 1e30),
    "large": lambda x: x * 1e6,
    "one-hot": lambda x: torch.zeros_like(x).index_fill_(-1, torch.tensor([0]), 1e4),
    "duplicate": lambda x: x,
    "empty": torch.zeros_like,
}


@pytest.mark.parametrize("place", [0, 3, 9])
@pytest.mark.parametrize("kind", ADVERSARIES)
def test_sensitivity_meter(kind: str, place: int) -> None:
    """One patient more moves the rounded integer sum by at most Δ₂: exactly, wherever it stands in the batches."""
    module, (images, labels) = convolutional(), patients(9)
    stranger = ADVERSARIES[kind](images[4:5])
    more = torch.cat([images[:place], stranger, images[place:]])
    names = torch.cat([labels[:place], labels[4:5], labels[place:]])
    with_patient = integer_sum(clipped_sum(module, more, names, Clip(CLIP), 4), SCALE_BITS)
    without = integer_sum(clipped_sum(module, images, labels, Clip(CLIP), 4), SCALE_BITS)
    assert within(with_patient, without, sensitivity_rint(SCALE_BITS, CLIP, len(without)))
    # The meter itself: half the sensitivity would be found out by a patient that is clipped.
    if kind in {"large", "duplicate"}:
        assert not within(with_patient, without, sensitivity_rint(SCALE_BITS, CLIP, len(without)) / 2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda d: st.tuples(*(st.lists(st.floats(-50, 50, width=32), min_size=d, max_size=d) for _ in range(2)))
    ),
    st.sampled_from([None, 1.0, 700.5, 1e6]),
)
def test_rounding_and_projection_keep_the_sensitivity(
    pair: tuple[list[float], list[float]], bound: float | None
) -> None:
    total, patient = (np.array(values, dtype=np.float64) for values in pair)
    norm = np.linalg.norm(patient)
    patient = patient / max(1.0, norm * (1 + 2**-40))  # clip 1
    before, after = (integer_sum(value, 8, bound) for value in (total, total + patient))
    assert within(after, before, sensitivity_rint(8, 1.0, len(total)))
    if bound is not None:
        assert np.abs(after).max() <= np.rint(bound)


def test_the_integer_sum_is_exact_and_refuses_a_fault() -> None:
    values = np.array([0.5, -0.5, 1.5, 2**-19, -3.25, 1e5])
    assert integer_sum(values, 0).tolist() == [0, 0, 2, 0, -3, 100_000]
    assert integer_sum(values, 18, 2.0**18).tolist() == [2**17, -(2**17), 2**18, 0, -(2**18), 2**18]
    with pytest.raises(ServiceError) as refusal:
        integer_sum(np.array([np.nan]), 18)
    assert refusal.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("affine", [True, False])
def test_a_statistic_over_the_batch_is_refused(affine: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Flatten(), nn.Linear(144, 5))
    images, labels = patients(2)
    with pytest.raises(ServiceError) as refusal:
        clipped_sum(module, images, labels, Clip(CLIP))
    assert refusal.value.reason is Reason.INVALID_DOCUMENT


def test_a_parameter_outside_the_loss_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(ServiceError, match=r"idle\.bias"):
        clipped_sum(Idle(), torch.ones(2, 1, 4), torch.tensor([0, 1]), Clip(CLIP))
