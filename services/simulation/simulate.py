"""From a study and its data to history and model: what the command line and a notebook both call."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.documents.costs import split_figures
from services.common.documents.emit import emit
from services.common.documents.site import read
from services.common.documents.study import LoadedStudy, Study, load_study
from services.common.errors import Reason, ServiceError
from services.hospital_node.architectures import build
from services.hospital_node.dataset import METADATA
from services.hospital_node.models import Layout, initial_vector, layout, read_model_file, write_model_file
from services.hospital_node.training import Compute
from services.simulation import partition
from services.simulation.consortium import charter_for
from services.simulation.pool import Arrays, Cohort, Pool, pool_arrays, pool_folders
from services.simulation.rounds import Round, Rounds

PARTITIONS = ("sites", "column", "equal", "dirichlet")
INITIAL = "v0.safetensors"
DRAFT_SEED = 1  # of `study draft`
Sites = str | Path | Arrays | Mapping[str, str | Path | Arrays]


@dataclass(frozen=True)
class Division:
    """How data become hospitals. `kind`: sites (each given folder is one), column, equal or dirichlet.

    `hospitals`: how many, for equal and dirichlet; `column` of the tables (arrays: their `sites`); `seed` of partition
    and splits, and of nothing else.
    """

    kind: str = "sites"
    hospitals: int = 0
    column: str = "site"
    alpha: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Simulation:
    """What came of it. `patients`: of each split, by hospital in the order of `hospitals`."""

    study: LoadedStudy
    hospitals: tuple[str, ...]
    patients: dict[str, list[int]]
    unit: str
    division: Division
    masks: bool
    rounds: tuple[Round, ...]
    version: int
    vector: NDArray[np.float32] = field(repr=False)
    layout: Layout = field(repr=False)
    privacy: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        """One plain dict a round."""
        return [asdict(one) for one in self.rounds]

    @property
    def model(self) -> dict[str, NDArray[np.float32]]:
        """The last model's tensors by name."""
        found, start = {}, 0
        for name, shape in self.layout:
            stop = start + int(np.prod(shape, dtype=np.int64))
            found[name] = self.vector[start:stop].reshape(shape)
            start = stop
        return found

    def as_json(self) -> dict[str, Any]:
        """All but the model, as plain values."""
        return {
            "study": self.study.document.name,
            "sha256": self.study.digest.hex(),
            "unit": self.unit,
            "partition": asdict(self.division),
            "masks": self.masks,
            "hospitals": [
                {"hospital": name, **{split: counts[i] for split, counts in self.patients.items()}}
                for i, name in enumerate(self.hospitals)
            ],
            "privacy": self.privacy,
            "model_version": self.version,
            "history": self.history,
        }

    def table(self) -> list[tuple[str, ...]]:
        """The history as cells of text, the heading first."""
        rows: list[tuple[str, ...]] = [
            ("round", "verdict", "cohort", "model", "released figures of the model it started from", "seconds")
        ]
        for one in self.rounds:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in one.figures.items())
            verdict = f"{one.verdict}: {one.reason}" if one.reason else one.verdict
            rows.append((str(one.number), verdict, str(one.cohort), f"v{one.version}", shown, f"{one.seconds:.2f}"))
        return rows

    def __str__(self) -> str:
        table = self.table()
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join(lines)


def simulate(
    study: str | Path | Study,
    sites: Sites,
    division: Division,
    *,
    masks: bool = False,
    initial: Path | None = None,
    state: Path | None = None,
    compute: Compute,
    tell: Callable[[int, int, int, int], None] = lambda number, rounds, done, hospitals: None,
) -> Simulation:
    """Run all rounds of `study` over `sites`: a folder, arrays, or several of either by name.

    `initial`: the model file that it starts from; None = v0.safetensors beside the study, or what `study draft` makes.
    `state` keeps the features of a backbone for the next time. Raises INVALID_DOCUMENT, INVALID_DATA, BELOW_COHORT.
    """
    loaded = _load(study)
    beside = None if isinstance(study, Study) else Path(study).parent / INITIAL
    with TemporaryDirectory(prefix="wardround-simulate-") as scratch:
        start, shapes = _start(loaded, initial or (beside if beside is not None and beside.exists() else None), scratch)
        pool = _pool(loaded.document, sites, division, state or Path(scratch))
        names, assigned = _divide(pool, division)
        charter = charter_for(loaded, names)
        cohort = Cohort(names, assigned, pool.dataset, pool.open(loaded.document, compute))
        total = loaded.document.rounds + int(loaded.document.evaluation.final)
        rounds = Rounds(
            charter, loaded, cohort, start, Path(scratch),
            masks=masks, compute=compute, tell=lambda number, done: tell(number, total, done, len(names)),
        )  # fmt: skip
        told = tuple(rounds.run())
    return Simulation(
        study=loaded,
        hospitals=names,
        patients={str(split): counts for split, counts in cohort.patients().items()},
        unit=pool.dataset.unit,
        division=division if division.hospitals else replace(division, hospitals=len(names)),
        masks=masks,
        rounds=told,
        version=rounds.model.version,
        vector=rounds.model.vector,
        layout=shapes,
        privacy=_privacy(loaded.document),
    )


