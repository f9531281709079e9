"""What a notebook imports: `simulate`, `draft` and `Arrays`. The services' wire messages are built into this package.

Nothing is imported before it is used: every service imports this package for its messages, and most need no torch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.common.documents.study import Study
    from services.simulation.pool import Arrays as Arrays
    from services.simulation.simulate import Simulation, Sites

__all__ = ["Arrays", "draft", "simulate"]


def simulate(
    study: "str | Path | Study",
    sites: "Sites",
    *,
    partition: str = "sites",
    hospitals: int = 0,
    column: str = "site",
    alpha: float = 0.5,
    seed: int = 0,
    masks: bool = False,
    initial: str | Path | None = None,
    backbones: str | Path | None = None,
    state: str | Path | None = None,
    output: str | Path | None = None,
    tell: Callable[[int, int, int, int], None] | None = None,
) -> "Simulation":
    """Run a study over virtual hospitals in this process; `print` shows the history, `.history` and `.model` have it.

    `study`: a YAML file or a Study. `sites`: a folder as `wardround data import` writes it, or one of several; or
    `Arrays`; or several of either by name. The rest is as `wardround simulate --help` has it; `output` takes
    history.json, model.safetensors and curve.png; `tell(round, rounds, hospitals done, hospitals)` hears the progress.
    Raises services.common.errors.ServiceError, whose `detail` is one sentence.
    """
    from services.cli.simulate_output import check_output, write_output
    from services.hospital_node.training import Compute
    from services.simulation.simulate import Division
    from services.simulation.simulate import simulate as run

    if output is not None:
        check_output(Path(output))
    found = run(
        study,
        sites,
        Division(partition, hospitals, column, alpha, seed),
        masks=masks,
        initial=None if initial is None else Path(initial),
        state=None if state is None else Path(state),
        compute=Compute(backbones=None if backbones is None else Path(backbones)),
        tell=tell or (lambda number, rounds, done, of: None),
    )
    if output is not None:
        write_output(found, Path(output))
    return found


def draft(folder: str | Path, classes: Sequence[str], hospitals: int, **choices: Any) -> Path:
    """Write study.yaml and v0.safetensors into `folder`, for a simulation of so many hospitals; the study's path.

    `choices` are those of `wardround study draft`: mechanism, epsilon, delta, rounds, patients, architecture, …
    """
    from services.cli.drafts import DraftChoices, write_draft
    from services.simulation.consortium import charter_of

    write_draft(charter_of(hospitals), DraftChoices(classes=tuple(classes), **choices), Path(folder))
    return Path(folder) / "study.yaml"


def __getattr__(name: str) -> Any:
    """`Arrays`, when it is asked for."""
    if name == "Arrays":
        from services.simulation.pool import Arrays

        return Arrays
    raise AttributeError(f"module 'wardround' has no attribute {name!r}")
