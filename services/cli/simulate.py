"""`wardround simulate`: a study on one machine, before anybody is asked to take part in it."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.cli.claim import claim, claim_in_words, up
from services.cli.drafts import torch_side
from services.cli.simulate_output import FILES, check_output, write_output


class Partition(StrEnum):
    """How data become hospitals."""

    sites = "sites"
    column = "column"
    equal = "equal"
    dirichlet = "dirichlet"


def simulate(
    study: Annotated[Path, typer.Argument(help="the study; v0.safetensors beside it, as `study draft` writes both")],
    data: Annotated[Path, typer.Option(help="a folder with metadata.csv, or one that holds such folders")],
    partition: Annotated[
        Partition,
        typer.Option(help="sites: each folder is a hospital; column: by --column; equal; dirichlet: skewed labels"),
    ] = Partition.sites,
    hospitals: Annotated[int, typer.Option(min=0, max=4096, help="how many, for equal and dirichlet")] = 0,
    column: Annotated[str, typer.Option(help="for column: a column of metadata.csv")] = "site",
    alpha: Annotated[float, typer.Option(help="for dirichlet: 0.1 is very skewed, 100 nearly even")] = 0.5,
    seed: Annotated[int, typer.Option(help="of the partition and the splits; never of noise")] = 0,
    masks: Annotated[bool, typer.Option("--masks", help="mask every vector, as in the real protocol")] = False,
    initial: Annotated[Path | None, typer.Option(help="the model to start from, if not beside the study")] = None,
    backbones: Annotated[Path | None, typer.Option(help="folder with a frozen backbone's weights")] = None,
    state: Annotated[Path | None, typer.Option(help="folder that keeps features of a backbone for next time")] = None,
    output: Annotated[Path | None, typer.Option(help=f"folder for {', '.join(FILES)}; nothing is overwritten")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="history and privacy for a program")] = False,
) -> None:
    """Run a study over virtual hospitals in this process, by the cores that hospitals and aggregator run.

    Example: wardround simulate study/study.yaml --data sites/ --output build/simulated

    Example: wardround simulate study/study.yaml --data all/ --partition dirichlet --alpha 0.3 --hospitals 100
    """
    torch_side()
    from services.hospital_node.training import Compute
    from services.simulation.simulate import Division, Simulation
    from services.simulation.simulate import simulate as run

    if output is not None:
        check_output(output)
    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    division = Division(partition.value, hospitals, column, alpha, seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening the data", total=None)

        def tell(number: int, rounds: int, done: int, of: int) -> None:
            bar.update(task, description=f"round {number} of {rounds}", completed=done, total=of)

        found: Simulation = run(
            study, data, division,
            masks=masks, initial=initial, state=state, compute=Compute(backbones=backbones), tell=tell,
        )  # fmt: skip
    if output is not None:
        write_output(found, output)
    if as_json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
        return
    show(console, found)
    if output is not None:
        console.print(f"{', '.join(FILES)}: {output}")


def show(console: Console, found: Any) -> None:
    """The history, who took part and what it would cost, for a person."""
    heading, *rows = found.table()
    table = Table(title=f"{found.study.document.name}: {len(found.hospitals)} virtual hospitals, {_sums(found.masks)}")
    for cell in heading:
        table.add_column(cell)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    counts = ", ".join(f"{split} {min(of)} to {max(of)}" for split, of in found.patients.items())
    console.print(f"{found.unit}s of a hospital: {counts}")
    privacy = found.privacy
    if privacy["epsilon"] is None:
        console.print("mechanism none: no single patient would be protected, only sums are hidden")
        return
    for split, values in privacy["splits"].items():
        console.print(
            f"a {found.unit} of the {split} split: ε = {up(values['with_spare_rounds'])} with spare rounds, ε_solo "
            f"{up(values['solo'])}"
        )
    console.print(f"claimed: {claim_in_words(claim(found.study.document), found.unit)}")


def _sums(masks: bool) -> str:
    return "masked sums" if masks else "sums without masks"
