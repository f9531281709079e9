"""`wardround study`: what a study would cost before anybody agrees to it, and a working draft."""

import datetime
import hashlib
import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from services.cli.claim import claim, claim_in_words, up
from services.cli.curve import draw, sketch, training_curve
from services.cli.drafts import DraftChoices, a_year_from_now, write_draft
from services.common.documents.charter import LoadedCharter, load_charter
from services.common.documents.costs import spare_rounds, split_figures, study_events
from services.common.documents.shape import check_study, largest_batch, largest_split, round_shape, total_rounds
from services.common.documents.site import read
from services.common.documents.strategies import model_numbers, strategy_in_words
from services.common.documents.study import LoadedStudy, Study, load_study
from services.common.dp.accounting import COARSE, epsilon, epsilon_gaussian_closed_form, epsilon_rdp
from services.common.dp.prv import epsilon_prv
from services.common.errors import Reason, ServiceError
from services.simulation.consortium import charter_of

app = typer.Typer(no_args_is_help=True, help="One training programme: what an ethics board approves.")

_ENCAPSULATION = {"mlkem768-x25519": 1120, "x25519": 32}
_TAG = 16


class Mechanism(StrEnum):
    """Who adds how much noise (docs/privacy.md)."""

    local = "local"
    shared = "shared"
    none = "none"


class ServerStrategy(StrEnum):
    """How sums become the next model (docs/strategies.md)."""

    fedavg = "fedavg"
    fedavgm = "fedavgm"
    fedadam = "fedadam"
    fedyogi = "fedyogi"
    scaffold = "scaffold"
    sgd = "sgd"
    adam = "adam"


@app.command()
def check(
    study: Annotated[Path, typer.Argument(help="the study, exact bytes")],
    charter: Annotated[Path, typer.Option(help="the charter that it would run under")],
    as_json: Annotated[bool, typer.Option("--json", help="figures for a program")] = False,
    picture: Annotated[Path | None, typer.Option(help="write ε over the rounds as a PNG here")] = None,
) -> None:
    """Hold a study against a charter and show what it costs: ε and ε_solo per round and in total, bytes, rounds.

    Example: wardround study check study.yaml --charter charter.yaml --picture epsilon.png
    """
    loaded, held = load_study(read(study), str(study)), load_charter(read(charter), str(charter))
    check_study(held, loaded)
    found = figures(held, loaded) | {"accountants": accountants(loaded.document)}
    curve = training_curve(loaded.document)
    if picture is not None and curve is not None:
        draw(curve, loaded.document, picture)
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
        return
    console = Console(highlight=False, soft_wrap=True)
    _show(console, found)
    if found["accountants"]:
        told = ", ".join(f"{name} {up(value, 4)}" for name, value in found["accountants"].items())
        console.print(f"a training patient's ε with spare rounds, by every accountant: {told}")
    if curve is not None:
        for line in sketch(curve.epsilon, "ε of a training patient over the rounds"):
            console.print(line, markup=False)


@app.command()
def draft(
    out: Annotated[Path, typer.Option(help="folder for study.yaml and v0.safetensors; not overwritten")],
    classes: Annotated[str, typer.Option(help="names of the classes, in order, with commas")],
    charter: Annotated[Path | None, typer.Option(help="the charter that it would run under")] = None,
    hospitals: Annotated[
        int | None, typer.Option(min=2, max=4096, help="without a charter: how many `wardround simulate` will have")
    ] = None,
    name: Annotated[str, typer.Option(help="the study's name: a-z, 0-9 and '-'")] = "first-study",
    purpose: Annotated[str, typer.Option(help="what an ethics board reads")] = "State here what this study is for.",
    architecture: Annotated[str, typer.Option(help="one of `wardround model list`")] = "small-cnn",
    backbone: Annotated[
        str | None, typer.Option(help="for linear-head and centred-head: the frozen backbone's name")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="for linear-head and centred-head: the backbone's weights file")
    ] = None,
    image_size: Annotated[int, typer.Option(min=8, max=1024, help="pixels a side")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="most training rounds")] = 20,
    mechanism: Annotated[
        Mechanism, typer.Option(help="local: DP-SGD at each hospital; shared: one noise for all; none: no protection")
    ] = Mechanism.local,
    epsilon: Annotated[float, typer.Option(min=0.01, help="ε of the whole study for one patient")] = 8.0,
    delta: Annotated[float, typer.Option(min=1e-12, max=1e-2, help="δ of the whole study")] = 1e-5,
    patients: Annotated[
        int, typer.Option(min=1, help="training patients of a typical hospital, a PUBLIC figure")
    ] = 1000,
    sampling_rate: Annotated[
        float | None,
        typer.Option(min=1e-4, max=1, help="chance of a patient to be in a step; default: 1 for features, else 0.25"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="local steps in a round; default: 4, and 1 under shared")
    ] = None,
    strategy: Annotated[
        ServerStrategy | None,
        typer.Option(help="the server step (docs/strategies.md); default: fedavg, and sgd under shared"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the public initial weights")] = 1,
    start: Annotated[
        Path | None,
        typer.Option(help="a model file to begin with, as `model convert` makes it; default: drawn weights"),
    ] = None,
    expires: Annotated[datetime.datetime | None, typer.Option(formats=["%Y-%m-%d"], help="default: in a year")] = None,
) -> None:
    """Write a study that this charter accepts, with its initial model and the noise that its ε needs.

    Example: wardround study draft --charter charter.yaml --classes benign,malignant --rounds 20 --epsilon 8 --out
    study/
    """
    held = _charter_or_assumed(charter, hospitals)
    choices = DraftChoices(
        name=name,
        purpose=purpose,
        classes=tuple(part.strip() for part in classes.split(",")),
        architecture=architecture,
        backbone=backbone,
        weights=_digest_of(weights) if weights is not None else None,
        image_size=image_size,
        rounds=rounds,
        mechanism=mechanism.value,
        epsilon=epsilon,
        delta=delta,
        patients=patients,
        sampling_rate=sampling_rate,
        steps=steps,
        strategy=strategy.value if strategy is not None else None,
        seed=seed,
        start=start,
        expires=expires.date() if expires is not None else a_year_from_now(),
    )
    loaded, target = write_draft(held, choices, out), out / "study.yaml"
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{target} and {out / 'v0.safetensors'} ({loaded.document.model.parameters} parameters)")
    _show(console, figures(held, loaded))
    then = f"simulate {target} --data FOLDER" if charter is None else f"study check {target} --charter {charter}"
    console.print(f"next: edit it, then wardround {then}")


def _charter_or_assumed(charter: Path | None, hospitals: int | None) -> LoadedCharter:
    """The charter of the file, or the one that a simulation of so many hospitals assumes."""
    if (charter is None) is (hospitals is None):
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            "give either --charter FILE, or --hospitals N for a study that will only be simulated",
        )
    return load_charter(read(charter), str(charter)) if charter is not None else charter_of(hospitals or 0)


