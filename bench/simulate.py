"""Seconds a round and memory of `wardround simulate` by the number of hospitals: `make bench-simulate`.

Writes build/bench/simulate.json, rows {"n", "d", "seconds_per_round", "peak_rss_mib"} with and without masks, and the
processor time, which is true on a busy machine too. One pool of 10,000 patients with drawn features of 1280 numbers is
dealt out to 10, 100 and 1,000 hospitals; a round is `local` training of a linear head (d = 8,967), 5 noisy steps of all
its patients at every hospital, and the sum. Each row is a process of its own, so that its peak is its own; what torch
and the features take is in the row of n = 10 already.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.secagg import machine  # noqa: E402
from services.cli.drafts import DraftChoices, draft_study  # noqa: E402
from services.common.documents.emit import emit  # noqa: E402
from services.hospital_node.training import Compute  # noqa: E402
from services.simulation.consortium import charter_of  # noqa: E402
from services.simulation.pool import Arrays  # noqa: E402
from services.simulation.simulate import Division, simulate  # noqa: E402

OUTPUT = ROOT / "build" / "bench" / "simulate.json"
HOSPITALS = (10, 100, 1000)
CLASSES = tuple("abcdefg")
PATIENTS, FEATURES, STEPS, ROUNDS = 10_000, 1280, 5, 3


def one(hospitals: int, masks: bool) -> dict[str, Any]:
    """One row, measured in this process."""
    random = np.random.default_rng(1)
    labels = random.integers(0, len(CLASSES), PATIENTS)
    arrays = Arrays(labels=labels, features=random.normal(size=(PATIENTS, FEATURES)).astype(np.float32))
    with TemporaryDirectory() as scratch:
        study = draft_study(
            charter_of(hospitals),
            DraftChoices(
                classes=CLASSES, architecture="linear-head", backbone="efficientnet-lite0", weights="0" * 64,
                image_size=8, rounds=ROUNDS, patients=max(1, PATIENTS // hospitals), steps=STEPS,
            ),
            Path(scratch) / "v0.safetensors",
        )  # fmt: skip
        plain = study.evaluation.model_copy(update={"gate_rounds": (), "final": False})
        path = Path(scratch) / "study.yaml"
        path.write_bytes(emit(study.model_copy(update={"evaluation": plain})))
        began = time.process_time()
        found = simulate(path, arrays, Division("equal", hospitals), masks=masks, compute=Compute(device="cpu"))
        processor = time.process_time() - began
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return {
        "n": hospitals,
        "d": found.vector.size,
        "masks": masks,
        "seconds_per_round": round(median(one.seconds for one in found.rounds), 2),
        "cpu_seconds_per_round": round(processor / ROUNDS, 2),  # of all cores, the opening of the data in it
        "peak_rss_mib": round(int(peak.split()[1]) / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", type=int, help="measure this many hospitals in this process and print the row")
    parser.add_argument("--masks", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.masks)))
        return
    found: dict[str, Any] = {"machine": machine(), "patients": PATIENTS, "steps": STEPS, "rows": []}
    print(f"{'hospitals':>10} {'masks':>6} {'seconds a round':>16} {'of processor':>13} {'peak MiB':>9}")
    for masks in ([], ["--masks"]):
        for hospitals in HOSPITALS:
            command = [sys.executable, __file__, "--one", str(hospitals), *masks]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found["rows"].append(row)
            shown = "yes" if row["masks"] else "no"
            seconds = f"{row['seconds_per_round']:>16} {row['cpu_seconds_per_round']:>13}"
            print(f"{hospitals:>10} {shown:>6} {seconds} {row['peak_rss_mib']:>9}", flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
