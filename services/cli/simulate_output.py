"""What a simulation leaves behind: history, model, learning curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from services.cli.curve import draw_learning, learning_points
from services.cli.files import refuse_existing, write_new
from services.common.store.durable import storing

if TYPE_CHECKING:
    from services.simulation.simulate import Simulation  # needs torch, which the command line's image lacks

FILES = ("history.json", "model.safetensors", "curve.png")


def check_output(folder: Path) -> None:
    """Raise CONFLICT before anything is computed, where one of `FILES` exists."""
    refuse_existing([folder / name for name in FILES])


def write_output(found: Simulation, folder: Path) -> None:
    """Write all of `FILES` into `folder`. Raises CONFLICT where one of them exists, STORAGE."""
    from services.hospital_node.models import write_model_file

    check_output(folder)
    with storing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    write_new(folder / "history.json", json.dumps(found.as_json(), indent=2, allow_nan=False).encode() + b"\n")
    write_model_file(folder / "model.safetensors", found.layout, found.vector)
    points = learning_points((one.started_from, one.figures) for one in found.rounds)
    draw_learning(points, found.study.document, f"{len(found.hospitals)} virtual hospitals", folder / "curve.png")
