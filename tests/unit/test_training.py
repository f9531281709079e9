"""One round of training at a site: what is random, what is not, what survives kill -9."""

import itertools
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.common.dp.noise import sensitivity_rint
from services.common.errors import Reason, ServiceError
from services.hospital_node import gradients
from services.hospital_node.architectures import build
from services.hospital_node.dataset import Dataset
from services.hospital_node.inputs import PixelInputs
from services.hospital_node.models import initial_vector, layout, load_vector, size
from services.hospital_node.training import (
    Compute,
    Task,
    TrainResult,
    clipped_gradient_sum,
    discard_progress,
    open_device,
    prepare,
    train_round,
)
from tests.support.sites import small_site, small_study

TASK = Task(b"s" * 32, 1, b"m" * 32)
ONE_CORE = Compute(device="cpu", threads=1)


def fresh_keys() -> bytes:
    return secrets.token_bytes(32)


def counted_keys(start: int = 0) -> Callable[[], bytes]:
    """A reproducible stand-in for the operating system: 0, 1, 2, … as keys."""
    numbers = itertools.count(start)
    return lambda: next(numbers).to_bytes(32, "big")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("site")
    data = small_site(folder / "data", folder / "state")
    data.check_images()
    return data


def train(
    site: Dataset, progress: Path, study: Any, keys: Callable[[], bytes] = fresh_keys, **more: Any
) -> TrainResult:
    start = more.pop("start", initial_vector(study.model, 1))
    result = train_round(
        start, site, study, more.pop("task", TASK), progress=progress, keys=keys,
        should_stop=more.pop("should_stop", lambda: False), compute=ONE_CORE,
    )  # fmt: skip
    assert result is not None
    return result


def test_plain_training_learns(site: Dataset, tmp_path: Path) -> None:
    from services.hospital_node.evaluation import evaluate

    study = small_study("none", training={"learning_rate": 0.1, "momentum": 0.9, "local_steps": 30, "batch_size": 8})
    start = initial_vector(study.model, 1)
    result = train(site, tmp_path, study)
    assert result.steps == 30
    assert result.images_per_second > 0
    counts = evaluate((start + result.delta).astype(np.float32), site, "test", study, ONE_CORE)
    assert counts.totals.sum() == 4
    assert counts.hits.sum() == counts.totals.sum()


