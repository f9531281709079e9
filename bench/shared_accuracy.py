"""What each mechanism reaches at one ε on folders of sites, noise seed by noise seed, in one process without masks.

    python bench/shared_accuracy.py --data DIR [--model linear-head --backbone FILE] [--features NAME] [--views 1|2|4]
        [--image-size N] [--epsilons 1,3,8] [--seeds 3] [--rounds T] [--settings none,pooled,4:0,3:1,local]

The hospitals' own cores: clip, sum, rint, discrete Gaussian shares, the server's step, and the study that
`wardround demo` would write; sums are plain integers, since masks cancel. `4:0` is (n_min, k) of `shared`, `pooled`
central DP-SGD over all patients in one place, `none` the same step without noise. Seeds draw the noise and nothing
else. Prints a table and one JSON object (also build/bench/shared_accuracy-MODEL.json): mean and spread over the seeds
of macro AUC and balanced accuracy on all sites' test patients, which are looked at here because they are public.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from training import judge, open_sites  # noqa: E402

from services.aggregator.strategy import Scalars, server_step  # noqa: E402
from services.cli import demo_study  # noqa: E402
from services.cli.drafts import suited_backbone, unwritten_model, write_initial  # noqa: E402
from services.common.documents.costs import Noise, study_epsilon, training_noise  # noqa: E402
from services.common.documents.study import CohortSection, Study  # noqa: E402
from services.common.dp.noise import discrete_gaussian, integer_sum  # noqa: E402
from services.common.secagg.rounding import clip_update  # noqa: E402
from services.hospital_node.dataset import Dataset  # noqa: E402
from services.hospital_node.inputs import Inputs, open_inputs  # noqa: E402
from services.hospital_node.models import initial_vector  # noqa: E402
from services.hospital_node.training import (  # noqa: E402
    Compute,
    Task,
    clipped_gradient_sum,
    discard_progress,
    open_device,
    train_round,
)

DELTA = 1e-5
Keys = Callable[[], bytes]


def keys_of(seed: int) -> Keys:
    """Keys that a seed decides: here nothing is released, and a run must be repeatable."""
    numbers = count()
    return lambda: hashlib.sha256(f"bench/{seed}/{next(numbers)}".encode()).digest()


def study_of(args: argparse.Namespace, model: Any, sites: dict[str, int], setting: str, epsilon: float | None) -> Study:
    local = setting == "local"
    minimum, colluding = (int(part) for part in setting.split(":")) if ":" in setting else (len(sites), 0)
    tuned = demo_study.REAL[args.model]
    study = demo_study.draft(
        synthetic=False, model=model, settings=replace(tuned, steps=args.local_steps) if local else tuned,
        mechanism="local" if local else "shared", rounds=args.local_rounds if local else args.rounds,
        epsilon=epsilon or 8.0, delta=DELTA, patients=sites,
        cohort=CohortSection(minimum=minimum, colluding_hospitals=colluding),
    )  # fmt: skip
    if local:  # the same rate and momentum as the server's, since it is the noise that is compared
        own = study.training.model_copy(update={"learning_rate": tuned.server_rate, "momentum": 0.9})
        study = study.model_copy(update={"training": own})
    return study


def stepped(
    study: Study, sites: list[tuple[Dataset, Inputs]], noise: Noise | None, shares: int, keys: Keys, compute: Compute
) -> NDArray[np.float32]:
    """The published model after all rounds of one global step each; `shares` of `noise` are in every sum."""
    vector, scalars, kept = initial_vector(study.model, 1), Scalars(), np.zeros(0)
    bits = study.privacy.scale_bits
    for number in range(1, study.rounds + 1):
        total = np.zeros(vector.size, np.int64)
        for dataset, inputs in sites:
            exact = clipped_gradient_sum(vector, dataset, study, keys=keys, compute=compute, inputs=inputs)
            total += integer_sum(exact, bits)
        for _ in range(shares if noise is not None else 0):
            assert noise is not None
            total += discrete_gaussian(noise.scale).draw(keys(), vector.size)
        step = server_step(study, number, len(sites), bits, scalars)
        kept = np.zeros((step.slots, vector.size)) if number == 1 else kept
        vector, scalars = step.run(vector, kept, total), step.scalars
    return vector


def averaged(
    study: Study, sites: list[tuple[Dataset, Inputs]], keys: Keys, compute: Compute, scratch: Path
) -> NDArray[np.float32]:
    """FedAvg of DP-SGD at each site (`local`)."""
    vector = initial_vector(study.model, 1)
    for number in range(1, study.rounds + 1):
        deltas = []
        for dataset, inputs in sites:
            found = train_round(
                vector, dataset, study, Task(bytes(32), number, bytes(32)), progress=scratch, keys=keys,
                should_stop=lambda: False, compute=compute, inputs=inputs,
            )  # fmt: skip
            assert found is not None
            discard_progress(scratch)
            clip = clip_update(found.delta, study.encoding.update_clip, study.encoding.update_bound)
            deltas.append(np.clip(found.delta * clip.factor, -clip.limit, clip.limit))
        vector = (vector + study.server.learning_rate * np.mean(deltas, axis=0)).astype(np.float32)
    return vector


def measure(
    args: argparse.Namespace, study: Study, setting: str, sites: list[tuple[Dataset, Inputs]], compute: Compute
) -> dict[str, Any]:
    found, began = [], time.perf_counter()
    for seed in range(1 if setting == "none" else args.seeds):
        keys = keys_of(seed)
        if setting == "local":
            vector = averaged(study, sites, keys, compute, args.state / "progress")
        elif setting == "pooled":
            whole = study.model_copy(update={"cohort": CohortSection.model_construct(minimum=1, colluding_hospitals=0)})
            vector = stepped(study, sites, training_noise(whole), 1, keys, compute)
        else:
            noise = None if setting == "none" else training_noise(study)
            vector = stepped(study, sites, noise, len(sites), keys, compute)
        found.append(judge(vector, [dataset for dataset, _ in sites], study, compute))
    row: dict[str, Any] = {"setting": setting, "seconds": round(time.perf_counter() - began, 1)}
    for name in ("macro_auc", "balanced_accuracy", "accuracy"):
        values = [figures[name] for figures in found]
        row[name] = {"mean": round(mean(values), 4), "spread": round(stdev(values), 4) if len(values) > 1 else 0.0}
    if setting == "none":
        return row | {"epsilon": None}
    solo = study_epsilon(study, solo=True)["train"] if setting != "pooled" else None
    return row | {
        "epsilon": study.privacy.epsilon,
        "sigma": study.privacy.noise_multiplier,
        "epsilon_planned": round(study_epsilon(study, spare=False)["train"], 4),
        "epsilon_solo": round(solo, 3) if solo is not None else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="linear-head")
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--features", help="entry of the backbone registry; default: what suits the model")
    parser.add_argument("--views", type=int, choices=(1, 2, 4), help="default: what suits the model")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--epsilons", default="1,3,8")
    parser.add_argument("--settings", default="none,pooled,4:0,3:1,local")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--local-rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--state", type=Path, default=Path("build/bench-state"))
    args = parser.parse_args()
    tuned = demo_study.REAL[args.model]
    args.rounds = args.rounds or tuned.shared_rounds
    compute = Compute(backbones=args.backbone.parent if args.backbone else None)
    weights = None
    if args.backbone:
        digest = hashlib.sha256(args.backbone.read_bytes()).hexdigest()
        weights = suited_backbone(args.model, digest)
        changes = {"name": args.features or weights.name, "views": args.views or weights.views}
        weights = weights.model_copy(update=changes)
    classes = demo_study.HAM10000_CLASSES
    wanted = unwritten_model(args.model, args.image_size or tuned.image_size, classes, weights)
    args.state.mkdir(parents=True, exist_ok=True)
    model = write_initial(wanted, args.state / "v0.safetensors", seed=1)
    folders = sorted(folder.name for folder in args.data.iterdir() if (folder / "metadata.csv").exists())
    # Published figures: the rounded number of training patients, as a site would print it.
    study = study_of(args, model, dict.fromkeys((f"site-{i}" for i in range(len(folders))), 1000), "4:0", 8.0)
    datasets = open_sites(args.data, study, args.state, compute)
    patients = {f"site-{i}": round(len(site.fold("train")), -1) for i, site in enumerate(datasets)}
    device = open_device(compute)
    sites = [(site, open_inputs(site, model, device, compute.backbones)) for site in datasets]
    rows = []
    for epsilon in [float(part) for part in args.epsilons.split(",")]:
        for setting in args.settings.split(","):
            if setting == "none" and rows:
                continue  # it has no ε: once is enough
            study = study_of(args, model, patients, setting, epsilon)
            rows.append(measure(args, study, setting, sites, compute))
            print(json.dumps(rows[-1]), flush=True)
    report = {
        "model": args.model, "image_size": model.image_size, "parameters": model.parameters, "delta": DELTA,
        "rounds": args.rounds, "patients": patients, "rows": rows,
    }  # fmt: skip
    path = Path(f"build/bench/shared_accuracy-{args.model}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
