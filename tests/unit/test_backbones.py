"""Frozen backbones: found by digest, the published network's numbers, and what a texture is."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from services.cli.drafts import suited_backbone, unwritten_model
from services.common.documents.study import BackboneSection
from services.common.errors import Reason, ServiceError
from services.hospital_node import backbones
from services.hospital_node.architectures import HEADS, build
from services.hospital_node.backbones import BACKBONES, EfficientNetLite0, load_backbone
from services.hospital_node.models import layout


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, str]:
    """Drawn weights in the published file's form, classifier included."""
    torch.manual_seed(0)
    state = EfficientNetLite0().state_dict() | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    path = tmp_path / "backbones" / "any-name.pth"
    path.parent.mkdir()
    torch.save(state, path)
    return path.parent, hashlib.sha256(path.read_bytes()).hexdigest()


def test_backbone_is_found_by_digest_and_frozen(weights: tuple[Path, str]) -> None:
    folder, digest = weights
    network = load_backbone(BackboneSection(name="efficientnet-lite0", sha256=digest), folder)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    images = torch.rand(3, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(images)[:1], network(images[:1]), rtol=1e-3, atol=1e-5)
        assert network(images).shape == (3, 1280)


@pytest.fixture
def published(tmp_path: Path) -> tuple[EfficientNetLite0, Path, str]:
    """The network as published, each BatchNorm with drawn statistics behind its convolution; its file and digest."""
    torch.manual_seed(3)
    network = EfficientNetLite0().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(torch.as_tensor(layer.running_mean), std=0.3)
            nn.init.uniform_(torch.as_tensor(layer.running_var), 0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "drawn.pth")
    return network, tmp_path, hashlib.sha256((tmp_path / "drawn.pth").read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [64, 75])
def test_folded_norms_change_no_feature(published: tuple[EfficientNetLite0, Path, str], size: int) -> None:
    whole, folder, digest = published
    network = load_backbone(BackboneSection(name="efficientnet-lite0", sha256=digest), folder)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in whole.modules()) == 49
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = network(images), whole(images)
    assert float(wanted.std()) > 0.1
    unit = functional.normalize(wanted, dim=1)
    torch.testing.assert_close(functional.normalize(found, dim=1), unit, rtol=0, atol=1e-5)


def test_texture_is_the_spread_of_the_last_stages_against_what_its_norms_expect(
    published: tuple[EfficientNetLite0, Path, str],
) -> None:
    """Computed again in float64 from the published network's own maps, caught on their way."""
    whole, folder, digest = published
    with torch.no_grad():
        whole._blocks[15]._bn2.weight[7] = 0.0  # type: ignore[union-attr,index,operator]  # a channel that is constant
    torch.save(whole.state_dict(), folder / "drawn.pth")
    digest = hashlib.sha256((folder / "drawn.pth").read_bytes()).hexdigest()
    ends = {4: [3, 4], 7: [5, 6, 7], 10: [8, 9, 10], 14: [11, 12, 13, 14], 15: [15]}
    maps: dict[int, np.ndarray] = {}
    for block in ends:
        whole._blocks[block].register_forward_hook(
            lambda _, __, out, block=block: maps.__setitem__(block, out.double().numpy())
        )
    images = torch.randn(3, 3, 75, 75, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole(images)
    wanted = []
    for end, blocks in ends.items():
        usual = np.sqrt(sum(whole.state_dict()[f"_blocks.{b}._bn2.weight"].double().numpy() ** 2 for b in blocks))
        spread = maps[end].std(axis=(2, 3))
        relative = np.divide(spread, usual, out=np.zeros_like(spread), where=usual > 0)
        relative -= relative.mean(axis=1, keepdims=True)
        wanted.append(relative / np.linalg.norm(relative, axis=1, keepdims=True))
    network = load_backbone(BackboneSection(name="efficientnet-lite0-texture", sha256=digest), folder)
    with torch.no_grad():
        found = network(images)
        torch.testing.assert_close(found[:1], network(images[:1]), rtol=0, atol=1e-5)
        flat = network(torch.zeros(2, 3, 32, 32))  # nothing to see, and a last map of one pixel
    assert BACKBONES["efficientnet-lite0-texture"].features == found.shape[1] == 744
    np.testing.assert_allclose(found.numpy(), np.concatenate(wanted, axis=1), rtol=0, atol=1e-5)
    assert flat.isfinite().all()


def test_backbone_with_other_bytes_is_refused(weights: tuple[Path, str]) -> None:
    folder, digest = weights
    with pytest.raises(ServiceError, match="put the study's weights file there") as refused:
        load_backbone(BackboneSection(name="efficientnet-lite0", sha256="1" * 64), folder)
    assert refused.value.reason is Reason.NOT_FOUND
    with pytest.raises(ServiceError, match="not installed here"):
        load_backbone(BackboneSection(name="magic", sha256=digest), folder)
    with pytest.raises(ServiceError, match="no file in the backbones folder None"):
        load_backbone(BackboneSection(name="efficientnet-lite0", sha256=digest), None)


class Trap:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/wardround-pickle-was-run",))


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"x": Trap()}, path)
    with pytest.raises(ServiceError, match="no plain tensors"):
        load_backbone(
            BackboneSection(name="efficientnet-lite0", sha256=hashlib.sha256(path.read_bytes()).hexdigest()), tmp_path
        )
    assert not Path("/tmp/wardround-pickle-was-run").exists()


def test_same_padding_is_tensorflows() -> None:
    """Even side, stride 2, kernel 3: one row and column of zeros, right and below."""
    conv = backbones._SameConv(1, 1, 3, 2, bias=False)
    nn.init.ones_(conv.weight)
    with torch.no_grad():
        out = conv(torch.ones(1, 1, 4, 4))
    assert out.tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


@pytest.mark.parametrize("architecture", HEADS)
def test_the_backbone_that_suits_a_head_is_installed(architecture: str) -> None:
    """What the demo drafts can be built, and its weights are those of the backbone's own width."""
    suited = suited_backbone(architecture, "0" * 64)
    shapes = dict(layout(build(unwritten_model(architecture, 64, ("a", "b", "c"), suited))))
    assert shapes["weight"] == (3, BACKBONES[suited.name].features)
