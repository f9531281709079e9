"""Who is at which virtual hospital: by group, in equal parts, or with skewed labels. Pure; patients, never images.

A split's patients are 0 … n − 1; an assignment says the hospital of each. The seed decides the partition and nothing
else: samples, masks and noise come from the operating system.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Reason, ServiceError
from services.hospital_node.dataset import SPLITS, Split

I64 = NDArray[np.int64]
Assignment = dict[Split, I64]


def by_group(groups: Mapping[Split, Sequence[str]]) -> tuple[tuple[str, ...], Assignment]:
    """One hospital for each group: their names ascending, and where each patient is."""
    names = tuple(sorted({group for split in SPLITS for group in groups[split]}))
    places = {name: index for index, name in enumerate(names)}
    return names, {split: np.array([places[group] for group in groups[split]], np.int64) for split in SPLITS}


def equal(labels: Mapping[Split, I64], hospitals: int, seed: int) -> Assignment:
    """Every split dealt out at random; two hospitals differ by one patient of a split at most. Raises INVALID_DATA."""
    _check(labels, hospitals)
    random = np.random.default_rng(seed)
    found: Assignment = {}
    for split in SPLITS:
        patients = len(labels[split])
        turns = random.permutation(hospitals)[np.arange(patients) % hospitals]
        found[split] = turns[random.permutation(patients)].astype(np.int64)
    return found


def dirichlet(labels: Mapping[Split, I64], hospitals: int, alpha: float, seed: int) -> Assignment:
    """Each class is shared out in proportions drawn from Dir(alpha), the same in every split (after arXiv:1909.06335).

    Small alpha: hospitals of few classes and of very unequal sizes; large: nearly equal. A hospital that got nobody to
    train on takes a patient of the one with most. Raises INVALID_DATA.
    """
    _check(labels, hospitals)
    if not 0 < alpha < np.inf:
        raise ServiceError(
            Reason.INVALID_DATA, f"alpha is {alpha:g}, a Dirichlet needs one above 0: 0.1 is very skewed"
        )
    random = np.random.default_rng(seed)
    found: Assignment = {split: np.zeros(len(labels[split]), np.int64) for split in SPLITS}
    classes = 1 + max(int(labels[split].max(initial=0)) for split in SPLITS)
    for label in range(classes):
        shares = random.dirichlet(np.full(hospitals, alpha))
        for split in SPLITS:
            patients = np.flatnonzero(labels[split] == label)
            found[split][patients] = random.choice(hospitals, len(patients), p=shares)
    _nobody_empty(found["train"], hospitals, random)
    return found


def _nobody_empty(train: I64, hospitals: int, random: np.random.Generator) -> None:
    counts = np.bincount(train, minlength=hospitals)
    for hospital in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        moved = random.choice(np.flatnonzero(train == largest))
        train[moved] = hospital
        counts[largest] -= 1
        counts[hospital] += 1


def _check(labels: Mapping[Split, I64], hospitals: int) -> None:
    patients = len(labels["train"])
    if hospitals > patients:
        raise ServiceError(
            Reason.INVALID_DATA,
            f"{hospitals} hospitals cannot share {patients} training patients, since each needs one of its own: ask "
            "for fewer hospitals",
        )
