"""The integer noise is the discrete Gaussian: exactly in its tables, statistically in its draws (privacy.md §4)."""

import itertools
import math
from bisect import bisect_right
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from services.common.dp.noise import (
    LARGEST_SCALE,
    TABLE_BITS,
    CumulativeTable,
    DiscreteGaussian,
    effective_multiplier,
    sensitivity_rint,
    share_scale,
    vote_scale_bits,
    vote_sensitivity,
)
from services.common.errors import Reason, ServiceError

KEY = bytes(range(32))
ONE = 1 << TABLE_BITS


def masses(table: CumulativeTable) -> list[int]:
    """P(X = x)·2**192 of x = −radius … radius, as the table really draws it."""
    full = [0, *table.bounds, ONE]
    return [after - before for before, after in itertools.pairwise(full)]


def gaussian(variance: Fraction, radius: int) -> list[mpmath.mpf]:
    """The true law on 0 … radius, normalised over all integers; every weight by its own exponential."""
    weights = [
        mpmath.exp(-mpmath.mpf(x * x * variance.denominator) / (2 * variance.numerator)) for x in range(radius + 1)
    ]
    beyond = mpmath.nsum(
        lambda x: mpmath.exp(-(mpmath.mpf(x) ** 2) * variance.denominator / (2 * variance.numerator)),
        [radius + 1, radius + 400],
    )
    total = 2 * (sum(weights) + beyond) - weights[0]
    return [weight / total for weight in weights]


@pytest.mark.parametrize("scale", [256, 375])
def test_total_variation_of_the_composition_by_exact_convolution(scale: int) -> None:
    """375 is where the width jumps to 5: the smallest ratio of table deviation to width there is."""
    noise = DiscreteGaussian(scale)
    width, one = noise.width, np.array(masses(noise.table), dtype=object)

    def plus(law: np.ndarray, step: int) -> np.ndarray:
        out = np.zeros(len(law) + step * (len(one) - 1), dtype=object)
        for place, mass in enumerate(one):
            out[step * place : step * place + len(law)] += mass * law
        return out

    law = plus(plus(one, width), width**2)
    assert sum(law) == ONE**3
    radius = len(law) // 2
    with mpmath.workprec(700):
        truth = gaussian(Fraction(scale * scale), radius)
        apart = sum(abs(mpmath.mpf(int(mass)) / ONE**3 - truth[abs(place - radius)]) for place, mass in enumerate(law))
        assert apart / 2 + 1e-43 < 1e-37  # the support ends beyond 14 deviations: what lies outside is < 2e-44


@pytest.mark.parametrize("scale", [256, 2**18, 1_000_003])
def test_total_variation_of_each_table(scale: int) -> None:
    """Three tables make one draw, so a third of the bound each; composing exact Gaussians costs below 1e-70."""
    noise = DiscreteGaussian(scale)
    variance = Fraction(scale * scale, 1 + noise.width**2 + noise.width**4)
    with mpmath.workprec(400):
        truth = gaussian(variance, noise.table.radius)
        apart = sum(
            abs(mpmath.mpf(mass) / ONE - truth[abs(place - noise.table.radius)])
            for place, mass in enumerate(masses(noise.table))
        )
        assert apart / 2 < mpmath.mpf("0.3e-37")
    # Smoothing (Peikert): 4·exp(−2π²·conditional variance) with the conditional variances of the two additions.
    first = variance / (1 + noise.width**2)
    second = variance * (1 + noise.width**2) / (1 + noise.width**2 + noise.width**4)
    assert 2 * math.pi**2 * float(min(first, second)) > math.log(1e70)


@pytest.mark.parametrize("scale", [0, 255, LARGEST_SCALE + 1])
def test_scales_outside_the_proof_are_refused(scale: int) -> None:
    with pytest.raises(ServiceError) as refusal:
        DiscreteGaussian(scale)
    assert refusal.value.reason is Reason.OUT_OF_BOUND
    assert str(scale) in refusal.value.detail


def words_by_hand(first: int, count: int) -> list[int]:
    stream = Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(8 * (first + count)))
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(first, first + count)]


