"""Exact counts of one evaluation: every patient of a split votes once (privacy.md §6). The caller adds the noise."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.documents.study import Study
from services.hospital_node.architectures import build
from services.hospital_node.dataset import Dataset, Split
from services.hospital_node.inputs import Inputs, open_inputs
from services.hospital_node.models import load_vector
from services.hospital_node.training import Compute, open_device

_DEFAULT = Compute()


@dataclass(frozen=True)
class Counts:
    """int64: hits (c), totals (c), confusion (c, c) row = truth, histogram (c, 2, bins): 0 negatives, 1 positives."""

    hits: NDArray[np.int64] = field(repr=False)
    totals: NDArray[np.int64] = field(repr=False)
    confusion: NDArray[np.int64] = field(repr=False)
    histogram: NDArray[np.int64] = field(repr=False)


def evaluate(
    vector: NDArray[np.float32],
    dataset: Dataset,
    split: Split,
    study: Study,
    compute: Compute = _DEFAULT,
    inputs: Inputs | None = None,
) -> Counts:
    """Counts of the model `vector` (d) on a split; never sent without noise or mask. Raises INVALID_DATA."""
    fold = dataset.fold(split)
    probabilities = patient_probabilities(vector, dataset, split, study, compute, inputs)
    return count(probabilities, fold.labels, study.evaluation.histogram_bins)


def patient_probabilities(
    vector: NDArray[np.float32],
    dataset: Dataset,
    split: Split,
    study: Study,
    compute: Compute = _DEFAULT,
    inputs: Inputs | None = None,
) -> NDArray[np.float64]:
    """(patients, classes): the mean over the images with which a patient votes. Stays at the site."""
    device = open_device(compute)
    module = build(study.model)
    load_vector(module, vector)
    module.to(device).eval()
    opened = inputs or open_inputs(dataset, study.model, device, compute.backbones)
    fold, step = dataset.fold(split), study.training.micro_batch
    out = np.zeros((len(fold), len(dataset.classes)), np.float64)
    owner = np.repeat(np.arange(len(fold)), [votes.size for votes in fold.votes])
    images = np.concatenate(fold.votes) if len(fold) else np.empty(0, np.int64)
    with torch.inference_mode():
        for start in range(0, images.size, step):
            scores = module(opened.batch(images[start : start + step]))
            shares = torch.softmax(scores.double(), dim=1).cpu().numpy()
            np.add.at(out, owner[start : start + step], shares)
    sizes = np.array([votes.size for votes in fold.votes], np.float64)
    return out / sizes[:, None]


def count(probabilities: NDArray[np.float64], labels: NDArray[np.int64], bins: int) -> Counts:
    """Counts of (patients, classes) probabilities against the truth (patients). NaN votes as the first class, bin 0.

    Bin i of class c holds p(c) in [i/bins, (i+1)/bins); p = 1 is in the last. Each patient is in one bin of each
    class, so it touches 1 + classes tables: the sensitivity of privacy.md §6.
    """
    classes = probabilities.shape[1]
    finite = np.nan_to_num(probabilities, nan=0.0, posinf=0.0, neginf=0.0)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, finite.argmax(1)), 1)
    histogram = np.zeros((classes, 2, bins), np.int64)
    bucket = np.clip((finite * bins).astype(np.int64), 0, bins - 1)
    for c in range(classes):
        np.add.at(histogram[c], ((labels == c).astype(np.int64), bucket[:, c]), 1)
    return Counts(np.diagonal(confusion).copy(), confusion.sum(1), confusion, histogram)
