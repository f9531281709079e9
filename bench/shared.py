"""Rounds a second under `shared`: `make bench-shared` prints where the time goes, writes build/bench/shared.json.

Four hospitals, four pods and the aggregator as processes on loopback mTLS; every round is one whole global step: a
linear head of 1280 features and 7 classes (d = 8,967), full batch of 1,000 patients at each hospital, clip, share of
the noise, ledger, masks, sum, SGD with momentum. The features are drawn and lie in the hospitals' caches beforehand, so
that no backbone is needed: what is timed is what happens in every round. The first rounds warm up and are left out.

Pictures and features are drawn once and kept in build/bench/shared-drawn: on ext4 without a journal every new file
waits while the kernel walks over those deleted in the last minutes, and a run that removed eight thousand slowed the
next one (docs/results.md).
"""

import argparse
import csv
import datetime
import hashlib
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.round import from_log, peak_mib, processor_seconds, stopping, waiting  # noqa: E402
from bench.secagg import machine  # noqa: E402
from services.aggregator.store import Store  # noqa: E402
from services.cli import federation  # noqa: E402
from services.cli.drafts import (  # noqa: E402
    privacy_section,
    server_section,
    training_section,
    unwritten_model,
    write_initial,
)
from services.cli.evidence import administration, status  # noqa: E402
from services.cli.federation import Federation  # noqa: E402
from services.cli.processes import Service, wait_for_file  # noqa: E402
from services.common.documents.shape import round_shape  # noqa: E402
from services.common.documents.study import (  # noqa: E402
    BackboneSection,
    CohortSection,
    EvaluationSection,
    Study,
    TimingSection,
)
from services.common.ids import Role  # noqa: E402

OUTPUT = ROOT / "build" / "bench" / "shared.json"
SCRATCH = ROOT / "build" / "bench" / "shared"
DRAWN = ROOT / "build" / "bench" / "shared-drawn"
HOSPITALS = ("alice", "bob", "carol", "dave")
CLASSES = tuple("abcdefg")
PATIENTS, FEATURES, SIDE = 1000, 1280, 8
PODS, THRESHOLD = 4, 2
COHORT = CohortSection(minimum=3, colluding_hospitals=1)
WARM = 5  # rounds that are left out


def lay_out(folder: Path, rounds: int) -> Federation:
    sites = federation.make_sites(folder, list(HOSPITALS), PODS)
    charter = federation.write_charter(
        folder, sites, federation.committee_of(PODS, THRESHOLD), COHORT.minimum, COHORT.colluding_hospitals
    )
    backbone = BackboneSection(name="efficientnet-lite0", sha256=hashlib.sha256(b"drawn features").hexdigest())
    model = write_initial(unwritten_model("linear-head", SIDE, CLASSES, backbone), folder / "v0.safetensors", seed=1)
    study = Study(
        wardround="study/v1",
        name="shared-round-times",
        purpose="Measures how long a round of shared noise takes; the data are drawn.",
        expires=datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=1),
        rounds=rounds,
        synthetic=True,
        model=model,
        privacy=privacy_section(
            mechanism="shared", epsilon=8.0, delta=1e-5, sampling_rate=1.0, patients=dict.fromkeys(HOSPITALS, PATIENTS),
            steps=1, rounds=rounds, parameters=model.parameters, cohort=COHORT, largest_cohort=len(HOSPITALS),
        ),
        training=training_section("shared", 1.0, momentum=0.0),
        evaluation=EvaluationSection(final=False),
        server=server_section("shared", 5.0, 0.9, rounds),
        cohort=COHORT,
        timing=TimingSection(train_seconds=0, submit_seconds=120, attempt_seconds=240),
    )  # fmt: skip
    data = {name: write_data(DRAWN / name, seed) for seed, name in enumerate(HOSPITALS)}
    for seed, site in enumerate(site for site in sites if site.role is Role.HOSPITAL):
        (DRAWN / f"{site.id}-features").mkdir(exist_ok=True)
        site.state.mkdir(parents=True, exist_ok=True)
        (site.state / "features").symlink_to(DRAWN / f"{site.id}-features")
        fill_cache(site.state, data[site.id], study, seed)
    laid = federation.write_study(folder, sites, charter, study)
    federation.write_configs(laid, data, through_round=rounds, threads=1)
    return laid


def write_data(folder: Path, seed: int) -> Path:
    """PATIENTS tiny pictures of noise, one for each patient, all for training; the table is written last."""
    from PIL import Image

    if (folder / "metadata.csv").exists():
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(seed)  # no privacy is claimed for drawn pictures
    for number in range(PATIENTS):
        Image.fromarray(drawn.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"images/{number}.png")
    with (folder / "metadata.csv").open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["image_id", "path", "patient_id", "label", "fold"])
        table.writerows(
            [number, f"images/{number}.png", f"p{number}", CLASSES[number % 7], "train"] for number in range(PATIENTS)
        )
    return folder


