"""The server's steps against the formulas, a parameter at a time in plain Python; what is kept, in any blocks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.aggregator.modelfile import BLOCK, read_scalars, rewrite
from services.aggregator.strategy import Scalars, gradient_variance, server_step
from services.common.documents.costs import training_noise
from services.common.errors import Reason, ServiceError
from tests.support.aggregator_world import model_bytes
from tests.support.documents import make_study

ROUNDS, MEMBERS, BITS = 6, 3, 18


def study_with(**server: Any) -> Any:
    return make_study("shared", rounds=ROUNDS, privacy={"expected_batch": 200.0}, server=server).document


def run(study: Any, gradients: list[float], members: int = MEMBERS) -> tuple[list[float], np.ndarray]:
    """The published weights of one parameter from 1.0 on; a gradient g is the sum g·D·2^18, rounded."""
    model, scalars, kept, found = np.ones(1, np.float32), Scalars(), None, []
    for number, gradient in enumerate(gradients, 1):
        step = server_step(study, number, members, BITS, scalars)
        kept = np.zeros((step.slots, 1)) if kept is None else kept
        model = step.run(model, kept, np.array([round(gradient * 200 * 2**BITS)]))
        scalars = step.scalars
        found.append(float(model[0]))
    assert kept is not None
    return found, kept


GRADIENTS = [0.5, -0.25, 0.125, 1.0, 0.0, -0.75]


def test_sgd_with_momentum_follows_the_formula() -> None:
    found, _ = run(study_with(learning_rate=0.1, momentum=0.9), GRADIENTS)
    weight, velocity = 1.0, 0.0
    for value, gradient in zip(found, GRADIENTS, strict=True):
        velocity = 0.9 * velocity + gradient
        weight = float(np.float32(weight - 0.1 * velocity))
        assert value == pytest.approx(weight, abs=1e-6)


def test_the_divisor_is_the_studys_whatever_the_cohort() -> None:
    """privacy.md §3: the divisor is a constant; a smaller cohort makes a smaller step, never a rescaled one."""
    study = study_with(learning_rate=0.1)
    assert run(study, [0.5], members=3)[0] == run(study, [0.5], members=4)[0] == [pytest.approx(0.95)]


def test_adam_subtracts_the_noise_that_was_really_added() -> None:
    """privacy.md §5: |U|·S_h²/(s·D)² leaves the second moment, by its own moving mean, not σ²C²/D² of the claim."""
    study = study_with(strategy="adam", learning_rate=0.1, momentum=0.9, second_moment=0.99, smallest_divisor=1e-9)
    noise = training_noise(study).scale / 2**BITS / 200
    assert gradient_variance(study, 3) == pytest.approx(3 * noise**2, rel=1e-12)
    assert gradient_variance(study, 4) == pytest.approx(4 * noise**2, rel=1e-12)
    found, _ = run(study, GRADIENTS)
    weight, mean, square, variance = 1.0, 0.0, 0.0, 0.0
    for t, (value, gradient) in enumerate(zip(found, GRADIENTS, strict=True), 1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        variance = 0.99 * variance + 0.01 * 3 * noise**2
        root = math.sqrt((square - variance) / (1 - 0.99**t))
        weight = float(np.float32(weight - 0.1 * mean / (1 - 0.9**t) / root))
        assert value == pytest.approx(weight, rel=1e-5)


def test_adam_of_pure_noise_divides_by_no_less_than_the_smallest_divisor() -> None:
    study = study_with(strategy="adam", learning_rate=0.1, smallest_divisor=0.5)
    assert run(study, [1e-3])[0] == [pytest.approx(1 - 0.1 * 1e-3 / 0.5, rel=1e-6)]


def test_ema_publishes_the_mean_of_all_models_with_weights_that_fall() -> None:
    """The last round publishes Σ d^(T−t) w_t / Σ d^(T−t): the first model is not in it, and the steps are unchanged."""
    plain, _ = run(study_with(learning_rate=0.1), GRADIENTS)
    averaged, _ = run(study_with(learning_rate=0.1, averaging="ema", averaging_decay=0.5), GRADIENTS)
    assert averaged[:-1] == plain[:-1]
    weights = [0.5 ** (ROUNDS - t) for t in range(1, ROUNDS + 1)]
    assert averaged[-1] == pytest.approx(np.average(plain, weights=weights), rel=1e-6)


def test_tail_publishes_the_mean_of_the_last_models() -> None:
    plain, _ = run(study_with(learning_rate=0.1), GRADIENTS)
    averaged, _ = run(study_with(learning_rate=0.1, averaging="tail", averaging_rounds=4), GRADIENTS)
    assert averaged[:-1] == plain[:-1]
    assert averaged[-1] == pytest.approx(np.mean(plain[-4:]), rel=1e-6)


@pytest.mark.parametrize("strategy", ["sgd", "adam", "fedavgm", "fedadam", "fedyogi"])
def test_in_blocks_on_disk_as_in_one_piece_in_memory(tmp_path: Path, strategy: str) -> None:
    """What is kept is read back as it was written, in the same blocks, and the model's header is copied."""
    count = BLOCK + 1000
    study = study_with(strategy=strategy, learning_rate=0.1, momentum=0.5, averaging="ema")
    (tmp_path / "v0").write_bytes(model_bytes(count))
    whole, kept, scalars, path = np.arange(count) % 7 * np.float32(1), None, Scalars(), None
    model = tmp_path / "v0"
    for number in range(1, ROUNDS + 1):
        sums = (np.arange(count, dtype=np.int64) * number) % 1001 * 2**12
        assert read_scalars(path) == scalars
        step = server_step(study, number, MEMBERS, BITS, scalars)
        blocks = iter([sums[:BLOCK], sums[BLOCK:]])
        pairs = list(rewrite(model, path, count, blocks, step))
        model, path = tmp_path / f"v{number}", tmp_path / f"kept{number}"
        model.write_bytes(b"".join(numbers for numbers, _ in pairs))
        path.write_bytes(b"".join(slots for _, slots in pairs))
        kept = np.zeros((step.slots, count)) if kept is None else kept
        whole = step.run(whole.astype(np.float32), kept, sums)
        scalars = step.scalars
    assert model.read_bytes()[: -4 * count] == model_bytes(count)[: -4 * count]
    assert np.array_equal(np.frombuffer(model.read_bytes()[-4 * count :], "<f4"), whole)
    assert json.loads(path.read_bytes()[4 : 4 + int.from_bytes(path.read_bytes()[:4], "little")])["steps"] == ROUNDS


def test_a_step_beyond_float32_is_refused() -> None:
    with pytest.raises(ServiceError) as caught:
        run(study_with(learning_rate=1e38), [1e3])
    assert caught.value.reason is Reason.NOT_FINITE
