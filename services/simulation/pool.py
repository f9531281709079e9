"""The data of all virtual hospitals in one place: folders as `data import` writes them, or arrays.

One index, one decoding, one feature array, whatever the number of hospitals; a hospital is a choice of patients in it.
The split of a patient without a given fold comes from the seed here, where a real site has its secret key.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.documents.study import ModelSection, Study
from services.common.errors import Reason, ServiceError
from services.hospital_node.backbones import BACKBONES
from services.hospital_node.dataset import (
    FOLD_WORDS,
    METADATA,
    SPLITS,
    Dataset,
    Fold,
    Split,
    fold_of,
    place_patients,
    read_rows,
)
from services.hospital_node.inputs import FeatureInputs, Inputs
from services.hospital_node.training import Compute, open_device, prepare
from services.simulation.partition import Assignment

_FOLDER = Path()


@dataclass(frozen=True)
class Arrays:
    """Data that lie in memory: `images` (n, side, side, 3) uint8 OR `features` (n, width) of the study's backbone.

    `labels` (n): names of the study's classes or their positions. `patients` (n): whose image it is, None = one person
    an image. `folds` (n): train, validation or test, None = drawn by patient. `sites` (n): the site of each, for the
    partition by column. Features are brought to length 1, as at a site.
    """

    labels: Sequence[Any] | NDArray[Any] = field(repr=False)
    images: NDArray[np.uint8] | None = field(default=None, repr=False)
    features: NDArray[Any] | None = field(default=None, repr=False)
    patients: Sequence[Any] | NDArray[Any] | None = field(default=None, repr=False)
    folds: Sequence[str] | NDArray[Any] | None = field(default=None, repr=False)
    sites: Sequence[Any] | NDArray[Any] | None = field(default=None, repr=False)


@dataclass
class _Table:
    """One entry an image: patient, group, label, fold; and either its path, its pixels or its features."""

    patients: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    folds: list[Split | None] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True)
class Pool:
    """All patients. `groups` of each split: what each patient's group is called, for a partition by it."""

    dataset: Dataset
    groups: dict[Split, tuple[str, ...]]
    features: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def labels(self) -> dict[Split, NDArray[np.int64]]:
        """The label of each patient of each split."""
        return {split: self.dataset.fold(split).labels for split in SPLITS}

    def open(self, study: Study, compute: Compute) -> Inputs:
        """What the model sees of every image, computed or decoded once. Raises INVALID_DATA, NOT_FOUND."""
        if self.features is not None:
            return FeatureInputs(self.features, open_device(compute))
        return prepare(self.dataset, study, compute)


@dataclass(frozen=True)
class Cohort:
    """The hospitals of a simulation: their names, and where each patient of the pool is."""

    names: tuple[str, ...]
    assigned: Assignment
    dataset: Dataset
    inputs: Inputs

    def open(self, hospital: int) -> tuple[Dataset, Inputs]:
        """What hospital number `hospital` has: its patients only; images and features are the pool's."""
        folds = {
            split: _chosen(self.dataset.fold(split), np.flatnonzero(self.assigned[split] == hospital))
            for split in SPLITS
        }
        inputs = self.inputs.of_others() if isinstance(self.inputs, FeatureInputs) else self.inputs
        return replace(self.dataset, folds=folds), inputs

    def patients(self) -> dict[Split, list[int]]:
        """How many patients of each split each hospital has."""
        return {split: np.bincount(of, minlength=len(self.names)).tolist() for split, of in self.assigned.items()}


def pool_folders(folders: Mapping[str, Path], model: ModelSection, key: bytes, state: Path, column: str | None) -> Pool:
    """The pool of site folders, grouped by folder, or by the values of `column` of their tables.

    As at real sites, an id stands for another patient in every folder. `state` keeps features. Raises INVALID_DATA.
    """
    table, units = _Table(), set()
    for name, folder in folders.items():
        rows, unit = read_rows(folder, model.classes)
        units.add(unit)
        table.patients += [f"{name}\0{row.patient}" for row in rows]
        table.groups += [name] * len(rows) if column is None else _cells(folder, column)
        table.labels += [row.label for row in rows]
        table.folds += [row.fold for row in rows]
        table.paths += [row.path for row in rows]
    return _pool(table, model, key, state, " or ".join(sorted(units)), grouped=column is not None)


def pool_arrays(sites: Mapping[str, Arrays], model: ModelSection, key: bytes, state: Path, *, by_site: bool) -> Pool:
    """The pool of arrays, grouped by their names, or (`by_site`) by what their own `sites` say. Raises INVALID_DATA."""
    table = _Table()
    for name, arrays in sites.items():
        _add(table, name, arrays, model, by_site=by_site)
    unit = "patient" if all(arrays.patients is not None for arrays in sites.values()) else "image"
    return _pool(table, model, key, state, unit, grouped=by_site)


