"""Poisson samples and uniform choices from AES-256-CTR words (privacy.md §1, §4)."""

import math
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from services.common.dp.sampling import choose_one, poisson_sample
from services.common.errors import Reason, ServiceError

KEY = bytes(range(32))


def stream(length: int) -> bytes:
    return Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(length))


@pytest.mark.parametrize("rate", [1e-9, 0.01, 0.256, 1 - 1e-12])
def test_a_patient_is_in_when_its_word_is_below_the_threshold(rate: float) -> None:
    """P-8: recomputed in plain integers from the keystream."""
    raw, threshold = stream(8 * 5001), math.floor(Fraction(rate) * 2**64)
    expected = [i for i in range(5001) if int.from_bytes(raw[8 * i : 8 * i + 8], "little") < threshold]
    assert poisson_sample(KEY, 5001, rate).tolist() == expected


def test_the_rate_and_the_law_of_the_batch_size() -> None:
    """A Poisson sample varies in size: variance Nq(1 − q), which a fixed-size batch would not have."""
    sizes = np.array([len(poisson_sample(i.to_bytes(32, "big"), 1000, 0.256)) for i in range(2000)])
    deviation = math.sqrt(1000 * 0.256 * 0.744)
    assert abs(sizes.mean() - 256) < 4 * deviation / math.sqrt(2000)
    assert abs(sizes.var() / deviation**2 - 1) < 5 * math.sqrt(2 / 2000)


def test_every_patient_has_the_same_chance() -> None:
    hits = np.zeros(50)
    for i in range(4000):
        hits[poisson_sample(i.to_bytes(32, "big"), 50, 0.1)] += 1
    assert np.abs(hits - 400).max() < 5 * math.sqrt(360)


def test_rate_one_takes_everybody_and_nobody_is_fine() -> None:
    assert poisson_sample(KEY, 10, 1.0).tolist() == list(range(10))
    assert poisson_sample(KEY, 0, 0.5).shape == (0,)
    assert poisson_sample(KEY, 0, 1.0).dtype == np.int64


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, float("nan")])
def test_other_rates_are_refused(rate: float) -> None:
    with pytest.raises(ServiceError) as refusal:
        poisson_sample(KEY, 10, rate)
    assert refusal.value.reason is Reason.OUT_OF_BOUND


def test_choices_are_128_bit_fractions() -> None:
    """⌊U·n/2¹²⁸⌋ in plain integers: a bias below 2⁻¹²⁸ by construction."""
    counts = [1, 2, 3, 7, 1000, 2**31 + 11, 2**32 - 1] * 50
    raw = stream(16 * len(counts))
    expected = [int.from_bytes(raw[16 * i : 16 * i + 16], "little") * n >> 128 for i, n in enumerate(counts)]
    assert choose_one(KEY, counts).tolist() == expected


def test_choices_are_uniform() -> None:
    chosen = choose_one(KEY, np.full(70_000, 7))
    assert np.abs(np.bincount(chosen, minlength=7) - 10_000).max() < 5 * math.sqrt(10_000 * 6 / 7)


@pytest.mark.parametrize("counts", [[0], [3, -1], [2**32]])
def test_a_patient_without_an_image_is_refused(counts: list[int]) -> None:
    with pytest.raises(ServiceError):
        choose_one(KEY, counts)


def test_no_other_generator_chooses() -> None:
    """P-8."""
    import torch

    seen = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        seen.append((poisson_sample(KEY, 500, 0.3).tolist(), choose_one(KEY, [5] * 20).tolist()))
    assert seen[0] == seen[1]
    assert choose_one(KEY, []).shape == (0,)
