"""Pooled training without privacy on the same folders and the same model: what a federation is compared with.

    python bench/pooled.py --data DIR --study FILE.yaml [--epochs N] [--rate R] [--backbones DIR]

All sites' training patients as if they lay in one place; one image of each patient an epoch, no clip, no noise,
SGD with momentum 0.9. Prints macro AUC and balanced accuracy on all sites' test patients as one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from training import judge, open_sites

from services.common.documents.study import load_study
from services.hospital_node.architectures import build
from services.hospital_node.gradients import adjusted_scores
from services.hospital_node.inputs import TURNS, open_inputs
from services.hospital_node.models import initial_vector, load_vector, trainable_vector
from services.hospital_node.training import Compute, open_device


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--state", type=Path, default=Path("build/bench-state"))
    parser.add_argument("--backbones", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    study = load_study(args.study.read_bytes(), str(args.study)).document
    compute = Compute(backbones=args.backbones)
    sites = open_sites(args.data, study, args.state, compute)
    device = open_device(compute)
    module = build(study.model)
    load_vector(module, initial_vector(study.model, args.seed))
    module.to(device).train()
    inputs = [open_inputs(site, study.model, device, compute.backbones) for site in sites]
    patients = [(s, images) for s, site in enumerate(sites) for images in site.fold("train").images]
    trained = adjusted_scores(module, study)
    optimiser = torch.optim.SGD(module.parameters(), lr=args.rate, momentum=0.9)
    generator = np.random.default_rng(args.seed)  # no privacy is claimed here
    steps = args.epochs * -(-len(patients) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    began = time.perf_counter()
    for _ in range(args.epochs):
        order = generator.permutation(len(patients))
        for start in range(0, len(order), args.batch):
            chosen = [patients[i] for i in order[start : start + args.batch]]
            batches, labels = [], []
            for number, site in enumerate(sites):
                rows = np.array([generator.choice(images) for s, images in chosen if s == number], np.int64)
                if rows.size:
                    turns = generator.integers(0, TURNS, rows.size) if inputs[number].augmentable else None
                    batches.append(inputs[number].batch(rows, turns))
                    labels.append(site.labels[rows])
            optimiser.zero_grad()
            scores, truth = trained(torch.cat(batches)), torch.from_numpy(np.concatenate(labels)).to(device)
            torch.nn.functional.cross_entropy(scores, truth).backward()
            optimiser.step()
            schedule.step()
    vector = trainable_vector(module)
    found = judge(vector, sites, study, compute)
    print(json.dumps({"model": study.model.architecture, "epochs": args.epochs, "train_patients": len(patients),
                      "seconds": round(time.perf_counter() - began, 1), **found}))  # fmt: skip


if __name__ == "__main__":
    main()
