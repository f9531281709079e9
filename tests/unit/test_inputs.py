"""Features of a frozen backbone: computed once an image, kept at the site, never trusted blindly."""

import hashlib
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.common.documents.costs import training_noise
from services.common.documents.study import BackboneSection, Study
from services.common.dp.noise import discrete_gaussian, integer_sum
from services.common.errors import Reason, ServiceError
from services.hospital_node import inputs
from services.hospital_node.architectures import HEADS, build
from services.hospital_node.backbones import EfficientNetLite0, load_backbone
from services.hospital_node.dataset import Dataset
from services.hospital_node.evaluation import evaluate
from services.hospital_node.inputs import cached_features
from services.hospital_node.models import initial_vector, layout, read_model_file, write_model_file
from services.hospital_node.training import Compute, Task, clipped_gradient_sum, prepare, train_round
from tests.support.sites import SIZE, small_site, small_study

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), folder / "drawn.pth")
    return folder, hashlib.sha256((folder / "drawn.pth").read_bytes()).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Dataset:
    return small_site(tmp_path / "data", tmp_path / "state", patients=12)


def head_study(sha256: str, architecture: str = "linear-head", **changes: Any) -> Study:
    model = {"architecture": architecture, "backbone": {"name": "efficientnet-lite0", "sha256": sha256}}
    return small_study(model=model, **changes)


