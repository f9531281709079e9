"""Membership inference and gradient inversion: the arithmetic of the attacks, and that noise and masks stop them."""

import math

import numpy as np
import pytest

from services.cli.audit_inversion import VIEWS, measure_inversion, views_of
from services.cli.audit_membership import (
    attacked,
    confidence,
    draw_pool,
    largest_advantage,
    likelihood_ratios,
    logits,
    measure_membership,
    train,
)


def quiet(what: str) -> None:
    pass


def test_attack_figures_of_a_perfect_a_useless_and_an_inverted_score() -> None:
    members = np.array([[True, False] * 50])
    perfect = attacked(np.where(members, 1.0, 0.0), members)
    assert (perfect.auc, perfect.rate_at_one_percent, perfect.advantage) == (1.0, 1.0, 1.0)
    inverted = attacked(np.where(members, 0.0, 1.0), members)
    assert inverted.auc == 0.0
    useless = attacked(
        np.random.default_rng(1).normal(size=(40, 500)), np.random.default_rng(2).random((40, 500)) < 0.5
    )
    assert useless.auc == pytest.approx(0.5, abs=0.02)
    assert useless.advantage == pytest.approx(0.0, abs=0.04)


def test_likelihood_ratio_is_that_of_two_known_gaussians() -> None:
    """Scores N(1, 1) inside and N(0, 1) outside: the log ratio is x − 1/2."""
    generator = np.random.default_rng(4)
    members = generator.random((4001, 3)) < 0.5
    scores = generator.normal(size=members.shape) + members
    ratio = likelihood_ratios(scores, members, 4000)
    assert ratio[0] == pytest.approx(scores[4000] - 0.5, abs=0.25)


def test_confidence_is_the_log_odds_of_the_true_class() -> None:
    scores = np.array([[2.0, 1.0, -1.0], [0.0, 500.0, 0.0]])
    shares = np.exp(scores[0]) / np.exp(scores[0]).sum()
    found = confidence(scores, np.array([0, 1]))
    assert found[0] == pytest.approx(math.log(shares[0] / (1 - shares[0])))
    assert found[1] == pytest.approx(500 - math.log(2))


def test_largest_advantage_is_total_variation_of_randomised_response() -> None:
    """(e^ε − 1)/(e^ε + 1) at δ = 0; nothing at ε = 0; all at a large ε."""
    assert largest_advantage(math.log(3), 0.0) == pytest.approx(0.5)
    assert largest_advantage(0.0, 0.0) == 0.0
    assert largest_advantage(30.0, 0.0) == pytest.approx(1.0)


def test_noise_hides_who_was_trained_on() -> None:
    """LiRA tells members well without noise, and no better than a little above chance at ε = 3."""
    finding = measure_membership(1, 150, 12, 6, quiet)
    assert finding.holds
    plain, private = finding.notes["without noise"], finding.notes["ε = 3"]
    assert plain["LiRA"]["auc"] > 0.7
    assert plain["loss threshold"]["auc"] > 0.6
    assert private["LiRA"]["auc"] < 0.62
    assert private["LiRA"]["auc"] < plain["LiRA"]["auc"] - 0.15


def test_model_without_noise_learns_its_patients_by_heart() -> None:
    pool = draw_pool(np.random.default_rng(3), 60)
    members = np.arange(60) < 30
    hits = logits(train(pool, members, None), pool).argmax(axis=1) == pool.labels
    assert hits[:30].all()


def test_plain_gradient_gives_the_picture_away_and_the_others_do_not() -> None:
    finding, pictures = measure_inversion(1, 2, 60, quiet)
    assert finding.holds
    assert finding.caught == {"no noise and no mask": True}
    for one in pictures["linear model"]:
        assert one.likeness[1] > 0.999
        assert max(map(abs, one.likeness[2:])) < 0.2
        assert one.pictures.shape == (len(VIEWS), 3, 28, 28)
        assert one.pictures[1] == pytest.approx(one.pictures[0], abs=0.02)
    assert np.mean([one.likeness[1] for one in pictures["small-cnn"]]) > 0.6


def test_masked_view_is_uniform_and_the_sum_holds_everybody() -> None:
    """What leaves under masks has no signal: its lanes fill the ring evenly, whatever is in them."""
    total = np.full(4000, 0.01)
    plain, noised, masked, summed = views_of(total, 2 * total)
    assert plain == pytest.approx(total, abs=2**-16)
    assert masked.std() == pytest.approx(2**32 / math.sqrt(12) / 2**16, rel=0.05)
    assert abs(noised.mean() - 0.01) < 6 * noised.std() / math.sqrt(4000)
    assert abs(summed.mean() - 0.03) < 6 * summed.std() / math.sqrt(4000)
