"""The registry, the flat vector and the model file."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from services.cli.__main__ import main
from services.common.documents.study import BackboneSection, ModelSection
from services.common.dp.clip import Clip
from services.common.errors import Reason, ServiceError
from services.hospital_node.architectures import (
    CENTRE_STEP,
    HEADS,
    REGISTRY,
    CentredHead,
    build,
    import_torchvision,
    stored_name,
)
from services.hospital_node.clipping import clipped_sum
from services.hospital_node.models import (
    converted_vector,
    initial_vector,
    layout,
    load_vector,
    read_model_file,
    size,
    trainable_vector,
    write_model_file,
)

CLASSES = ("a", "b", "c")


def section(architecture: str, image_size: int = 28, **more: Any) -> ModelSection:
    return ModelSection(
        architecture=architecture, image_size=image_size, classes=CLASSES, parameters=1, initial="", **more
    )


LINEAR = section("linear-head", 64, backbone=BackboneSection(name="efficientnet-lite0", sha256="0" * 64))


@pytest.mark.parametrize("image_size", [12, 28, 64])
def test_small_cnn_is_small_and_takes_every_size(image_size: int) -> None:
    model = section("small-cnn", image_size)
    module = build(model)
    assert 10_000 <= trainable_vector(module).size <= 60_000
    scores = module(torch.zeros(2, 3, image_size, image_size))
    assert scores.shape == (2, 3)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("model", [section("small-cnn"), section("resnet18-gn", 32)])
def test_no_module_looks_across_patients(model: ModelSection) -> None:
    """privacy.md §5: no BatchNorm, and one image's scores do not depend on its neighbours, not even in train mode."""
    module = build(model).train()
    load_vector(module, initial_vector(model, 3) + 0.01)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, model.image_size, model.image_size, generator=generator)
    with torch.no_grad():
        together, alone = module(images), module(images[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_resnet_survives_gradient_hooks() -> None:
    """The residual add is out of place (pytorch#61519); the clipped sum of one patient has at most norm C."""
    model = section("resnet18-gn", 32)
    module = build(model)
    load_vector(module, initial_vector(model, 1))
    images = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    total = clipped_sum(module, images, torch.tensor([0, 1]), Clip(0.5), 2)
    assert total.shape == (size(layout(module)),)
    assert 0 < np.linalg.norm(total) <= 1.0


def named(quick: set[str]) -> list[Any]:
    """Every architecture with weights of its own; the large ones take their time."""
    names = sorted(set(REGISTRY) - set(HEADS))
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", named({"small-cnn", "resnet18-gn", "mobilenet-v3-small-gn"}))
def test_every_architecture_takes_a_private_step_and_comes_back_by_digest(name: str, tmp_path: Path) -> None:
    """One clipped sum of two patients, one step, one file; nothing looks across patients, nothing is drawn."""
    model = section(name, 32)
    module = build(model).train()
    start = initial_vector(model, 1)
    load_vector(module, start)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    images = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together, alone = module(images.flatten(0, 1)), module(images[0])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-5)
    total = clipped_sum(module, images, torch.tensor([0, 1]), Clip(0.5), 2)
    assert 0 < np.linalg.norm(total) <= 1.0
    stepped = (start - 0.1 * total).astype(np.float32)
    shapes = layout(module)
    digest = write_model_file(tmp_path / "v1.safetensors", shapes, stepped)
    assert digest == hashlib.sha256((tmp_path / "v1.safetensors").read_bytes()).digest()
    load_vector(module, read_model_file(tmp_path / "v1.safetensors", shapes))
    assert np.array_equal(trainable_vector(module), stepped)


@pytest.mark.parametrize("name", named({"mobilenet-v3-small-gn"}))
def test_every_layer_learns_within_a_few_steps(name: str) -> None:
    """A first vector that leaves a layer without a gradient for ever would be a dead model."""
    model = section(name, 32)
    module = build(model).train()
    load_vector(module, initial_vector(model, 2))
    images, labels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2] * 2)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    moved = {own: False for own, _ in layout(module)}
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        for own, parameter in module.named_parameters():
            moved[own] |= bool(parameter.grad is not None and parameter.grad.abs().max() > 0)
        optimiser.step()
    assert [own for own, alive in moved.items() if not alive] == []


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("mobilenet-v3-small-gn", "mobilenet_v3_small"),
        pytest.param("resnet18-gn", "resnet18", marks=pytest.mark.slow),
        pytest.param("convnext-tiny", "convnext_tiny", marks=pytest.mark.slow),
    ],
)
def test_torchvision_weights_are_converted_tensor_by_tensor(name: str, maker: str, tmp_path: Path) -> None:
    public = getattr(import_torchvision().models, maker)(weights=None, num_classes=10).state_dict()
    torch.save(public, tmp_path / "public.pth")
    model = section(name, 32)
    vector, left = converted_vector(model, tmp_path / "public.pth", 1)
    module = build(model)
    load_vector(module, vector)
    for own, parameter in module.named_parameters():
        if own in left:
            assert parameter.abs().max() == 0  # the classifier begins at nothing
        else:
            assert torch.equal(parameter.detach().flatten(), public[stored_name(own)].flatten()), own
    assert len(left) == 2


@pytest.mark.slow
def test_convnext_converted_computes_what_torchvision_does(tmp_path: Path) -> None:
    """It has no BatchNorm, so with the same classes the scores agree."""
    public = import_torchvision().models.convnext_tiny(weights=None, num_classes=3).eval()
    torch.save(public.state_dict(), tmp_path / "public.pth")
    model = section("convnext-tiny", 32)
    vector, left = converted_vector(model, tmp_path / "public.pth", 1)
    assert left == []
    module = build(model)
    load_vector(module, vector)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(module(images), public(images), rtol=1e-4, atol=1e-5)