def _load(study: str | Path | Study) -> LoadedStudy:
    if isinstance(study, Study):
        return load_study(emit(study))
    return load_study(read(Path(study)), str(study))


def _start(loaded: LoadedStudy, initial: Path | None, scratch: str) -> tuple[NDArray[np.float32], Layout]:
    """(v0, its layout): the given file, or what `study draft` would make. Raises BAD_DIGEST, NOT_FOUND."""
    model, name = loaded.document.model, loaded.document.name
    shapes = layout(build(model))
    if initial is not None:
        if hashlib.sha256(read(initial)).hexdigest() != model.initial:
            raise ServiceError(
                Reason.BAD_DIGEST,
                f"{initial} is not the model that {name} starts from: give the file that was written with the study",
            )
        return read_model_file(initial, shapes), shapes
    drafted = initial_vector(model, DRAFT_SEED)
    if write_model_file(Path(scratch) / INITIAL, shapes, drafted).hex() != model.initial:
        raise ServiceError(
            Reason.NOT_FOUND, f"the model that {name} starts from is not beside it: give its file ({INITIAL})"
        )
    return drafted, shapes


def _pool(study: Study, sites: Sites, division: Division, state: Path) -> Pool:
    if division.kind not in PARTITIONS:
        raise _bad(f"partition {division.kind!r} is unknown: choose {', '.join(PARTITIONS)}")
    key = _split_key(division.seed)
    named = dict(sites) if isinstance(sites, Mapping) else _named(sites)
    arrays = {_id(name): one for name, one in named.items() if isinstance(one, Arrays)}
    folders = {_id(name): Path(one) for name, one in named.items() if not isinstance(one, Arrays)}
    if len({*arrays, *folders}) < len(named):
        raise _bad("two sites have the same name in small letters: rename one of them")
    if arrays and folders:
        raise _bad("some sites are folders and some are arrays: give all of one kind")
    by_column = division.kind == "column"
    if arrays:
        return pool_arrays(arrays, study.model, key, state, by_site=by_column)
    return pool_folders(folders, study.model, key, state, division.column if by_column else None)


def _named(sites: str | Path | Arrays) -> dict[str, Path | Arrays]:
    """One site alone, or every folder with a table in it."""
    if isinstance(sites, Arrays):
        return {"arrays": sites}
    folder = Path(sites)
    if (folder / METADATA).exists():
        return {"all": folder}
    found = (
        {path.name: path for path in sorted(folder.iterdir()) if (path / METADATA).exists()} if folder.is_dir() else {}
    )
    if not found:
        raise _bad(
            f"{folder} holds no {METADATA}, and no folder in it does: give a site's folder, or one that holds sites"
        )
    return dict(found)


def _divide(pool: Pool, division: Division) -> tuple[tuple[str, ...], partition.Assignment]:
    if division.kind in ("sites", "column"):
        names, assigned = partition.by_group(pool.groups)
        return tuple(map(_id, names)), assigned
    count = division.hospitals
    if count < 2:
        raise _bad(f"{count} hospitals, a federation has at least 2: say how many")
    names = tuple(f"hospital-{i + 1:0{len(str(count))}d}" for i in range(count))
    if division.kind == "equal":
        return names, partition.equal(pool.labels, count, division.seed)
    return names, partition.dirichlet(pool.labels, count, division.alpha, division.seed)


def _privacy(study: Study) -> dict[str, Any]:
    """What the whole study costs one patient, by the accounting of `study check`; a simulation spends nothing less."""
    splits = split_figures(study)
    return {
        "mechanism": study.privacy.mechanism,
        "delta": study.privacy.delta,
        "claimed_epsilon": study.privacy.epsilon,
        "epsilon": max((values["with_spare_rounds"] for values in splits.values()), default=None),
        "splits": splits,
    }


def _split_key(seed: int) -> bytes:
    """Stands for the sites' secret keys of their splits: here a split may be repeated."""
    return hashlib.sha256(f"wardround/v1/simulated-split\0{seed}".encode()).digest()


def _id(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _bad(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, sentence)