@pytest.mark.parametrize("scale", [256, 2**18, 2**30])
def test_draws_are_inversions_of_aes_ctr_words(scale: int) -> None:
    """P-8: the noise is a function of AES-256-CTR words alone, recomputed here in plain integers."""
    noise = DiscreteGaussian(scale)
    start, count = 101, 300
    words = words_by_hand(3 * start, 3 * count)
    high = [bound >> 128 for bound in noise.table.bounds]
    assert not set(high) & set(words)  # no tie here: ties have a test of their own
    x = [bisect_right(high, word) - noise.table.radius for word in words]
    w = noise.width
    expected = [x[3 * i] + w * x[3 * i + 1] + w * w * x[3 * i + 2] for i in range(count)]
    drawn = noise.draw(KEY, count, start)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == expected


@pytest.mark.parametrize("variance", [Fraction(240), Fraction(46_000), Fraction(450_000_000)])
def test_every_word_finds_its_place_in_a_table(variance: Fraction) -> None:
    """At every bound and beside it, and at both ends of every slot in which a search begins."""
    table, low = CumulativeTable(variance), 2**127
    at = {bound >> 128 for bound in table.bounds} | {slot << 48 for slot in range(2**16)}
    words = sorted({word for edge in at for word in (edge - 1, edge, edge + 1) if 0 <= word < 2**64} | {2**64 - 1})
    found = table.invert(np.array(words, np.uint64), lambda _: low)
    expected = [bisect_right(table.bounds, word << 128 | low) - table.radius for word in words]
    assert found.tolist() == expected


def test_the_low_words_decide_ties() -> None:
    table = CumulativeTable(Fraction(240))
    places = [40, table.radius, 2 * table.radius - 40]
    for place in places:
        bound = table.bounds[place]
        high, low = np.array([bound >> 128], dtype=np.uint64), bound & (2**128 - 1)
        assert table.invert(high, lambda _, low=low: low - 1).tolist() == [place - table.radius]
        assert table.invert(high, lambda _, low=low: low).tolist() == [place + 1 - table.radius]
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert table.invert(extremes, lambda i: (0, 2**128 - 1)[i]).tolist() == [-table.radius, table.radius]


def test_low_words_of_a_tie_are_their_own_part_of_the_stream() -> None:
    noise, asked = DiscreteGaussian(256), []

    class Listening(CumulativeTable):
        def invert(self, high, low):  # type: ignore[no-untyped-def]
            asked.extend(low(i) for i in range(3))
            return super().invert(high, low)

    noise.table = Listening(Fraction(256 * 256, 1 + noise.width**2 + noise.width**4))
    noise.draw(KEY, 1, 7)
    stream = Cipher(algorithms.AES256(KEY), modes.CTR((2**127 + 21).to_bytes(16, "big"))).encryptor().update(bytes(48))
    assert asked == [int.from_bytes(stream[16 * i : 16 * i + 16], "big") for i in range(3)]