def accountants(study: Study) -> dict[str, float]:
    """ε of a training patient, spare rounds included, by every accountant (privacy.md §7). Empty under `none`.

    The claim rests on the first; the others are there to be compared with it: RDP is the largest.
    """
    found, delta = [event.event for event in study_events(study) if event.split == "train"], study.privacy.delta
    if not found or delta is None:
        return {}
    if all(event.sampling_rate == 1 for event in found):
        figures = {"closed form": epsilon_gaussian_closed_form(found, delta)}
    else:
        figures = {"PLD": epsilon(found, delta), "PLD on a coarser grid": epsilon(found, delta, COARSE)}
    return {**figures, "PRV": epsilon_prv(found, delta, 5e-3), "RDP": epsilon_rdp(found, delta)}


def figures(charter: LoadedCharter, study: LoadedStudy) -> dict[str, Any]:
    """What `study check` shows, as plain data; sizes in bytes, ε at the study's δ."""
    document = study.document
    splits = split_figures(document)
    committee = charter.roster.committee
    pieces = math.comb(committee.pods - 1, committee.threshold - 1)
    boxes = committee.pods * (_ENCAPSULATION[charter.document.suite] + 32 * pieces + _TAG)
    plain = round_shape(charter, study, 1)
    shapes = {
        "train": plain.table.total_bytes,
        "gate": max(
            (round_shape(charter, study, number).table.total_bytes for number in document.evaluation.gate_rounds),
            default=0,
        ),
        "final": round_shape(charter, study, total_rounds(study)).table.total_bytes if document.evaluation.final else 0,
    }
    return {
        "study": document.name,
        "sha256": study.digest.hex(),
        "charter": charter.digest.hex(),
        "demo": charter.document.demo,
        "claim": claim(document),
        "epsilon": max((values["with_spare_rounds"] for values in splits.values()), default=None),
        "splits": splits,
        "strategy": strategy_in_words(document),
        "rounds": document.rounds,
        "spare_rounds": spare_rounds(document.rounds),
        "gates": len(document.evaluation.gate_rounds),
        "final_evaluation": document.evaluation.final,
        "largest_split": largest_split(charter, study),
        "largest_batch": largest_batch(charter, study),
        "parameters": document.model.parameters,
        "upload_bytes": {kind: size + boxes for kind, size in shapes.items() if size},
        "download_bytes": 4 * model_numbers(document),
        "upload_against_plain_float32": (plain.table.total_bytes + boxes) / (4 * document.model.parameters),
        "data_check_required": document.data.require_check,
        "shortest_seconds": document.timing.train_seconds * total_rounds(study),
    }


def _show(console: Console, found: dict[str, Any]) -> None:
    gates = f"{found['gates']} gates" + (", a final evaluation" if found["final_evaluation"] else "")
    console.print(f"study {found['study']}: {found['rounds']} rounds, {gates}; SHA-256 {found['sha256']}")
    console.print(f"strategy: {found['strategy']}")
    if found["demo"]:
        console.print("[bold red]DEMO charter: safety rules are lifted; not for patients' data[/]")
    if found["splits"]:
        table = Table(
            "patient of the split", "ε of one round", "planned rounds", "with spare rounds", "ε_solo", box=None
        )
        for split, values in found["splits"].items():
            table.add_row(split, *(up(value) for value in values.values()))
        console.print(table)
        console.print(f"claimed: {claim_in_words(found['claim'], found['claim']['unit'])}")
    else:
        console.print("[bold red]mechanism none: no single patient is protected; only the sum's masking is[/]")
    sizes = ", ".join(f"{kind} {_size(value)}" for kind, value in found["upload_bytes"].items())
    console.print(
        f"each hospital, each round: up {sizes} ({found['upload_against_plain_float32']:.3f} of plain float32), down "
        f"{_size(found['download_bytes'])}"
    )
    if found["largest_batch"] is not None:
        console.print(
            f"up to {found['largest_batch']} patients of a hospital in one step surely never meet the data bound; more "
            "are as private, their sum is cut off at it"
        )
    if found["largest_split"] is not None:
        console.print(f"a validation or test split may hold {found['largest_split']} patients")
    if found["data_check_required"]:
        console.print("each site's images must have passed `wardround data check`, and be the same since")


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"{path} cannot be read ({error.strerror}): give the backbone's weights file"
        ) from None