def test_the_speed_that_is_shown_does_not_tell_how_many_were_drawn(
    site: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """privacy.md §3: every pass counts the places of its fixed shape, filled or not."""
    passes: list[int] = []
    monkeypatch.setattr(gradients.metrics, "computed", lambda images, seconds: passes.append(images))
    study = small_study(training={"micro_batch": 4}, privacy={"sampling_rate": 0.5, "steps_per_round": 12})
    for key in range(3):
        train(site, tmp_path / str(key), study, counted_keys(100 * key))
    assert passes
    assert {images % (4 * study.training.augmentations) for images in passes} == {0}


def test_p8_library_generators_decide_nothing(site: Dataset, tmp_path: Path) -> None:
    """P-8: seeds of torch and numpy change nothing when the keys are equal; without equal keys every run differs."""
    study = small_study()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        results.append(train(site, tmp_path / str(seed), study, counted_keys()).delta)
    assert np.array_equal(*results)
    torch.manual_seed(1)
    np.random.seed(1)
    fresh = [train(site, tmp_path / f"fresh{i}", study).delta for i in range(2)]
    assert not np.allclose(*fresh)
    assert not np.allclose(fresh[0], results[0])


def test_p8_training_leaves_the_library_generators_alone(site: Dataset, tmp_path: Path) -> None:
    """P-8: nothing is drawn from them either."""
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for mechanism in ("local", "none"):
        train(site, tmp_path / mechanism, small_study(mechanism))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_draw_has_a_key_of_its_own(site: Dataset, tmp_path: Path) -> None:
    """Sample, choice of image, turns and noise of each step: four fresh keys a step, none used twice."""
    taken: list[bytes] = []

    def keys() -> bytes:
        taken.append(fresh_keys())
        return taken[-1]

    train(site, tmp_path, small_study(privacy={"sampling_rate": 0.9}), keys)
    assert len(taken) == 4 * 4
    assert len(set(taken)) == len(taken)


def test_an_empty_batch_still_takes_a_noisy_step(site: Dataset, tmp_path: Path) -> None:
    """privacy.md §3: nobody sampled, noise all the same, divided by the same constant."""
    study = small_study(
        privacy={"sampling_rate": 1e-9, "steps_per_round": 1, "expected_batch": 4.0, "noise_multiplier": 2.0},
        training={"learning_rate": 1.0},
    )
    delta = train(site, tmp_path, study).delta
    expected = 2.0 * (sensitivity_rint(18, 1.0, delta.size) / 2**18) / 4.0
    assert delta.std() == pytest.approx(expected, rel=6 / np.sqrt(2 * delta.size))
    assert abs(delta.mean()) < 6 * expected / np.sqrt(delta.size)


def test_noise_lies_on_the_integer_grid_of_the_study(site: Dataset, tmp_path: Path) -> None:
    """privacy.md §3: scale, rint, then noise: every coordinate of one step is an integer over 2**scale_bits."""
    study = small_study(privacy={"steps_per_round": 1, "expected_batch": 1.0}, training={"learning_rate": 1.0})
    delta = train(site, tmp_path, study, start=np.zeros_like(initial_vector(study.model, 0))).delta
    grid = delta * 2.0**18
    assert np.array_equal(grid, np.rint(grid))


def reference_gradient(site: Dataset, study: Any, vector: np.ndarray) -> np.ndarray:
    """Σ over patients of the clipped mean over its images, one backward pass an image, without hooks."""
    module = build(study.model)
    load_vector(module, vector)
    inputs = PixelInputs(site, torch.device("cpu"))
    parameters = [p for _, p in sorted(module.named_parameters())]
    total = np.zeros(vector.size)
    for images in site.fold("train").images:
        rows = []
        for image in images:
            scores = module(inputs.batch(np.array([image])))
            loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(site.labels[[image]]))
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double().numpy())
        mean = np.mean(rows, axis=0)
        total += mean * min(1.0, study.privacy.clip / np.linalg.norm(mean))
    return total


