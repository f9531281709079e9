"""The strategies side by side on folders of sites, in one process without masks, tuned on lesions of the training fold.

    python bench/strategies.py --data DIR --backbone FILE [--image-size 128] [--mechanisms none,local] [--seeds 3]
        [--strategies fedavg,fedavgm,...] [--rounds T] [--steps K] [--state DIR]

The hospitals' own training and clip, lanes of integers as a study's encoding makes them, the server's own steps; sums
are plain integers, since masks cancel. A linear head on a frozen backbone. For each strategy a small grid is tried on a
fifth of the training lesions that is held out of training (drawn by a hash of the image's file); the best by macro AUC
plus balanced accuracy over two seeds is then trained on all of them, once a seed, and judged on the sites' test
lesions. Seeds decide the order of patients and the noise and nothing else. Prints one JSON line a row; writes
build/bench/strategies.json.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from figures import figures  # noqa: E402

from services.aggregator.strategy import Scalars, server_step  # noqa: E402
from services.cli import demo_study  # noqa: E402
from services.cli.drafts import unwritten_model, write_initial  # noqa: E402
from services.common.documents.strategies import has_control, strategy_in_words  # noqa: E402
from services.common.documents.study import BackboneSection, CohortSection, ModelSection, Study  # noqa: E402
from services.common.secagg.rounding import clip_update  # noqa: E402
from services.hospital_node.control import control_change  # noqa: E402
from services.hospital_node.dataset import Dataset, Fold, load_dataset  # noqa: E402
from services.hospital_node.evaluation import patient_probabilities  # noqa: E402
from services.hospital_node.inputs import FeatureInputs, cached_features  # noqa: E402
from services.hospital_node.models import initial_vector  # noqa: E402
from services.hospital_node.training import Compute, Task, open_device, train_round  # noqa: E402

EPSILON, DELTA = 8.0, 1e-5
FRACTION_BITS = 20  # of an update's lanes
HELD_OUT = 5  # one lesion in so many of the training fold
TUNING_SEEDS = (0, 1)
RATES = {"none": (1.0, 3.0, 10.0), "local": (10.0, 30.0, 100.0)}  # of a hospital, for fedavg and scaffold
STEPS = {  # of the server; its own rate grows where updates are small beside their noise
    "fedavgm": {"none": (0.1, 0.3, 1.0), "local": (0.3, 1.0, 3.0)},
    "fedadam": {"none": (0.1, 0.3, 1.0), "local": (0.1, 0.3, 1.0)},
}
STEPS["fedyogi"] = STEPS["fedadam"]
PROXIMAL = (0.001, 0.01, 0.1)
Site = tuple[Dataset, FeatureInputs]


@dataclass(frozen=True)
class Choice:
    """One point of a grid."""

    strategy: str
    rate: float
    fields: dict[str, Any]

    def study(self, base: Study) -> Study:
        fields = dict(self.fields)
        training = {"learning_rate": self.rate, "proximal": fields.pop("proximal", 0.0)}
        strategy = "fedavg" if self.strategy == "fedprox" else self.strategy
        return base.model_copy(
            update={
                "training": base.training.model_copy(update=training),
                "server": base.server.model_copy(update={"strategy": strategy, **fields}),
            }
        )


def keys_of(seed: int) -> Callable[[], bytes]:
    """Keys that a seed decides: here nothing is released, and a run must be repeatable."""
    numbers = itertools.count()
    return lambda: hashlib.sha256(f"bench/{seed}/{next(numbers)}".encode()).digest()


def trained(study: Study, sites: list[Site], seed: int, compute: Compute) -> NDArray[np.float32]:
    """The model after all rounds."""
    vector, scalars, kept, keys = initial_vector(study.model, 1), Scalars(), np.zeros(0), keys_of(seed)
    control = np.zeros(vector.size, np.float32)
    own = np.zeros((len(sites), vector.size), np.float32)
    for number in range(1, study.rounds + 1):
        total, changes = np.zeros(vector.size, np.int64), np.zeros((len(sites), vector.size))
        for i, (dataset, inputs) in enumerate(sites):
            found = train_round(
                vector, dataset, study, Task(bytes(32), number, bytes(32)), progress=None, keys=keys,
                should_stop=lambda: False, compute=compute, inputs=inputs,
                correction=control.astype(np.float64) - own[i] if has_control(study) else None,
            )  # fmt: skip
            assert found is not None
            if has_control(study):
                change = control_change(control, found.delta, study)
                lanes = as_lanes(change, study.encoding.control_clip, study.encoding.control_bound)
                changes[i] = lanes / 2.0**FRACTION_BITS
            total += as_lanes(found.delta, study.encoding.update_clip, study.encoding.update_bound)
        step = server_step(study, number, len(sites), FRACTION_BITS, scalars)
        kept = np.zeros((step.slots, vector.size)) if number == 1 else kept
        vector, scalars = step.run(vector, kept, total), step.scalars
        own = (own + changes).astype(np.float32)
        control = (control + changes.sum(axis=0) / len(sites)).astype(np.float32)
    return vector


def as_lanes(numbers: NDArray[np.float64], l2: float, bound: float) -> NDArray[np.int64]:
    clip = clip_update(numbers, l2, bound)
    held = np.clip(numbers * clip.factor, -clip.limit, clip.limit)
    return np.rint(held * 2.0**FRACTION_BITS).astype(np.int64)


def judged(vector: NDArray[np.float32], study: Study, sites: list[Site], compute: Compute) -> dict[str, Any]:
    shares = [patient_probabilities(vector, site, "test", study, compute, inputs) for site, inputs in sites]
    return figures(np.concatenate(shares), np.concatenate([site.fold("test").labels for site, _ in sites]))


def held_out(dataset: Dataset) -> Dataset:
    """The same site with a fifth of its training lesions in the place of its test lesions."""
    train = dataset.fold("train")
    chosen = [dataset.image_digest(int(images[0]))[0] % HELD_OUT == 0 for images in train.images]
    part = {False: [i for i, held in enumerate(chosen) if not held], True: [i for i, held in enumerate(chosen) if held]}

    def fold(index: list[int]) -> Fold:
        return Fold(
            tuple(train.images[i] for i in index), tuple(train.votes[i] for i in index), train.labels[np.array(index)]
        )

    return replace(dataset, folds={**dataset.folds, "train": fold(part[False]), "test": fold(part[True])})


def base_study(model: ModelSection, mechanism: str, patients: dict[str, int], rounds: int, steps: int) -> Study:
    study = demo_study.draft(
        synthetic=False, model=model, settings=replace(demo_study.REAL["linear-head"], steps=steps, plain_steps=steps),
        mechanism=mechanism, rounds=rounds, epsilon=EPSILON, delta=DELTA, patients=patients,
        cohort=CohortSection(minimum=3, colluding_hospitals=1),
    )  # fmt: skip
    wide = study.encoding.model_copy(update={"control_clip": 50.0, "control_bound": 4.0})
    plain = study.training.model_copy(update={"momentum": 0.0})
    return study.model_copy(update={"training": plain, "encoding": wide})


def grid(name: str, mechanism: str, rate: float) -> list[Choice]:
    """What is tried of a strategy, given the hospitals' best rate of FedAvg; of two it is that rate that is tuned."""
    if name in STEPS:
        steps = STEPS[name][mechanism]
        return [Choice(name, rate, {"momentum": 0.9, "learning_rate": step}) for step in steps]
    if name == "fedprox":
        return [Choice(name, rate, {"proximal": mu}) for mu in PROXIMAL]
    return [Choice(name, own, {}) for own in RATES[mechanism]]


