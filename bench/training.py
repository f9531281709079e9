"""FedAvg in one process on folders of sites: the same training, clipping and noise as the hospitals', no masks.

    python bench/training.py --data DIR --study FILE.yaml [--state DIR] [--backbones DIR] [--seed N]

DIR holds one folder for each site. Prints one JSON object: figures on all sites' test patients after every round,
seconds of a site's round, ε from the documents' own accounting. For choosing settings on data that may be spent.
"""

import argparse
import json
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from figures import figures
from numpy.typing import NDArray

from services.common.documents.study import Study, load_study
from services.common.secagg.rounding import clip_update
from services.hospital_node.dataset import Dataset, load_dataset
from services.hospital_node.evaluation import patient_probabilities
from services.hospital_node.models import initial_vector
from services.hospital_node.training import Compute, Task, discard_progress, prepare, train_round


def open_sites(data: Path, study: Study, state: Path, compute: Compute) -> list[Dataset]:
    folders = sorted(folder for folder in data.iterdir() if (folder / "metadata.csv").exists())
    sites = [
        load_dataset(folder, study.model.classes, study.model.image_size, state / folder.name) for folder in folders
    ]
    for site in sites:
        prepare(site, study, compute)
    return sites


def judge(vector: NDArray[np.float32], sites: list[Dataset], study: Study, compute: Compute) -> dict[str, float]:
    shares = [patient_probabilities(vector, site, "test", study, compute) for site in sites]
    return figures(np.concatenate(shares), np.concatenate([site.fold("test").labels for site in sites]))


def federated(study: Study, sites: list[Dataset], compute: Compute, seed: int, quiet: bool = False) -> dict[str, Any]:
    vector = initial_vector(study.model, seed)
    rounds, slowest, norms = [judge(vector, sites, study, compute)], 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, study.rounds + 1):
            deltas = []
            for site in sites:
                task, progress = Task(bytes(32), number, bytes(32)), Path(folder)
                began = time.perf_counter()
                result = train_round(
                    vector,
                    site,
                    study,
                    task,
                    progress=progress,
                    keys=lambda: secrets.token_bytes(32),
                    should_stop=lambda: False,
                    compute=compute,
                )
                slowest = max(slowest, time.perf_counter() - began)
                assert result is not None
                discard_progress(progress)
                norms.append(float(np.linalg.norm(result.delta)))
                clip = clip_update(result.delta, study.encoding.update_clip, study.encoding.update_bound)
                deltas.append(np.clip(result.delta * clip.factor, -clip.limit, clip.limit))
            vector = (vector + study.server.learning_rate * np.mean(deltas, axis=0)).astype(np.float32)
            rounds.append(judge(vector, sites, study, compute))
            if not quiet:
                print(json.dumps({"round": number, **rounds[-1]}), flush=True)
    return {
        "train_patients": [len(site.fold("train")) for site in sites],
        "rounds": rounds,
        "slowest_site_round_seconds": round(slowest, 2),
        "largest_update_l2": round(max(norms), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("build/bench-state"))
    parser.add_argument("--backbones", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    study = load_study(args.study.read_bytes(), str(args.study)).document
    compute = Compute(backbones=args.backbones)
    found = federated(study, open_sites(args.data, study, args.state, compute), compute, args.seed)
    print(json.dumps({"model": study.model.architecture, **found}))


if __name__ == "__main__":
    main()