def test_full_batch_is_the_clipped_sum_of_patient_means(
    site: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q = 1: all images of a patient are averaged before the clip; against plain autograd, image by image."""
    monkeypatch.setattr(gradients, "choose_one", lambda key, counts: np.zeros(len(counts), np.int64))  # turn 0
    study = small_study(
        privacy={"sampling_rate": 1.0, "steps_per_round": 1, "noise_multiplier": 0.0004, "expected_batch": 16.0,
                 "clip": 0.05, "scale_bits": 24},
        training={"learning_rate": 1.0, "micro_batch": 3},
    )  # fmt: skip
    start = (initial_vector(study.model, 1) + 0.02).astype(np.float32)
    delta = train(site, tmp_path, study, start=start).delta
    wanted = -reference_gradient(site, study, start) / 16.0
    assert np.linalg.norm(delta - wanted) < 0.02 * np.linalg.norm(wanted)


def test_momentum_and_decay_follow_the_formula(site: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """v ← 0.5 v + g + 0.1 w; w ← w − 0.2 v, with g = 1, three steps by hand."""
    from services.hospital_node import training

    study = small_study(training={"learning_rate": 0.2, "momentum": 0.5, "weight_decay": 0.1})
    count = size(layout(build(study.model)))
    monkeypatch.setattr(training, "gradients", lambda *_: (lambda: (np.ones(count), 1), 3))
    delta = train(site, tmp_path, study, start=np.ones(count, np.float32)).delta
    w1 = 1 - 0.2 * 1.1
    v2 = 0.5 * 1.1 + 1 + 0.1 * w1
    w2 = w1 - 0.2 * v2
    w3 = w2 - 0.2 * (0.5 * v2 + 1 + 0.1 * w2)
    assert np.allclose(delta, w3 - 1, atol=1e-12)


def test_stopped_between_steps_and_resumed(site: Dataset, tmp_path: Path) -> None:
    """P-10 and L-1: the steps that are done stay done; what follows is drawn anew."""
    study = small_study()
    asked = itertools.count()
    stopped = train_round(
        initial_vector(study.model, 1), site, study, TASK,
        progress=tmp_path, keys=fresh_keys, should_stop=lambda: next(asked) == 2, compute=ONE_CORE,
    )  # fmt: skip
    assert stopped is None
    first = train(site, tmp_path, study)
    assert first.steps == 2
    again = train(site, tmp_path, study)
    assert again.steps == 0
    assert np.array_equal(again.delta, first.delta)  # trained once: the same vector whenever it is asked for
    other = train(site, tmp_path, study, task=Task(TASK.study_digest, 2, TASK.model_digest))
    assert other.steps == 4  # another round is another vector
    discard_progress(tmp_path)
    discard_progress(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_counts_as_none(site: Dataset, tmp_path: Path) -> None:
    study = small_study()
    train(site, tmp_path, study)
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert train(site, tmp_path, study).steps == 4


KILLED = """
import os, signal, sys, secrets
from pathlib import Path
sys.path.insert(0, ".")
from services.hospital_node import training
from services.hospital_node.dataset import load_dataset
from services.hospital_node.models import initial_vector
from tests.support.sites import CLASSES, SIZE, small_study
folder, step, late = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "late"
study = small_study()
site = load_dataset(folder / "data", CLASSES, SIZE, folder / "state")
whole = training.replace_file
saved = 0
def replace_file(path, parts):
    global saved
    if path.name == "training.safetensors":
        saved += 1
        if saved == step and not late:
            path.parent.mkdir(exist_ok=True)
            path.with_name(path.name + ".new").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    whole(path, parts)
    if path.name == "training.safetensors" and saved == step:
        os.kill(os.getpid(), signal.SIGKILL)
training.replace_file = replace_file
training.train_round(initial_vector(study.model, 1), site, study, training.Task(b"s" * 32, 1, b"m" * 32),
    progress=folder / "progress", keys=lambda: secrets.token_bytes(32), should_stop=lambda: False,
    compute=training.Compute(threads=1))
"""


@pytest.mark.parametrize(("step", "moment", "kept"), [(1, "early", 0), (2, "early", 1), (3, "late", 3), (4, "late", 4)])
def test_killed_at_a_checkpoint_and_resumed(tmp_path: Path, step: int, moment: str, kept: int) -> None:
    site = small_site(tmp_path / "data", tmp_path / "state", patients=12)
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(step), moment],
        check=False, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    assert train(site, tmp_path / "progress", small_study()).steps == 4 - kept


def test_a_diverged_training_is_a_failed_one(site: Dataset, tmp_path: Path) -> None:
    study = small_study("none", training={"learning_rate": 1e300, "local_steps": 5})
    with pytest.raises(ServiceError) as refused:
        train(site, tmp_path, study)
    assert refused.value.reason is Reason.NOT_FINITE


def test_under_shared_a_hospital_takes_no_steps_of_its_own(site: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="no steps of its own"):
        train(site, tmp_path, small_study("shared"))


def test_shared_gives_the_sum_of_clipped_patient_means_without_noise(
    site: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """privacy.md §2: one global step; the hospital's part is its exact sum; release.py scales, rounds and noises it."""
    monkeypatch.setattr(gradients, "choose_one", lambda key, counts: np.zeros(len(counts), np.int64))  # turn 0
    study = small_study("shared", privacy={"sampling_rate": 1.0, "clip": 0.05}, training={"micro_batch": 3})
    start = (initial_vector(study.model, 1) + 0.02).astype(np.float32)
    found = clipped_gradient_sum(start, site, study, keys=fresh_keys, compute=ONE_CORE)
    wanted = reference_gradient(site, study, start)
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_shared_of_an_empty_batch_is_zeros(site: Dataset) -> None:
    """Its noise is added like everybody's (test_release): nobody sees that nobody was sampled."""
    study = small_study("shared", privacy={"sampling_rate": 1e-9})
    assert not clipped_gradient_sum(
        initial_vector(study.model, 1), site, study, keys=fresh_keys, compute=ONE_CORE
    ).any()


def test_class_weights_act_before_the_clip(site: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beyond the clip change directions, never the bound: each patient moves the sum by at most C."""
    monkeypatch.setattr(gradients, "choose_one", lambda key, counts: np.zeros(len(counts), np.int64))
    start = (initial_vector(small_study().model, 1) + 0.02).astype(np.float32)

    def total(weights: tuple[float, ...], clip: float) -> np.ndarray:
        study = small_study("shared", privacy={"sampling_rate": 1.0, "clip": clip}, training={"class_weights": weights})
        return clipped_gradient_sum(start, site, study, keys=fresh_keys, compute=ONE_CORE)

    dark, light, both = total((1.0, 1e-9), 1e3), total((1e-9, 1.0), 1e3), total((2.0, 3.0), 1e3)
    assert np.linalg.norm(both - (2 * dark + 3 * light)) < 1e-3 * np.linalg.norm(both)
    assert np.linalg.norm(total((1e6, 1e6), 0.05)) <= 0.05 * len(site.fold("train"))


def test_no_gpu_is_said(site: Dataset) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ServiceError, match="no GPU here"):
        open_device(Compute(device="cuda"))
    assert open_device(Compute()).type == "cpu"


def test_logit_adjustment_pays_the_rare_class_back() -> None:
    """Equal scores, public shares 0.9 and 0.1: the adjusted loss equals cross-entropy against the shares."""
    adjusted = gradients._Adjusted(torch.nn.Identity(), (0.9, 0.1))
    scores = adjusted(torch.zeros(1, 2))
    assert torch.softmax(scores, 1)[0].tolist() == pytest.approx([0.9, 0.1])


def test_shuffle_is_an_order_and_uniform() -> None:
    first = [int(gradients.shuffled(fresh_keys(), 5)[0]) for _ in range(2000)]
    assert sorted(gradients.shuffled(fresh_keys(), 100)) == list(range(100))
    counts = np.bincount(first, minlength=5)
    assert np.all(np.abs(counts - 400) < 6 * np.sqrt(400 * 0.8))


def test_turns_are_the_eight_of_the_square(site: Dataset) -> None:
    inputs = PixelInputs(site, torch.device("cpu"))
    turned = inputs.batch(np.zeros(8, np.int64), np.arange(8))
    upright = inputs.batch(np.zeros(1, np.int64))
    assert torch.equal(turned[:1], upright)
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8
    assert torch.equal(turned[6].flip(2).rot90(-2, (1, 2)), upright[0])


def test_a_site_with_fewer_patients_than_published_is_told_at_its_own_check_and_nowhere_else(tmp_path: Path) -> None:
    """Bad input of a site, known before the study: later its absence would publish how many patients it has."""
    from services.cli.check import _dataset
    from services.common.documents.study import LoadedStudy

    small_site(tmp_path / "data", tmp_path / "state", patients=24)  # 16 of them train
    for published, warned in ((10, False), (16, False), (17, False), (18, True), (500, True)):
        study = small_study("shared", privacy={"patients": {"alice": published}})
        said = _dataset(tmp_path / "data", LoadedStudy(study, bytes(32), b""), "alice")
        assert ("fewer training patients" in said) is warned, published
        assert said.startswith("?") is warned
    assert not _dataset(tmp_path / "data", LoadedStudy(study, bytes(32), b""), "bob").startswith("?")


def test_prepare_decodes_everything_once(tmp_path: Path) -> None:
    data = small_site(tmp_path / "data", tmp_path / "state", patients=12)
    data.paths[3].write_bytes(b"broken")
    with pytest.raises(ServiceError) as refused:
        prepare(data, small_study(), ONE_CORE)
    assert refused.value.reason is Reason.INVALID_DATA
    assert str(data.paths[3]) in refused.value.detail