def fill_cache(state: Path, data: Path, study: Study, seed: int) -> None:
    """Features as a backbone would have left them: unit vectors that lean towards their class."""
    from services.hospital_node.dataset import load_dataset
    from services.hospital_node.inputs import feature_cache, write_feature

    drawn, model = np.random.default_rng(100 + seed), study.model
    assert model.backbone is not None
    dataset = load_dataset(data, model.classes, model.image_size, state)
    centres = np.random.default_rng(7).normal(size=(len(CLASSES), FEATURES))
    for image, place in enumerate(feature_cache(dataset, model.backbone)):
        feature = drawn.normal(size=FEATURES) + 0.3 * centres[dataset.labels[image]]
        if not place.exists():
            write_feature(place, (feature / np.linalg.norm(feature)).astype("<f4").tobytes())


def hospital_seconds(laid: Federation) -> dict[str, float]:
    """What one hospital computes in a round, in this process alone: medians of ten."""
    import secrets

    from services.hospital_node.release import encode_round
    from services.hospital_node.trainer import SiteTrainer
    from services.hospital_node.training import Compute

    site, times = laid.of(Role.HOSPITAL)[0], []
    trainer = SiteTrainer(DRAWN / site.id, site.state, Compute(threads=1))
    shape = round_shape(laid.charter, laid.study, 1)
    for _ in range(11):
        began = time.perf_counter()
        total = trainer.train(laid.study, 1, laid.root / "v0.safetensors", b"", lambda: False, None)
        clipped = time.perf_counter()
        for _ in encode_round(laid.study.document, shape, total, None, lambda: secrets.token_bytes(32)):
            pass
        times.append((clipped - began, time.perf_counter() - clipped))
    gradient, noise = (median(part[i] for part in times[1:]) for i in range(2))
    return {"clipped sum": round(gradient, 5), "rint, noise, lanes": round(noise, 5)}


def measure(laid: Federation, rounds: int) -> dict[str, Any]:
    services = {site.id: federation.service(laid, site) for site in laid.sites}
    centre = services[laid.aggregator.id]
    roles: dict[str, list[Service]] = {
        "aggregator": [centre],
        "pod": [services[site.id] for site in laid.of(Role.POD)],
        "hospital": [services[site.id] for site in laid.of(Role.HOSPITAL)],
    }
    with stopping(roles):
        centre.start()
        address = wait_for_file(laid.aggregator.state / "listen.address", centre, 60)
        federation.set_aggregator_address(laid, address)
        for service in services.values():
            if service is not centre:
                service.start()
        with administration(laid, laid.aggregator, address) as stub:
            marks: list[tuple[int, dict[str, float]]] = []  # (round that was going on, processor seconds until then)
            for _ in waiting(roles):
                now = status(stub)
                if now is not None and now.round > WARM:
                    marks = [*marks[:1], (now.round + int(now.finished), processor_seconds(roles))]
                if now is not None and now.finished:
                    break
        memory = peak_mib(roles)
    if len(marks) < 2 or marks[0][0] == marks[1][0]:
        raise RuntimeError("the rounds were over before two looks at them: give more --rounds")
    (first, before), (last, after) = marks  # an estimate: a mark lies somewhere inside its round
    spent = {role: round((after[role] - before[role]) / (last - first), 4) for role in roles}
    store = Store(laid.aggregator.state)
    try:
        found = from_log(store.facts(laid.study.digest), WARM)
    finally:
        store.close()
    seconds = sum(found["seconds"])
    return {
        "rounds": rounds - WARM,
        "rounds_per_second": round((rounds - WARM) / seconds, 3),
        **found,
        "processor_seconds_a_round": spent,
        "peak_rss_mib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds + WARM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that every process is stopped
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    try:
        laid = lay_out(SCRATCH, rounds)
        report = {
            "machine": machine(),
            "hospitals": len(HOSPITALS),
            "committee": [PODS, THRESHOLD],
            "parameters": laid.study.document.model.parameters,
            "patients_each": PATIENTS,
            "hospital_seconds": hospital_seconds(laid),
            **measure(laid, rounds),
        }
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['rounds_per_second']} rounds a second, median {report['seconds_median']} s; of which, in seconds:")
    for name, value in {**report["steps"], **report["hospital_seconds"]}.items():
        print(f"  {name:24} {value:.4f}")
    spent, cores = report["processor_seconds_a_round"], report["machine"]["cores"]
    each = ", ".join(f"{role} {seconds:.4f}" for role, seconds in spent.items())
    most = cores / sum(spent.values())
    print(f"processor seconds a round: {each}; so {cores} cores give {most:.2f} rounds a second at the very most")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
