"""Measures the secure aggregation core: `make bench-secagg` prints a table and writes build/bench/secagg.json.

Each row runs in a process of its own, so that its peak memory is its own. The hospital's ns_per_parameter is
wall time on all cores (cpu_ns_per_parameter beside it: the sum over cores); pod and aggregator use one core
and are measured in that core's own time, per hospital·parameter. Inputs of the aggregator rotate through
64 MiB, so that they come from memory and not from a cache.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "build" / "bench" / "secagg.json"
SIZES = (1_000_000, 11_000_000)
COMMITTEES = {(4, 2): 3, (5, 3): 4}
RINGS = (16, 24, 32)
HOSPITALS = 10
REPEATS = 3
# protocol.md §8, ns a parameter: (role, verify, (m, t)) -> goal
GOALS = {
    ("hospital", None, (5, 3)): 9.0, ("hospital", None, (4, 2)): 5.0,
    ("pod", "none", (5, 3)): 1.7, ("pod", "none", (4, 2)): 1.1,
    ("pod", "one", (5, 3)): 2.4, ("pod", "one", (4, 2)): 1.7,
    ("aggregator", None, (5, 3)): 0.3, ("aggregator", None, (4, 2)): 0.3,
}  # fmt: skip
UPLOAD_GOALS = {16: 0.51, 24: 0.76, 32: 1.01}  # times plain fp32 FedAvg


def plan() -> list[dict[str, Any]]:
    """All rows to measure, without their figures."""
    found = []
    for role, verify in (("hospital", None), ("pod", "none"), ("pod", "one"), ("aggregator", None)):
        for d in SIZES:
            for m, t in COMMITTEES:
                for bits in RINGS:
                    row = {"role": role, "m": m, "t": t, "ring_bits": bits, "d": d}
                    row["n"] = 1 if role == "hospital" else HOSPITALS
                    found.append(row | ({"verify": verify} if verify else {}))
    return found


def peak_rss_mib() -> float:
    """This process's own peak; ru_maxrss would carry over what the parent had at the fork."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError("no VmHWM in /proc/self/status")


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, float]:
    """Medians of (wall time, time on cores) of `work`."""
    wall, cores = [], []
    for _ in range(repeats):
        start, started = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        cores.append(time.process_time() - started)
    return median(wall), median(cores)


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its figures, measured in this process."""
    from services.common.secagg.committee import Committee
    from services.common.secagg.encoding import SENTINEL, LaneTable
    from services.common.secagg.messages import LaneClass

    m, t, bits, d = row["m"], row["t"], row["ring_bits"], row["d"]
    committee = Committee(m, t, COMMITTEES[m, t])
    bound = (2 ** (bits - 1) - 1) // HOSPITALS
    table = LaneTable((SENTINEL, LaneClass("parameter", d, bits - 8, bound, 1)), bits)
    table.check(HOSPITALS)
    role = {"hospital": hospital, "pod": pod, "aggregator": aggregator}[row["role"]]
    (wall, cores), sent = role(committee, table, row)
    taken = wall if row["role"] == "hospital" else cores
    return row | {
        "bytes_per_parameter": round(sent / (row["n"] * d), 4),
        "ns_per_parameter": round(taken * 1e9 / (row["n"] * d), 3),
        "cpu_ns_per_parameter": round(cores * 1e9 / (row["n"] * d), 3),
        "peak_rss_mib": peak_rss_mib(),
    }


def hospital(committee: Any, table: Any, row: dict[str, Any]) -> tuple[tuple[float, float], int]:
    """Clip, round, encode, mask and hash on all cores; bytes of the whole upload."""
    import numpy as np

    from services.common.secagg import masking, sealing
    from services.common.secagg.digests import chunk_digest, vector_digest
    from services.common.secagg.encoding import encode_vector
    from services.common.secagg.ring import CHUNK_BYTES
    from services.common.secagg.rounding import clip_update

    d, lane = row["d"], table.lanes[1]
    # Spread over the range that the bound leaves: sin is a stand-in for an update.
    update = np.sin(np.arange(d, dtype=np.float64)) * (lane.bound - 1) / 2**lane.fraction_bits
    keys = [bytes([j]) * 32 for j in range(len(committee.pieces))]
    # Stochastic where codes are short, as §6 says.
    rounding = bytes(32) if row["ring_bits"] == 16 else None

    total = table.total_bytes

    def work() -> None:
        clipped = clip_update(update, 1e9, lane.bound / 2**lane.fraction_bits, rounding)
        chunks = list(encode_vector(table, {"parameter": clipped}, bytes))

        def fill(start: int, out: memoryview) -> None:
            out[:] = chunks[start // CHUNK_BYTES]

        vector_digest(total, masking.mask_vector(fill, total, table.ring, keys, chunk_digest))

    boxes = committee.pods * sealing.box_bytes(1, len(committee.pieces_of(0)))
    header = 350 + 34 * len(committee.pieces) + 40 * committee.pods
    return seconds(work), total + boxes + header


def pod(committee: Any, table: Any, row: dict[str, Any]) -> tuple[tuple[float, float], int]:
    """Sum the streams of this pod's pieces over the cohort and hash them, on one core; bytes that it returns."""
    from services.common.secagg import masking
    from services.common.secagg.digests import chunk_digest, vector_digest
    from services.common.secagg.ring import chunk_lengths

    shared = committee.assign(range(committee.pods))
    busiest = max(shared.release, key=lambda index: len(shared.release[index]))
    released = shared.release[busiest]
    also = shared.digest[busiest] if row["verify"] == "one" else ()
    keys = [bytes([h]) * 32 for h in range(HOSPITALS)]
    total = table.total_bytes

    def keep(chunk: memoryview) -> bytes:
        bytes(chunk)  # a sum that is released is copied for the wire, one that is only digested is not
        return chunk_digest(chunk)

    def work() -> None:
        chunks = len(chunk_lengths(total))
        for take in (*[keep] * len(released), *[chunk_digest] * len(also)):
            vector_digest(total, masking.sum_streams(keys, table.ring, total, 0, chunks, take, workers=1))

    return seconds(work, 1 if row["d"] > 10**6 else REPEATS), total * len(released)