def _pool(table: _Table, model: ModelSection, key: bytes, state: Path, unit: str, *, grouped: bool) -> Pool:
    images: dict[str, list[int]] = {}
    for image, patient in enumerate(table.patients):
        images.setdefault(patient, []).append(image)
    fixed: dict[str, Split | None] = {}
    group_of: dict[str, str] = {}
    for patient, own in images.items():
        folds, groups = {table.folds[i] for i in own}, {table.groups[i] for i in own}
        shown = patient.rpartition("\0")[2]
        if len(folds) > 1:
            raise _bad(f"{shown!r} is in two folds: put all images of one patient in one")
        if grouped and len(groups) > 1:
            raise _bad(
                f"{shown!r} is at {' and at '.join(sorted(groups))}: one patient belongs to one hospital, mend it"
            )
        fixed[patient], group_of[patient] = folds.pop(), min(groups)
    splits = place_patients(fixed, key)
    labels = np.array(table.labels, np.int64)
    of_split = {split: [patient for patient in images if splits[patient] == split] for split in SPLITS}
    if not of_split["train"]:
        raise _bad(f"no {unit} is left to train on: add some, or set the fold of some to train")
    dataset = Dataset(
        folder=_FOLDER,
        state=state,
        classes=model.classes,
        image_size=model.image_size,
        unit=unit,
        paths=tuple(table.paths),
        labels=labels,
        folds={split: fold_of([images[p] for p in of_split[split]], labels) for split in SPLITS},
        _memory=dict(enumerate(np.concatenate(table.images))) if table.images else {},
    )
    features = np.concatenate(table.features) if table.features else None
    groups_of = {split: tuple(group_of[p] for p in of_split[split]) for split in SPLITS}
    return Pool(dataset, groups_of, features)


def _chosen(fold: Fold, patients: NDArray[np.int64]) -> Fold:
    return Fold(tuple(fold.images[i] for i in patients), tuple(fold.votes[i] for i in patients), fold.labels[patients])


def _cells(folder: Path, column: str) -> list[str]:
    """One column of the table, which `read_rows` has checked already."""
    with (folder / METADATA).open(newline="", encoding="utf-8-sig") as source:
        reader = csv.DictReader(source, strict=True)
        if column not in (reader.fieldnames or ()):
            found = ", ".join(reader.fieldnames or ())
            raise _bad(f"{folder / METADATA} has no column {column!r} (found: {found}): name one of these")
        return [row[column].strip() for row in reader]


def _add(table: _Table, name: str, arrays: Arrays, model: ModelSection, *, by_site: bool) -> None:
    count = len(arrays.labels)
    _check_shapes(name, arrays, model, count)
    owners = range(count) if arrays.patients is None else arrays.patients
    table.patients += [f"{name}\0{owner}" for owner in owners]
    if by_site and arrays.sites is None:
        raise _bad(f"{name} has no `sites` to divide it by: give one for each image, or another partition")
    table.groups += [str(site) for site in arrays.sites] if by_site and arrays.sites is not None else [name] * count
    table.labels += [_label(label, model.classes, name) for label in arrays.labels]
    table.folds += [None] * count if arrays.folds is None else [_fold(str(fold), name) for fold in arrays.folds]
    if arrays.images is not None:
        table.images.append(arrays.images)
    if arrays.features is not None:
        table.features.append(_unit_length(arrays.features))


def _check_shapes(name: str, arrays: Arrays, model: ModelSection, count: int) -> None:
    if (arrays.images is None) is (arrays.features is None):
        raise _bad(f"{name} needs either `images` or `features`: give one of them")
    if not count:
        raise _bad(f"{name} has no images: leave it out")
    for word in ("patients", "folds", "sites"):
        given = getattr(arrays, word)
        if given is not None and len(given) != count:
            raise _bad(f"{name} has {count} labels and {len(given)} {word}: one for each image is needed")
    if arrays.images is not None:
        wanted: tuple[int, ...] = (count, model.image_size, model.image_size, 3)
        if arrays.images.shape != wanted or arrays.images.dtype != np.uint8:
            raise _bad(
                f"{name}: images of shape {arrays.images.shape} and {arrays.images.dtype}, the study needs {wanted} "
                "and uint8: resize them, or change model.image_size"
            )
    if arrays.features is not None:
        if model.backbone is None:
            raise _bad(f"{name} has features, but {model.architecture} sees images: give `images`, or take a head")
        wanted = (count, BACKBONES[model.backbone.name].features)
        if arrays.features.shape != wanted or not np.isfinite(arrays.features).all():
            raise _bad(
                f"{name}: features of shape {arrays.features.shape}, the study needs {wanted}, all finite: compute "
                f"them with {model.backbone.name}"
            )


def _label(label: Any, classes: tuple[str, ...], name: str) -> int:
    if isinstance(label, str):
        if label in classes:
            return classes.index(label)
    elif isinstance(label, int | np.integer) and 0 <= label < len(classes):
        return int(label)
    raise _bad(f"{name}: label {label!r} is not one of the study's ({', '.join(classes)}) nor a position in them")


def _fold(word: str, name: str) -> Split:
    if word not in FOLD_WORDS:
        raise _bad(f"{name}: fold {word!r} is not train, validation or test: correct it, or leave folds out")
    return FOLD_WORDS[word]


def _unit_length(features: NDArray[Any]) -> NDArray[np.float32]:
    numbers = np.asarray(features, np.float32)
    unit: NDArray[np.float32] = numbers / np.maximum(np.linalg.norm(numbers, axis=1, keepdims=True), np.float32(1e-12))
    return unit


def _bad(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, sentence)
