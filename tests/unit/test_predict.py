"""The model in use: predictions, exports that agree, and a passport that names exactly this model."""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from services.cli.__main__ import app
from services.cli.temperature import GRID, temperature
from services.common.documents.study import BackboneSection, ModelSection
from services.hospital_node.architectures import build
from services.hospital_node.backbones import BACKBONES, EfficientNetLite0
from services.hospital_node.inference import export_onnx, export_torchscript, open_classifier, probabilities
from services.hospital_node.models import layout, size, write_model_file
from tests.support.pictures import encoded, texture

CLASSES = ("bcc", "mel", "nv")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small network of arbitrary weights with its passport, and two pictures."""
    section = ModelSection(architecture="small-cnn", image_size=28, classes=CLASSES, parameters=1, initial="")
    shapes = layout(build(section))
    vector = np.random.default_rng(3).normal(0, 0.3, size(shapes)).astype(np.float32)
    file = tmp_path / "model.safetensors"
    write_model_file(file, shapes, vector)
    write_passport(file, {})
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(texture(number)))
    return file


def write_passport(model: Path, more: dict[str, Any]) -> None:
    study = {"name": "lesions", "architecture": "small-cnn", "classes": CLASSES, "image_size": 28, "backbone": None,
             "parameters": 14_000, "synthetic_data": True}  # fmt: skip
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    content = {"study": study, "model": {"sha256": digest, "version": 4}, "calibration": {"temperature": 2.0}, **more}
    model.with_name("passport.json").write_text(json.dumps(content))


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_probabilities_sum_to_one_and_follow_the_temperature(model: Path) -> None:
    found = json.loads(run("predict", "--model", str(model), str(model.parent), "--format", "json").stdout)
    assert [Path(row["image"]).name for row in found["images"]] == ["0.png", "1.png"]
    assert "no medical device" in found["notice"]
    for row in found["images"]:
        assert sum(row[name] for name in CLASSES) == pytest.approx(1)
    write_passport(model, {"calibration": {"temperature": 1.0}})
    sharp = json.loads(run("predict", "--model", str(model), str(model.parent), "--format", "json").stdout)
    for soft, hard in zip(found["images"], sharp["images"], strict=True):
        scores, logits = (np.log([row[name] for name in CLASSES]) for row in (soft, hard))
        assert 2 * (scores - scores.mean()) == pytest.approx(logits - logits.mean(), abs=1e-4)


def test_a_table_and_csv_say_the_same(model: Path) -> None:
    table = run("predict", "--model", str(model), str(model.parent / "0.png"))
    assert "no medical device" in table.stdout
    assert "synthetic" in table.stdout
    rows = list(csv.DictReader(io.StringIO(
        run("predict", "--model", str(model), str(model.parent / "0.png"), "--format", "csv").stdout
    )))  # fmt: skip
    assert float(rows[0]["nv"]) == pytest.approx(1 - float(rows[0]["bcc"]) - float(rows[0]["mel"]), abs=1e-6)


def test_a_bad_picture_is_one_line_and_the_others_are_answered(model: Path) -> None:
    (model.parent / "bad.jpg").write_bytes(b"")
    told = run("predict", "--model", str(model), str(model.parent), "--format", "json")
    assert told.exit_code == 1
    assert sum("bad.jpg" in line for line in told.stderr.splitlines()) == 1
    assert len(json.loads(told.stdout)["images"]) == 2


def test_a_passport_of_another_model_is_refused(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    told = run("passport", str(model))
    assert told.exit_code != 0
    assert "another model" in str(told.exception)


@pytest.mark.slow
def test_onnx_and_torchscript_agree_with_torch(model: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime has no wheel for this Python")
    onnx, script = model.with_name("m.onnx"), model.with_name("m.pt")
    told = run("export", "--model", str(model), "--onnx", str(onnx), "--torchscript", str(script))
    assert told.exit_code == 0, told.output
    section = ModelSection(architecture="small-cnn", image_size=28, classes=CLASSES, parameters=1, initial="")
    pixels = np.random.default_rng(4).integers(0, 256, (5, 28, 28, 3), np.uint8)
    expected = probabilities(open_classifier(section, model, None, 2.0), pixels)
    assert expected.std() > 0.01  # the pictures are told apart at all
    session = onnxruntime.InferenceSession(onnx)
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    assert np.abs(session.run(None, {"image": images})[0] - expected).max() < 1e-4
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["passport"])["model"]["version"] == 4
    assert json.loads(facts["classes"]) == list(CLASSES)
    import torch

    extra = {"passport": ""}
    traced = torch.jit.load(script, _extra_files=extra)  # type: ignore[no-untyped-call]  # torch has no types here
    assert np.abs(traced(torch.from_numpy(images)).numpy() - expected).max() < 1e-4
    assert json.loads(extra["passport"])["model"]["version"] == 4
    again = run("export", "--model", str(model), "--onnx", str(onnx))
    assert "not overwritten" in str(again.exception)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_head_is_exported_with_backbone_centre_and_views(tmp_path: Path, name: str) -> None:
    """One network of mirrored views, features, centre and classes: ONNX and TorchScript say what torch says."""
    import torch

    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime has no wheel for this Python")
    torch.manual_seed(3)
    torch.save(EfficientNetLite0().state_dict(), tmp_path / "drawn.pth")
    digest = hashlib.sha256((tmp_path / "drawn.pth").read_bytes()).hexdigest()
    backbone = BackboneSection(name=name, sha256=digest, views=4)
    section = ModelSection(
        architecture="centred-head", image_size=64, classes=CLASSES, parameters=1, initial="", backbone=backbone
    )
    shapes = layout(build(section))
    drawn = np.random.default_rng(5).normal(size=size(shapes)).astype(np.float32)
    write_model_file(tmp_path / "m.safetensors", shapes, drawn)
    classifier = open_classifier(section, tmp_path / "m.safetensors", tmp_path, 2.0)
    pixels = np.random.default_rng(4).integers(0, 256, (3, 64, 64, 3), np.uint8)
    expected = probabilities(classifier, pixels)
    assert expected.std() > 0.01  # the pictures are told apart at all
    assert np.abs(probabilities(classifier, pixels[:, :, ::-1].copy()) - expected).max() < 1e-4  # a mirror image
    export_onnx(classifier, 64, tmp_path / "m.onnx", {})
    export_torchscript(classifier, 64, tmp_path / "m.pt", {})
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"image": images})[0]
    assert np.abs(found - expected).max() < 1e-4
    traced = torch.jit.load(tmp_path / "m.pt")  # type: ignore[no-untyped-call]  # torch has no types here
    assert np.abs(traced(torch.from_numpy(images)).numpy() - expected).max() < 1e-4


def histogram(true: float, patients: int = 40_000, bins: int = 20) -> np.ndarray:
    """One class whose scores are over-sure by the factor `true`: p is said where sigmoid(logit(p) / true) holds."""
    middle = (np.arange(bins) + 0.5) / bins
    holds = 1 / (1 + np.exp(-np.log(middle / (1 - middle)) / true))
    each = patients / bins
    return np.stack([each * (1 - holds), each * holds])[None]


@pytest.mark.parametrize("true", [0.5, 1.0, 1.8])
def test_the_temperature_is_found(true: float) -> None:
    found = temperature(histogram(true).ravel().tolist(), 1, 0.0)
    assert found == pytest.approx(true, rel=0.03)
    assert found in GRID


def test_noise_alone_moves_no_temperature() -> None:
    random = np.random.default_rng(1)
    moved = 0
    for _ in range(200):
        noisy = histogram(1.0, 200) + random.normal(0, 40, (1, 2, 20))
        moved += temperature(noisy.ravel().tolist(), 1, 40.0) != 1.0
    assert moved < 40  # the grid has 65 chances to look better than it is; a clear gain alone counts