def aggregator(committee: Any, table: Any, row: dict[str, Any]) -> tuple[tuple[float, float], int]:
    """Add every hospital's vector and subtract every piece's mask on one core; bytes that come in."""
    import numpy as np

    from services.common.secagg.ring import CHUNK_BYTES, RingSum, chunk_lengths

    inputs = [bytes([i]) * CHUNK_BYTES for i in range(64)]
    pieces = len(committee.pieces)

    def work() -> None:
        source = cycle(inputs)
        total, out = RingSum(table.ring, CHUNK_BYTES), np.empty(CHUNK_BYTES, np.uint8)
        for length in chunk_lengths(table.total_bytes):
            if total.size != length:
                total = RingSum(table.ring, length)
            for chunk in islice(source, HOSPITALS):
                total.add(memoryview(chunk)[:length])
            for chunk in islice(source, pieces):
                total.subtract(memoryview(chunk)[:length])
            total.take(out[:length])

    return seconds(work), table.total_bytes * (HOSPITALS + pieces)


def floor() -> dict[str, float]:
    """Raw speeds of this machine right now, one core: what nothing here can beat."""
    import hashlib

    import numpy as np
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    size = 1_048_560
    zeros, out = bytes(size), bytearray(size)
    stream = Cipher(AES256(bytes(32)), CTR(bytes(16))).encryptor()
    lanes, other = np.zeros(size // 4, np.uint32), np.ones(size // 4, np.uint32)
    return {
        "aes_256_ctr_gb_per_s": round(size / seconds(lambda: stream.update_into(zeros, out), 400)[1] / 1e9, 2),
        "uint32_add_gb_per_s": round(size / seconds(lambda: np.add(lanes, other, out=lanes), 400)[1] / 1e9, 2),
        "sha256_gb_per_s": round(size / seconds(lambda: hashlib.sha256(out).digest(), 100)[1] / 1e9, 2),
    }


def child(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(task)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return dict(json.loads(done.stdout))


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    import os

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "vaes": "vaes" in Path("/proc/cpuinfo").read_text(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(width=None if sys.stdout.isatty() else 120)
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    rows = plan()
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        job = bar.add_task("raw speeds", total=len(rows) + 1)
        report["floor"] = child({"floor": True})
        for row in rows:
            bar.update(job, advance=1, description="{role} ({m},{t}) {ring_bits} bit d={d:,}".format(**row))
            report["rows"].append(child(row))
        bar.update(job, advance=1)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    show(console, report)


def show(console: Any, report: dict[str, Any]) -> None:
    """The table, goals beside the figures."""
    from rich.table import Table

    table = Table(title="Secure aggregation core", caption=f"{report['machine']}\n{report['floor']}")
    for name in (
        "role",
        "m,t",
        "ring",
        "d",
        "n",
        "bytes/parameter",
        "goal",
        "ns/parameter",
        "goal",
        "cpu ns",
        "peak MiB",
    ):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        goal = GOALS[row["role"], row.get("verify"), (row["m"], row["t"])]
        upload = f"{4 * UPLOAD_GOALS[row['ring_bits']]:.2f}" if row["role"] == "hospital" else ""
        name = row["role"] + ("+verify" if row.get("verify") == "one" else "")
        took = row["ns_per_parameter"]
        style = "green" if took <= goal else "yellow"
        table.add_row(
            name, f"{row['m']},{row['t']}", str(row["ring_bits"]), f"{row['d']:,}", str(row["n"]),
            f"{row['bytes_per_parameter']:.3f}", upload, f"[{style}]{took:.3f}[/]", f"{goal}",
            f"{row['cpu_ns_per_parameter']:.3f}", f"{row['peak_rss_mib']}",
        )  # fmt: skip
    console.print(table)
    console.print(f"written to {OUTPUT}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        task = json.loads(sys.argv[1])
        print(json.dumps(floor() if "floor" in task else measure(task)))
    else:
        main()