def test_each_image_is_computed_once(
    site: Dataset, backbones: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, digest = backbones
    section = head_study(digest).model.backbone
    assert section is not None
    first = cached_features(site, section, CPU, folder)
    assert first.shape == (len(site), 1280)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    loads: list[int] = []
    load = inputs.load_backbone
    monkeypatch.setattr(inputs, "load_backbone", lambda *args: loads.append(1) or load(*args))
    assert np.array_equal(cached_features(site, section, CPU, folder), first)
    assert not loads  # nor is the weights file needed any more
    other = cached_features(site, section.model_copy(update={"name": "efficientnet-lite0-texture"}), CPU, folder)
    assert other.shape == (len(site), 744)  # another view of the same weights file has its own place


@pytest.mark.parametrize(("views", "axes"), [(2, [3]), (4, [2]), (4, [3])])
def test_views_make_an_image_and_its_mirror_one(backbones: tuple[Path, str], views: int, axes: list[int]) -> None:
    folder, digest = backbones
    network = load_backbone(BackboneSection(name="efficientnet-lite0", sha256=digest), folder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, mirrored = (inputs.unit_features(network, x, views) for x in (images, torch.flip(images, axes)))
        single = [inputs.unit_features(network, x, 1) for x in (images, torch.flip(images, axes))]
    torch.testing.assert_close(found, mirrored, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert not torch.allclose(*single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("rate", [1.0, 0.6])
@pytest.mark.parametrize("mechanism", ["local", "shared"])
def test_the_heads_closed_form_is_taken_and_trains(
    site: Dataset, backbones: tuple[Path, str], tmp_path: Path, mechanism: str, rate: float, architecture: str
) -> None:
    """Features of a frozen backbone never go through per-sample gradients: any call of them would fail here."""
    folder, digest = backbones
    privacy = {"sampling_rate": rate, "noise_multiplier": 1e-3}
    study = head_study(digest, architecture, mechanism=mechanism, privacy=privacy)
    compute, start = Compute(threads=1, backbones=folder), initial_vector(study.model, 1)
    opened = prepare(site, study, compute)
    total = clipped_gradient_sum(
        start, site, study, keys=lambda: secrets.token_bytes(32), compute=compute, inputs=opened
    )
    assert total.shape == (start.size,)
    assert 0 < np.linalg.norm(total) <= len(site.fold("train"))
    shapes, stepped = layout(build(study.model)), (start - 0.1 * total).astype(np.float32)
    digest_of_file = write_model_file(tmp_path / "v1.safetensors", shapes, stepped)
    assert digest_of_file == hashlib.sha256((tmp_path / "v1.safetensors").read_bytes()).digest()
    assert np.array_equal(read_model_file(tmp_path / "v1.safetensors", shapes), stepped)
    if mechanism == "local":
        result = train_round(
            start, site, study, Task(bytes(32), 1, bytes(32)), progress=tmp_path, keys=lambda: secrets.token_bytes(32),
            should_stop=lambda: False, compute=compute, inputs=opened,
        )  # fmt: skip
        assert result is not None
        assert np.abs(result.delta).max() > 0


@pytest.mark.parametrize("architecture", HEADS)
def test_nobody_outside_can_tell_a_gradient_that_is_not_finite(
    backbones: tuple[Path, str], tmp_path: Path, architecture: str
) -> None:
    """privacy.md §3: byte for byte what the site would send without that patient; no metric says more."""
    from prometheus_client import REGISTRY, generate_latest

    folder, digest = backbones
    privacy = {"sampling_rate": 1.0, "patients": {"alice": 10}}
    study = head_study(digest, architecture, mechanism="shared", privacy=privacy)
    compute, start = Compute(threads=1, backbones=folder), initial_vector(study.model, 1)
    noise = training_noise(study)
    sent, shown = [], []
    for name in ("whole", "spoiled", "without"):
        data = small_site(tmp_path / name / "data", tmp_path / name / "state", patients=24)
        section, fold = study.model.backbone, data.fold("train")
        assert section is not None
        cached_features(data, section, CPU, folder)
        if name == "spoiled":
            for image in fold.images[3]:
                inputs.write_feature(inputs.feature_cache(data, section)[image], np.full(1280, np.nan, "<f4").tobytes())
        if name == "without":
            kept = [number for number in range(len(fold)) if number != 3]
            data.folds["train"] = replace(fold, images=tuple(fold.images[i] for i in kept), labels=fold.labels[kept])
        total = clipped_gradient_sum(start, data, study, keys=lambda: bytes(32), compute=compute)
        lanes = integer_sum(total, study.privacy.scale_bits, noise.room((2**31 - 1) // 4))
        sent.append((lanes + discrete_gaussian(noise.scale).draw(bytes(32), lanes.size)).tobytes())
        lines = generate_latest(REGISTRY).decode().splitlines()
        shown.append([line for line in lines if not line.startswith(("wardround_training", "process_", "python_"))])
    assert sent[1] == sent[2] != sent[0]
    assert shown[1] == shown[2]


def test_a_damaged_or_foreign_feature_is_computed_again(site: Dataset, backbones: tuple[Path, str]) -> None:
    folder, digest = backbones
    section = head_study(digest).model.backbone
    assert section is not None
    first = cached_features(site, section, CPU, folder)
    cache = site.state / "features" / f"efficientnet-lite0-{digest}-{SIZE}-1"
    files = sorted(cache.glob("*.f32"))
    assert len(files) == len(site)
    files[0].write_bytes(bytes(4 * 1280 + 32))
    files[1].write_bytes(files[2].read_bytes()[:-1])
    site.paths[0].write_bytes(site.paths[1].read_bytes())  # the image changed: its old feature is not its own
    again = cached_features(site, section, CPU, folder)
    assert np.allclose(again[2:], first[2:], atol=1e-5)
    assert np.allclose(again[0], first[1], atol=1e-5)


def test_the_head_trains_and_is_judged_on_features(site: Dataset, backbones: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = backbones
    study = head_study(digest, privacy={"sampling_rate": 1.0})
    compute = Compute(threads=1, backbones=folder)
    prepare(site, study, compute)
    start = initial_vector(study.model, 0)
    result = train_round(
        start, site, study, Task(bytes(32), 1, bytes(32)), progress=tmp_path / "progress",
        keys=lambda: np.random.default_rng().bytes(32), should_stop=lambda: False, compute=compute,
    )  # fmt: skip
    assert result is not None
    assert result.delta.shape == (2 * 1280 + 2,)
    assert evaluate(start, site, "test", study, compute).totals.sum() == len(site.fold("test"))


def test_features_cannot_be_turned(site: Dataset, backbones: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = backbones
    study = head_study(digest, training={"augmentations": 2})
    with pytest.raises(ServiceError, match="augmentations to 1") as refused:
        train_round(
            initial_vector(study.model, 0), site, study, Task(bytes(32), 1, bytes(32)), progress=tmp_path,
            keys=lambda: bytes(32), should_stop=lambda: False, compute=Compute(threads=1, backbones=folder),
        )  # fmt: skip
    assert refused.value.reason is Reason.INVALID_DOCUMENT


def test_a_bad_image_is_found_while_features_are_prepared(site: Dataset, backbones: tuple[Path, str]) -> None:
    folder, digest = backbones
    site.paths[2].write_bytes(b"broken")
    with pytest.raises(ServiceError) as refused:
        prepare(site, head_study(digest), Compute(threads=1, backbones=folder))
    assert refused.value.reason is Reason.INVALID_DATA
    assert str(site.paths[2]) in refused.value.detail