def test_splitting_a_range_changes_nothing() -> None:
    noise = DiscreteGaussian(2**18)
    whole = noise.draw(KEY, 70_001)
    for cuts in ([1], [32_768], [3, 33_000, 69_999]):
        edges = [0, *cuts, 70_001]
        parts = [noise.draw(KEY, last - first, first) for first, last in itertools.pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert noise.draw(KEY, 0).shape == (0,)
    assert not np.array_equal(noise.draw(KEY[::-1], 100), whole[:100])
    with pytest.raises(ValueError, match="32 bytes"):
        noise.draw(b"short", 1)


def test_no_other_generator_has_a_say() -> None:
    """P-8: seeding numpy's and torch's generators changes no draw, and a draw does not move them."""
    import torch

    noise, seen = DiscreteGaussian(4096), []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (np.random.get_state()[1].copy(), torch.get_rng_state())  # type: ignore[index]
        seen.append(noise.draw(KEY, 1000))
        assert np.array_equal(before[0], np.random.get_state()[1])  # type: ignore[index]
        assert torch.equal(before[1], torch.get_rng_state())
    assert np.array_equal(seen[0], seen[1])


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Standardised: about N(0, 1) when the law is right."""
    degrees = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("scale", [256, 2**18, 2**30])
def test_draws_follow_the_normal_law_and_its_low_digits_are_uniform(scale: int) -> None:
    count = 300_000
    noise = DiscreteGaussian(scale)
    z = noise.draw(bytes([scale % 251]) * 32, count)
    grid = np.linspace(-3, 3, 61) * scale
    edges = np.floor(grid) + 0.5  # half-integers: the discrete law agrees with the normal one there to 1/S²
    cumulative = np.array([0.0, *(0.5 * math.erfc(-edge / scale / math.sqrt(2)) for edge in edges), 1.0])
    observed = np.histogram(z, np.array([-np.inf, *edges, np.inf]))[0]
    assert abs(chi_square(observed, np.diff(cumulative) * count)) < 4
    for modulus in (2, noise.width, 2 * noise.width + 1):  # the composition leaves no lattice behind
        digits = np.bincount(z % modulus, minlength=modulus)
        assert abs(chi_square(digits, np.full(modulus, count / modulus))) < 4
    assert abs(z.mean()) < 4 * scale / math.sqrt(count)
    assert abs(z.var() / scale**2 - 1) < 5 * math.sqrt(2 / count)
    assert abs(((z / scale) ** 4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 / math.sqrt(count)


def test_shares_add_up_to_the_promised_noise() -> None:
    sensitivity = sensitivity_rint(18, 1.0, 9000)
    scale = share_scale(3.358, sensitivity, 6, 1)
    noise, count = DiscreteGaussian(scale), 100_000
    total = sum(noise.draw(bytes([hospital]) * 32, count) for hospital in range(5))
    assert effective_multiplier([scale] * 5, sensitivity) >= 3.358
    assert effective_multiplier([scale - 1] * 5, sensitivity) < 3.358
    wanted = (3.358 * sensitivity) ** 2 + 9
    assert abs(total.var() / wanted - 1) < 5 * math.sqrt(2 / count)
    missing = total - noise.draw(bytes(32), count)
    assert abs(missing.var() / wanted - 1) > 5 * math.sqrt(2 / count)  # the meter sees a share that is not there


@pytest.mark.parametrize(
    ("cohort", "colluding", "ratio"),
    [(7, 0, 1.269), (7, 1, 1.371), (6, 1, 1.502), (5, 1, 1.679), (5, 2, 1.939), (1, 0, 3.358)],
)
def test_share_sizes_of_the_worked_example(cohort: int, colluding: int, ratio: float) -> None:
    """privacy.md §2: share/C at σ = 3.358."""
    assert share_scale(3.358, 2.0**30, cohort, colluding) / 2**30 == pytest.approx(ratio, abs=6e-4)


def test_nobody_left_to_add_noise_is_refused() -> None:
    with pytest.raises(ServiceError) as refusal:
        share_scale(1.0, 1000.0, 2, 2)
    assert refusal.value.reason is Reason.OUT_OF_BOUND
    assert effective_multiplier([3], 1.0) == 0.0


def test_share_scale_is_the_least_integer() -> None:
    for sigma, sensitivity, honest in [(1.0, 40.0, 1), (0.7, 300_000.25, 5), (3.358, 2**40 + 1.5, 3), (4.0, 10.0, 1)]:
        scale = share_scale(sigma, sensitivity, honest, 0)
        wanted = (Fraction(sigma) * Fraction(sensitivity)) ** 2 + 9
        assert honest * scale**2 >= wanted > honest * (scale - 1) ** 2


def test_counts_get_the_least_scale_that_can_be_noised() -> None:
    for sigma, votes in [(7.03, 2), (1.39, 8), (300.0, 1)]:
        bits = vote_scale_bits(sigma, votes, 1, 0)
        assert share_scale(sigma, vote_sensitivity(votes, bits), 1, 0) >= 256
        assert bits == 0 or share_scale(sigma, vote_sensitivity(votes, bits - 1), 1, 0) < 256
        assert Fraction(vote_sensitivity(votes, bits)) ** 2 >= 4**bits * votes
    with pytest.raises(ServiceError):
        vote_scale_bits(0.0, 2, 1, 0)
