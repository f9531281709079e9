"""Every bench runs at its smallest sizes, so that a changed signature breaks none unseen. No figure is judged."""

import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.cli.drafts import DraftChoices, write_draft
from services.cli.synthetic import write_sites
from services.simulation.consortium import charter_of

BENCH = Path(__file__).parents[2] / "bench"
RUN_HERE = {"accounting", "data", "noise", "pooled", "round", "secagg", "shared", "shared_accuracy", "simulate",
            "training"}  # fmt: skip
PARTS = {"figures", "plain_round", "round_hospital"}  # of others, which run them
NEED_FILES = {"judge", "strategies"}  # a whole run of the demo, the weights of a backbone: imported at least
HAM = {"naevus": "nv", "melanoma": "mel", "keratosis": "bkl", "vascular": "vasc"}
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(name, *arguments, CONSTANT=value…)`: a bench's `main` in this process, its files under tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(BENCH.parent))  # its own processes
    monkeypatch.syspath_prepend(BENCH)  # as for `python bench/NAME.py`

    def started(name: str, *arguments: str, **constants: Any) -> str:
        bench = module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(bench, constant, value)
        if hasattr(bench, "OUTPUT"):
            monkeypatch.setattr(bench, "OUTPUT", tmp_path / f"{name}.json")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        bench.main()
        return capsys.readouterr().out

    return started


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sites of drawn pictures whose labels are HAM10000's, and a study of one round over them."""
    folder = tmp_path_factory.mktemp("data")
    names = ("site-0", "site-1", "site-2", "site-3")
    write_sites(folder / "sites", names, patients=30)
    for name in names:
        table = folder / "sites" / name / "metadata.csv"
        text = table.read_text()
        for drawn, word in HAM.items():
            text = text.replace(drawn, word)
        table.write_text(text)
    choices = DraftChoices(classes=tuple(sorted(HAM.values())), image_size=28, rounds=1, patients=20, steps=1)
    write_draft(charter_of(4), choices, folder)
    return folder


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.{name}")


def test_every_bench_is_here() -> None:
    assert {path.stem for path in BENCH.glob("*.py")} == RUN_HERE | PARTS | NEED_FILES


@pytest.mark.parametrize("name", sorted(NEED_FILES))
def test_what_needs_files_can_be_imported(name: str, run: Run) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0


def test_noise(run: Run) -> None:
    assert "draws_per_second" in run("noise", SCALES=[256, 2**18], DRAWS=1_000, TIMES=1)


def test_accounting(run: Run, tmp_path: Path) -> None:
    run("accounting", ROOT=tmp_path, RATE=1.0, STEPS=2, COHORTS=((7, 1),), smallest=lambda of: 1.0)
    assert (tmp_path / "build/bench/accounting.json").exists()


def test_secagg(run: Run, tmp_path: Path) -> None:
    rows = [row for row in module("secagg").plan() if (row["m"], row["ring_bits"]) == (4, 32)]
    small = {(row["role"], row.get("verify")): row | {"d": 1_000, "n": min(row["n"], 3)} for row in rows}
    run("secagg", plan=lambda: list(small.values()))
    assert len(json.loads((tmp_path / "secagg.json").read_text())["rows"]) == 4


def test_simulate(run: Run) -> None:
    found = json.loads(run("simulate", "--one", "10", "--masks", PATIENTS=200, STEPS=1, ROUNDS=1))
    assert (found["n"], found["masks"]) == (10, True)


def test_round(run: Run, tmp_path: Path) -> None:
    run("round", "--quick", SIZES=(1_000,), ROUNDS=2, SCRATCH=tmp_path / "scratch")
    rows = json.loads((tmp_path / "round.json").read_text())["rows"]
    assert {row["mode"] for row in rows} == {"plain", "plain-durable", "secure"}


def test_shared(run: Run, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    run("shared", "--rounds", "20", PATIENTS=14, WARM=1, SCRATCH=tmp_path / "scratch", DRAWN=drawn)
    assert json.loads((tmp_path / "shared.json").read_text())["rounds"] == 20
    assert len(list((drawn / "alice-features").rglob("*.f32"))) == 14  # kept for the next run


def test_data(run: Run, tmp_path: Path) -> None:
    blobs, drawn = [], np.random.default_rng(1)
    for _ in range(4):
        out = io.BytesIO()
        Image.fromarray(drawn.integers(0, 256, (48, 48, 3), np.uint8)).save(out, "JPEG")
        blobs.append(out.getvalue())
    names = [f"ISIC_{number:07d}" for number in range(4)]
    offsets = np.cumsum([0, *map(len, blobs)])
    np.savez(
        tmp_path / "ham.npz", blob=np.frombuffer(b"".join(blobs), np.uint8), offsets=offsets, image_id=np.array(names)
    )
    rows = [f"HAM_{i},{name},nv,histo,40,male,back,rosendahl" for i, name in enumerate(names)]
    table = "\n".join(["lesion_id,image_id,dx,dx_type,age,sex,localization,dataset", *rows])
    (tmp_path / "metadata.csv").write_text(table + "\n")
    run("data", "--npz", str(tmp_path / "ham.npz"), "--metadata", str(tmp_path / "metadata.csv"))
    assert json.loads((tmp_path / "build/bench/data.json").read_text())["images"] == 4


@pytest.mark.parametrize("name", ["training", "pooled"])
def test_training(run: Run, sites: Path, name: str) -> None:
    more = ("--epochs", "1") if name == "pooled" else ()
    told = run(name, "--data", str(sites / "sites"), "--study", str(sites / "study.yaml"), *more)
    assert json.loads(told.splitlines()[-1])["model"] == "small-cnn"


def test_shared_accuracy(run: Run, sites: Path) -> None:
    sizes = ("--seeds", "1", "--rounds", "1", "--local-rounds", "1", "--local-steps", "1")
    told = run(
        "shared_accuracy", "--data", str(sites / "sites"), "--model", "small-cnn", "--image-size", "28",
        "--epsilons", "8", *sizes,
    )  # fmt: skip
    settings = [json.loads(line)["setting"] for line in told.splitlines()]
    assert settings == ["none", "pooled", "4:0", "3:1", "local"]
