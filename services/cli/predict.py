"""`wardround predict | export | passport`: the model that came out, in use. Never a medical device."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from services.cli.data_check import pictures_in
from services.cli.drafts import torch_side
from services.cli.files import refuse_existing
from services.cli.passport import markdown
from services.common.documents.study import BackboneSection, ModelSection
from services.common.errors import Reason, ServiceError

NO_DEVICE = "This is no medical device. A probability is no diagnosis."
_BATCH = 32

Model = Annotated[Path, typer.Option("--model", help="model.safetensors; its passport.json lies beside it")]
Backbones = Annotated[Path | None, typer.Option(help="folder with the frozen backbone's weights, for the two heads")]


def predict(
    images: Annotated[list[Path], typer.Argument(help="pictures, or a folder of them: JPEG or PNG")],
    model: Model,
    backbones: Backbones = None,
    form: Annotated[str, typer.Option("--format", help="table, csv or json")] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="the same as --format json")] = False,
) -> None:
    """What the model says of pictures: a probability for each class, scaled by the passport's temperature.

    Example: wardround predict --model build/demo/model.safetensors lesion.jpg
    """
    form = "json" if as_json else form
    if form not in ("table", "csv", "json"):
        raise ServiceError(Reason.INVALID_DOCUMENT, f"--format {form!r} is unknown: choose table, csv or json")
    content = read_passport(model)
    section, scale = section_of(content), temperature_of(content)
    classifier = _classifier(section, model, backbones, scale)
    rows, refused = [], 0
    for path, shares in _predicted(classifier, section, list(_files(images))):
        if isinstance(shares, ServiceError):
            refused += 1
            print(f"wardround: {shares.detail}", file=sys.stderr)
        else:
            rows.append({"image": str(path), **dict(zip(section.classes, shares, strict=True))})
    _print(rows, section.classes, form, content, scale)
    if refused:
        raise typer.Exit(1)


def export(
    model: Model,
    onnx: Annotated[Path | None, typer.Option(help="write ONNX, preprocessing inside; not overwritten")] = None,
    torchscript: Annotated[Path | None, typer.Option(help="write TorchScript, preprocessing inside")] = None,
    backbones: Backbones = None,
) -> None:
    """The model for other programs: pixels of 0 to 255 in, probabilities out, the passport in its metadata.

    Example: wardround export --model build/demo/model.safetensors --onnx lesions.onnx
    """
    wanted = [path for path in (onnx, torchscript) if path is not None]
    if not wanted:
        raise ServiceError(Reason.INVALID_DOCUMENT, "nothing to write: give --onnx FILE or --torchscript FILE")
    refuse_existing(wanted)
    content = read_passport(model)
    section, scale = section_of(content), temperature_of(content)
    classifier = _classifier(section, model, backbones, scale)
    from services.hospital_node import inference

    facts = {
        "passport": json.dumps(content, ensure_ascii=False, sort_keys=True),
        "classes": json.dumps(section.classes),
        "input": f"float32 RGB 0 to 255, (n, 3, {section.image_size}, {section.image_size}), squeezed to a square",
        "temperature": repr(scale),
        "notice": NO_DEVICE,
    }
    if onnx is not None:
        inference.export_onnx(classifier, section.image_size, onnx, facts)
    if torchscript is not None:
        inference.export_torchscript(classifier, section.image_size, torchscript, facts)
    for path in wanted:
        Console(highlight=False, soft_wrap=True).print(f"wrote {path}; the passport is in its metadata. {NO_DEVICE}")


def passport(
    model: Annotated[Path, typer.Argument(help="model.safetensors, with passport.json beside it")],
    as_json: Annotated[bool, typer.Option("--json", help="for a program")] = False,
) -> None:
    """Where a model comes from: study, lineage, ε by site, cohorts, released figures.

    Example: wardround passport build/demo/model.safetensors
    """
    content = read_passport(model)
    print(json.dumps(content, indent=2, ensure_ascii=False) if as_json else markdown(content))


def read_passport(model: Path) -> dict[str, Any]:
    """passport.json beside the model, which must name exactly this file. Raises NOT_FOUND, BAD_DIGEST, MALFORMED."""
    beside = model.with_name("passport.json")
    try:
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        content: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        stated = content["model"]["sha256"]
    except OSError as error:
        raise ServiceError(
            Reason.NOT_FOUND, f"{error.filename} cannot be read ({error.strerror}): a run writes both side by side"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ServiceError(Reason.MALFORMED, f"{beside} is no passport: take the run's own") from None
    if stated != digest:
        raise ServiceError(
            Reason.BAD_DIGEST, f"{beside} is the passport of another model ({stated[:12]}…): take the run's own pair"
        )
    return content


def section_of(content: dict[str, Any]) -> ModelSection:
    """What a passport says of the architecture. Raises MALFORMED for one of an older version."""
    study = content["study"]
    try:
        backbone = study["backbone"]
        return ModelSection(
            architecture=study["architecture"],
            image_size=study["image_size"],
            classes=tuple(study["classes"]),
            parameters=study["parameters"],
            initial="0" * 64,
            backbone=None if backbone is None else BackboneSection(**backbone),
        )
    except (KeyError, TypeError):
        raise ServiceError(
            Reason.MALFORMED, "this passport does not say how large an image is: write it again with this version"
        ) from None


def temperature_of(content: dict[str, Any]) -> float:
    """The passport's temperature; 1 where the released counts gave none."""
    return float(content.get("calibration", {}).get("temperature") or 1.0)


def _classifier(section: ModelSection, model: Path, backbones: Path | None, scale: float) -> Any:
    torch_side()
    from services.hospital_node import inference

    return inference.open_classifier(section, model, backbones or model.parent / "backbones", scale)


def _files(given: list[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            yield from (path / name for name in pictures_in(path))
        else:
            yield path


def _predicted(
    classifier: Any, section: ModelSection, files: list[Path]
) -> Iterator[tuple[Path, "list[float] | ServiceError"]]:
    import numpy as np

    from services.hospital_node.dataset import decode_image
    from services.hospital_node.inference import probabilities

    for start in range(0, len(files), _BATCH):
        good, pixels = [], []
        for path in files[start : start + _BATCH]:
            try:
                pixels.append(decode_image(path, section.image_size))
                good.append(path)
            except ServiceError as error:
                yield path, ServiceError(error.reason, error.detail.split(":")[0] + ": it is left out")
        if good:
            yield from zip(good, probabilities(classifier, np.stack(pixels)).tolist(), strict=True)


def _print(
    rows: list[dict[str, Any]], classes: tuple[str, ...], form: str, content: dict[str, Any], scale: float
) -> None:
    if form == "json":
        print(json.dumps({"notice": NO_DEVICE, "temperature": scale, "images": rows}, indent=2))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, ["image", *classes], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        print(f"wardround: {NO_DEVICE}", file=sys.stderr)
    else:
        table = Table(title=f"{content['study']['name']} v{content['model']['version']}, temperature {scale:g}")
        table.add_column("image")
        for name in classes:
            table.add_column(name, justify="right")
        for row in rows:
            best = max(classes, key=lambda name: row[name])
            table.add_row(
                row["image"], *(f"[bold]{row[c]:.3f}[/bold]" if c == best else f"{row[c]:.3f}" for c in classes)
            )
        console = Console(highlight=False)
        console.print(table)
        if content["study"]["synthetic_data"]:
            console.print("It was trained on synthetic images: drawn, not photographed.")
        console.print(NO_DEVICE)