def test_the_command_converts_and_says_so_to_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = import_torchvision().models.mobilenet_v3_small(weights=None, num_classes=10).state_dict()
    torch.save(public, tmp_path / "public.pth")
    words = ["model", "convert", str(tmp_path / "public.pth"), "--architecture", "mobilenet-v3-small-gn"]
    words += ["--classes", "a,b,c", "--image-size", "32", "--out", str(tmp_path / "v0.safetensors"), "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["initial"] == hashlib.sha256((tmp_path / "v0.safetensors").read_bytes()).hexdigest()
    assert said["parameters"] == size(layout(build(section("mobilenet-v3-small-gn", 32))))
    assert len(said["not_from_file"]) == 2


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save(import_torchvision().models.squeezenet1_1(weights=None).state_dict(), tmp_path / "public.pth")
    with pytest.raises(ServiceError, match="give its own file"):
        converted_vector(section("mobilenet-v3-small-gn", 64), tmp_path / "public.pth", 1)


def test_a_head_trains_the_head_alone() -> None:
    assert layout(build(LINEAR)) == (("bias", (3,)), ("weight", (3, 1280)))
    centred = build(LINEAR.model_copy(update={"architecture": "centred-head"}))
    assert layout(centred) == (("bias", (3,)), ("centre", (1280,)), ("weight", (3, 1280)))
    assert not initial_vector(LINEAR.model_copy(update={"architecture": "centred-head"}), 1).any()


def test_a_centred_head_scores_a_direction_from_its_centre() -> None:
    """Near or far from the centre, one direction has one score; the centre itself has the bias."""
    module = build(LINEAR.model_copy(update={"architecture": "centred-head"}))
    drawn = np.random.default_rng(4)
    load_vector(module, drawn.normal(size=size(layout(module))))
    assert isinstance(module, CentredHead)
    point = module.centre.detach() * CENTRE_STEP
    away = torch.nn.functional.normalize(torch.from_numpy(drawn.normal(size=(1, 1280))).float())
    near, far = (module(point + distance * away) for distance in (0.1, 20.0))
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(far, module.bias + 3 * away @ module.weight.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(module(point[None]), module.bias[None], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        section("vit"),
        section("small-cnn", 8),
        section("linear-head"),
        section("linear-head", backbone=BackboneSection(name="magic", sha256="0" * 64)),
        section("small-cnn", backbone=BackboneSection(name="efficientnet-lite0", sha256="0" * 64)),
    ],
)
def test_what_is_not_in_the_registry_is_refused(model: ModelSection) -> None:
    with pytest.raises(ServiceError) as refused:
        build(model)
    assert refused.value.reason is Reason.INVALID_DOCUMENT


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = initial_vector(section("small-cnn"), 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(first, initial_vector(section("small-cnn"), 5))
    assert not np.array_equal(first, initial_vector(section("small-cnn"), 6))


def test_vector_goes_in_and_comes_out() -> None:
    module = build(section("small-cnn"))
    vector = np.arange(size(layout(module)), dtype=np.float32)
    load_vector(module, vector.astype(np.float64))
    assert np.array_equal(trainable_vector(module), vector)
    names = [name for name, _ in layout(module)]
    assert names == sorted(names)
    with pytest.raises(ServiceError, match="this architecture"):
        load_vector(module, vector[1:])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5))
def test_model_file_is_what_the_safetensors_library_reads(shapes: list[tuple[int, ...]]) -> None:
    import tempfile

    named = tuple((f"layer.{i}", shape) for i, shape in enumerate(shapes))
    vector = np.random.default_rng(1).normal(size=size(named)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v0.safetensors"
        digest = write_model_file(path, named, vector)
        blob = path.read_bytes()
        assert digest == hashlib.sha256(blob).digest()
        assert np.array_equal(read_model_file(path, named), vector)
        read = safetensors.numpy.load(blob)
    assert [(name, read[name].shape) for name in sorted(read)] == list(named)
    assert np.array_equal(np.concatenate([read[name].ravel() for name, _ in named]), vector)
    start = 8 + int.from_bytes(blob[:8], "little")
    assert blob[start:] == vector.tobytes()  # the seam: the data section IS the flat vector


@pytest.mark.parametrize("damage", ["short", "long", "header", "other", "empty"])
def test_a_model_file_that_differs_is_refused(tmp_path: Path, damage: str) -> None:
    named = (("a", (2, 3)), ("b", (2,)))
    path = tmp_path / "m.safetensors"
    write_model_file(path, named, np.ones(8, np.float32))
    blob = path.read_bytes()
    wanted = (("a", (3, 2)), ("b", (2,))) if damage == "other" else named
    path.write_bytes(
        {"short": blob[:-4], "long": blob + b"0", "header": blob[:8] + b"}" + blob[9:], "empty": b""}.get(damage, blob)
    )
    with pytest.raises(ServiceError) as refused:
        read_model_file(path, wanted)
    assert refused.value.reason is Reason.INVALID_DATA


def test_torchvision_comes_up_in_a_fresh_process() -> None:
    """privacy.md §9: on a CPU-only torch a bare `import torchvision` fails."""
    code = (
        "from services.hospital_node.architectures import import_torchvision as t; t(); t(); import torchvision.models"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], env=os.environ)


def test_header_is_padded_like_the_librarys_own(tmp_path: Path) -> None:
    named = (("a", (2,)),)
    write_model_file(tmp_path / "m", named, np.zeros(2, np.float32))
    length = int.from_bytes((tmp_path / "m").read_bytes()[:8], "little")
    assert length % 8 == 0
    assert json.loads((tmp_path / "m").read_bytes()[8 : 8 + length]) == {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    }
