"""How fast the integer noise is drawn, on one core: `make bench-noise` writes build/bench/noise.json."""

import json
import os
import platform
import time
from pathlib import Path

from services.common.dp.noise import DiscreteGaussian

SCALES = [256, 2**18, 2**24, 2**30]
DRAWS, TIMES = 2_000_000, 5


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    rows = []
    for scale in SCALES:
        began = time.perf_counter()
        noise = DiscreteGaussian(scale)
        built = time.perf_counter() - began
        best = float("inf")
        for _ in range(TIMES):
            key, began = os.urandom(32), time.thread_time()  # of this core alone, whoever else is busy
            noise.draw(key, DRAWS)
            best = min(best, time.thread_time() - began)
        rows.append({"scale": scale, "draws_per_second": round(DRAWS / best), "table_seconds": round(built, 4)})
    print(f"{'scale':>12} {'draws a second':>16} {'table, seconds':>15}")
    for row in rows:
        print(f"{row['scale']:>12} {row['draws_per_second']:>16,} {row['table_seconds']:>15}")
    found = {
        "machine": f"{processor()}, {os.cpu_count()} cores, one used",
        "method": f"processor time, best of {TIMES} runs of {DRAWS:,} draws",
        "draws_per_second": next(row["draws_per_second"] for row in rows if row["scale"] == 2**18),
        "rows": rows,
    }
    path = Path("build/bench/noise.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
