"""Measures a whole secure round against plain FedAvg: `make bench-round` prints a table, writes build/bench/round.json.

Real processes over mTLS on this machine, one federation for each row: `secure` is the aggregator, the pods and the
hospitals as they are deployed, with training left out (round_hospital.py); `plain` is one server and n clients over
the same gRPC stack (plain_round.py) that keeps nothing on the disk, `plain-durable` the same with every update and
model on the disk before it counts, as any server must that may be killed. A round lasts from its opening to the next
model being published, by the server's clock: in secure mode to the next `Opened` (or `Finished`) of the event log. The
first round warms up and is discarded. All sites share this machine's cores, so times add up what different machines
would do side by side.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.secagg import machine  # noqa: E402
from services.aggregator import facts as f  # noqa: E402
from services.aggregator.store import Store  # noqa: E402
from services.cli import federation  # noqa: E402
from services.cli.evidence import administration, status  # noqa: E402
from services.cli.federation import Federation  # noqa: E402
from services.cli.processes import Service, stop_all, wait_for_file  # noqa: E402
from services.common.documents.study import Study  # noqa: E402
from services.common.ids import Role  # noqa: E402

OUTPUT = ROOT / "build" / "bench" / "round.json"
SCRATCH = ROOT / "build" / "bench" / "scratch"
HOSPITALS = (4, 10)
SIZES = (9_000, 1_000_000, 11_000_000)
PODS, THRESHOLD = 4, 2
ROUNDS = 5  # in each row, the first one discarded
PATIENCE = 1200.0  # seconds for one row
STEPS = ("propose to endorse", "submissions", "offer", "lock", "release", "tally")
Told = Callable[[int], None]


def lay_out(folder: Path, n: int, d: int) -> Federation:
    """A federation of n hospitals whose study moves d numbers a round, under mechanism `none`."""
    folder.mkdir(parents=True)
    names = [f"ward-{i + 1:02d}" for i in range(n)]
    sites = federation.make_sites(folder, names, PODS)
    charter = federation.write_charter(folder, sites, federation.committee_of(PODS, THRESHOLD), 3, 1)
    study = Study.model_validate(
        {
            "wardround": "study/v1",
            "name": "round-times",
            "purpose": "Measures how long a round takes; nothing is trained.",
            "expires": datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=1),
            "rounds": ROUNDS,
            "synthetic": True,
            "model": {
                "architecture": "small-cnn",
                "image_size": 28,
                "classes": ["a", "b"],
                "parameters": d,
                "initial": write_model(folder / "v0.safetensors", d),
            },
            "privacy": {
                "mechanism": "none",
                "none_accepted": "Nobody's data are here; only time is measured.",
            },
            "training": {"learning_rate": 0.1},
            "encoding": {"ring_bits": 32, "update_clip": 1.0, "update_bound": 0.5},
            "evaluation": {"final": False},
            "cohort": {"minimum": 3, "colluding_hospitals": 1},
            "timing": {"train_seconds": 0, "submit_seconds": PATIENCE, "attempt_seconds": 2 * PATIENCE},
        }
    )
    laid = federation.write_study(folder, sites, charter, study)
    federation.write_configs(laid, dict.fromkeys(names, folder), through_round=ROUNDS, threads=1)
    return laid


def write_model(path: Path, d: int) -> str:
    """A model file of one F32 tensor of d zeros; its SHA-256 in hex. (models.py would import torch.)"""
    header = json.dumps({"w": {"dtype": "F32", "shape": [d], "data_offsets": [0, 4 * d]}}).encode()
    header += b" " * (-len(header) % 8)
    blob = len(header).to_bytes(8, "little") + header + bytes(4 * d)
    path.write_bytes(blob)
    return hashlib.sha256(blob).hexdigest()


def secure(laid: Federation, n: int, d: int, told: Told) -> dict[str, Any]:
    """The figures of one secure federation."""
    services = {site.id: federation.service(laid, site) for site in laid.sites}
    for site in laid.of(Role.HOSPITAL):
        services[site.id].module = "bench.round_hospital"
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
            for _ in waiting(roles):
                now = status(stub)
                if now is not None:
                    told(ROUNDS if now.finished else max(0, now.round - 1))
                    if now.finished:
                        break
        memory = peak_mib(roles)
    store = Store(laid.aggregator.state)
    try:
        return from_log(store.facts(laid.study.digest)) | {"peak_rss_mib": memory}
    finally:
        store.close()


def from_log(log: list[f.Fact], warm: int = 1) -> dict[str, Any]:
    """Medians over the rounds but the first `warm` ones: the whole round, and its steps."""
    opened = [i for i, fact in enumerate(log) if isinstance(fact, f.Opened)]
    ends = [*opened[1:], next(i for i, fact in enumerate(log) if isinstance(fact, f.Finished))]
    rounds = []
    for start, end in zip(opened, ends, strict=True):
        part = log[start:end]
        if any(isinstance(fact, f.AbandonDecided | f.AttemptFailed | f.Stalled) for fact in part):
            raise RuntimeError("a round needed a second attempt or stalled: the machine is too busy to measure")
        last = {type(fact): fact.at for fact in part}
        marks = (f.Opened, f.Collecting, f.Submitted, f.CohortFixed, f.Certified, f.Verified)
        times = [*(last[kind] for kind in marks), log[end].at]
        rounds.append([(b - a) / 1000 for a, b in pairwise(times)])
    measured = rounds[warm:]
    return {
        "seconds_median": round(median(map(sum, measured)), 4),
        "seconds": [round(sum(steps), 4) for steps in measured],
        "steps": {name: round(median(steps[i] for steps in measured), 4) for i, name in enumerate(STEPS)},
    }


def plain(laid: Federation, n: int, d: int, told: Told, durable: bool = False) -> dict[str, Any]:
    """The figures of plain FedAvg among the same sites, with the same certificates."""
    common = {"charter": str(laid.root / "charter.yaml"), "clients": n, "parameters": d, "rounds": ROUNDS}
    common["durable"] = durable
    state = laid.aggregator.state

    def process(site: federation.Site, role: str, **more: str) -> Service:
        config = site.folder / "plain.json"
        config.write_text(json.dumps(common | {"role": role, "id": site.id, "folder": str(site.folder)} | more))
        return Service(site.id, "bench.plain_round", config, laid.root / "logs" / f"{site.id}.log")

    server = process(laid.aggregator, "server", state=str(state))
    roles: dict[str, list[Service]] = {"aggregator": [server], "hospital": []}
    with stopping(roles):
        server.start()
        address = wait_for_file(state / "listen.address", server, 60)
        for site in laid.of(Role.HOSPITAL):
            client = process(site, "client", address=address)
            roles["hospital"].append(client)
            client.start()
        seconds: list[float] = []
        for _ in waiting(roles):
            if (state / "times.json").exists():
                seconds = json.loads((state / "times.json").read_text())
                told(len(seconds))
                if len(seconds) == ROUNDS:
                    break
        memory = peak_mib(roles)
    measured = [round(second, 4) for second in seconds[1:]]
    return {"seconds_median": round(median(measured), 4), "seconds": measured, "peak_rss_mib": memory}


@contextmanager
def stopping(roles: dict[str, list[Service]]) -> Iterator[None]:
    """Whatever happens inside, every process is gone afterwards."""
    try:
        yield
    finally:
        stop_all([service for services in roles.values() for service in services])


def waiting(roles: dict[str, list[Service]]) -> Iterator[None]:
    """Look again every quarter of a second; raise when a process ended, or when it takes too long."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for service in (service for services in roles.values() for service in services):
            if not service.running:
                raise RuntimeError(f"{service.name} ended by itself:\n{service.last_words(20)}")
        yield
        time.sleep(0.25)
    raise RuntimeError(f"no end after {PATIENCE:.0f} s; the logs are in {SCRATCH}")