def rows(
    args: argparse.Namespace, mechanism: str, model: ModelSection, sites: list[Site], compute: Compute
) -> Iterator[dict[str, Any]]:
    rounds, steps = args.rounds, args.steps if mechanism == "none" else args.local_steps
    patients = {f"site-{i}": round(len(site.fold("train")), -1) for i, (site, _) in enumerate(sites)}
    base = base_study(model, mechanism, patients, rounds, steps)
    # Inputs remember what they gathered of a split, and these splits are others.
    tuning = [(held_out(site), FeatureInputs(inputs.features, open_device(compute))) for site, inputs in sites]
    rate = 0.0
    wanted = [name for name in args.strategies.split(",") if name != "scaffold" or mechanism == "none"]
    for name in wanted:
        began, best, tried = time.perf_counter(), None, []
        for choice in grid(name, mechanism, rate):
            study = choice.study(base)
            tries = [judged(trained(study, tuning, seed, compute), study, tuning, compute) for seed in TUNING_SEEDS]
            score = mean(found["macro_auc"] + found["balanced_accuracy"] for found in tries)
            tried.append({"rate": choice.rate, **choice.fields, "score": round(score, 4)})
            if best is None or score > best[0]:
                best = (score, choice)
        assert best is not None
        choice = best[1]
        rate = choice.rate if name == "fedavg" else rate
        study = choice.study(base)
        ends = [judged(trained(study, sites, seed, compute), study, sites, compute) for seed in range(args.seeds)]
        row: dict[str, Any] = {"mechanism": mechanism, "strategy": name, "hospital_rate": choice.rate, **choice.fields}
        for figure in ("balanced_accuracy", "macro_auc"):
            values = [end[figure] for end in ends]
            row[figure] = {
                "mean": round(mean(values), 4),
                "spread": round(stdev(values), 4) if len(values) > 1 else 0.0,
            }
        yield row | {
            "words": strategy_in_words(study),
            "tried": tried,
            "seconds": round(time.perf_counter() - began, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--mechanisms", default="none,local")
    parser.add_argument("--strategies", default="fedavg,fedavgm,fedadam,fedyogi,fedprox,scaffold")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="of a hospital in a round of none")
    parser.add_argument("--local-steps", type=int, default=3, help="of a hospital in a round of local")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--state", type=Path, default=Path("build/bench-state"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/strategies.json"))
    args = parser.parse_args()
    compute = Compute(backbones=args.backbone.parent)
    digest = hashlib.sha256(args.backbone.read_bytes()).hexdigest()
    weights = BackboneSection(name="efficientnet-lite0", sha256=digest)
    args.state.mkdir(parents=True, exist_ok=True)
    wanted = unwritten_model("linear-head", args.image_size, demo_study.HAM10000_CLASSES, weights)
    model = write_initial(wanted, args.state / "v0.safetensors", seed=1)
    sites: list[Site] = []
    for folder in sorted(folder for folder in args.data.iterdir() if (folder / "metadata.csv").exists()):
        site = load_dataset(folder, model.classes, model.image_size, args.state / folder.name)
        features = cached_features(site, weights, open_device(compute), compute.backbones)
        sites.append((site, FeatureInputs(features, open_device(compute))))
    found = []
    for mechanism in args.mechanisms.split(","):
        for row in rows(args, mechanism, model, sites, compute):
            found.append(row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
    report = {
        "parameters": model.parameters, "image_size": model.image_size, "rounds": args.rounds, "steps": args.steps,
        "local_steps": args.local_steps, "seeds": args.seeds, "epsilon": EPSILON, "delta": DELTA, "rows": found,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