def peak_mib(roles: dict[str, list[Service]]) -> dict[str, float]:
    """The largest resident set that any process of a role ever had, MiB (VmHWM)."""
    return {role: max(map(_peak, services)) for role, services in roles.items()}


def _peak(service: Service) -> float:
    if service.process is None:
        raise RuntimeError(f"{service.name} was never started")
    for line in Path(f"/proc/{service.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"no VmHWM of {service.name}")


def processor_seconds(roles: dict[str, list[Service]]) -> dict[str, float]:
    """Processor time of all processes of a role until now, user and system together (proc(5), stat)."""
    return {role: sum(map(_processor_seconds, services)) for role, services in roles.items()}


def _processor_seconds(service: Service) -> float:
    if service.process is None:
        raise RuntimeError(f"{service.name} was never started")
    fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disk_speed() -> float:
    """MB/s of one fsynced write of 64 MB: in secure mode all sites' vectors reach this one disk."""
    path, block = SCRATCH / "disk", os.urandom(1 << 20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return round((64 << 20) / seconds / 1e6, 1)


def main() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 hospitals, 9k and 1M numbers only")
    quick = parser.parse_args().quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that every process is stopped
    cases = [(n, d) for n in (HOSPITALS[:1] if quick else HOSPITALS) for d in (SIZES[:2] if quick else SIZES)]
    console = Console(width=None if sys.stdout.isatty() else 130)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    report: dict[str, Any] = {
        "machine": machine() | {"disk_mb_per_s": disk_speed()},
        "committee": [PODS, THRESHOLD],
        "ring_bits": 32,
        "rounds": ROUNDS,
        "discarded": 1,
        "rows": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bar:
            job = bar.add_task("rounds", total=len(MODES) * ROUNDS * len(cases))
            for count, (n, d, mode, measure) in enumerate(
                (n, d, mode, measure) for n, d in cases for mode, measure in MODES.items()
            ):
                bar.update(job, description=f"{mode} n={n} d={d:,}")
                laid = lay_out(SCRATCH / f"{mode}-{n}-{d}", n, d)
                figures = measure(laid, n, d, lambda done, past=count: bar.update(job, completed=past * ROUNDS + done))
                report["rows"].append({"mode": mode, "n": n, "d": d} | figures)
                shutil.rmtree(laid.root)
                OUTPUT.write_text(json.dumps(report, indent=1) + "\n")  # after every row: what was measured stays
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    show(console, report)


MODES: dict[str, Callable[[Federation, int, int, Told], dict[str, Any]]] = {
    "plain": plain,
    "plain-durable": partial(plain, durable=True),
    "secure": secure,
}


def show(console: Any, report: dict[str, Any]) -> None:
    """Secure beside plain, then where the secure round's time goes."""
    from rich.table import Table

    rows = {(row["mode"], row["n"], row["d"]): row for row in report["rows"]}
    table = Table(title=f"One round, committee ({PODS},{THRESHOLD}), 32-bit ring", caption=str(report["machine"]))
    steps = Table(title="Where the secure round's time goes, seconds (medians)")
    for name in ("n", "d", "plain s", "durable s", "secure s", "ratio", "plain peak MiB", "secure peak MiB"):
        table.add_column(name, justify="right")
    for name in ("n", "d", *STEPS):
        steps.add_column(name, justify="right")
    for (mode, n, d), row in rows.items():
        if mode != "secure":
            continue
        base, durable = rows["plain", n, d], rows["plain-durable", n, d]["seconds_median"]
        ratio = row["seconds_median"] / base["seconds_median"]
        less = row["seconds_median"] / durable
        memory = [
            ", ".join(f"{role} {peak:.0f}" for role, peak in each["peak_rss_mib"].items()) for each in (base, row)
        ]
        table.add_row(
            str(n), f"{d:,}", f"{base['seconds_median']:.3f}", f"{durable:.3f}", f"{row['seconds_median']:.3f}",
            f"{ratio:.2f} / {less:.2f}", *memory,
        )  # fmt: skip
        steps.add_row(str(n), f"{d:,}", *(f"{row['steps'][name]:.3f}" for name in STEPS))
    console.print(table)
    console.print(steps)
    console.print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
