"""The worked example of docs/privacy.md by every accountant, and what rounding costs: `python bench/accounting.py`.

7 hospitals of 1,000 patients, q = .256, T = 79, ε = 3, δ = 1e-5, add/remove. Prints two tables and
one JSON object, which is also build/bench/accounting.json.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from services.common.dp.accounting import COARSE, Event, calibrate, epsilon, epsilon_rdp, solo_event  # noqa: E402
from services.common.dp.noise import sensitivity_rint, share_scale  # noqa: E402
from services.common.dp.prv import epsilon_prv  # noqa: E402

DELTA, RATE, STEPS, TARGET = 1e-5, 0.256, 79, 3.0
COHORTS = ((7, 0), (7, 1), (6, 1), (5, 1), (5, 2), (1, 0))  # (n_min, k) of 7 hospitals; the last one is `local`
HOSPITALS = 7


def smallest(of: Callable[[Event], float]) -> float:
    """The σ, to 1e-3, at which an accountant gives the target."""
    low, high = 1.0, 10.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if of(Event(RATE, middle, STEPS)) <= TARGET else (middle, high)
    return round(high, 3)


def main() -> None:
    sigma = calibrate(TARGET, DELTA, RATE, STEPS)
    event, bits = Event(RATE, sigma, STEPS), 24
    unit = math.ldexp(1.0, bits)
    rows = []
    for minimum, colluding in COHORTS:
        share = share_scale(sigma, unit, minimum, colluding) / unit
        whole = share * math.sqrt(HOSPITALS)
        rows.append({
            "n_min": minimum, "k": colluding, "share": round(share, 3), "std_of_sum": round(whole, 3),
            "gain": round(sigma * math.sqrt(HOSPITALS) / whole, 2),
            "epsilon_solo": round(epsilon([solo_event(event, minimum, colluding)], DELTA), 3),
        })  # fmt: skip
    overhead = [
        {
            "fraction_bits": bits,
            "parameters": d,
            "rounding_percent": round(100 * math.sqrt(d) / 2**bits, 4),
            "with_float32_percent": round(100 * (sensitivity_rint(bits, 1.0, d) / 2**bits - 1), 4),
        }
        for bits in (16, 18, 20, 24)
        for d in (9_000, 1_000_000, 11_000_000)
    ]
    found: dict[str, Any] = {
        "sigma": {
            "PLD": round(sigma, 4),
            "PRV": smallest(lambda e: epsilon_prv([e], DELTA, 1e-2)),
            "RDP": smallest(lambda e: epsilon_rdp([e], DELTA)),
        },
        "epsilon_at_the_pld_sigma": {
            "PLD": epsilon([event], DELTA), "PLD, coarser": epsilon([event], DELTA, COARSE),
            "PRV": epsilon_prv([event], DELTA), "RDP": epsilon_rdp([event], DELTA),
        },
        "shares": rows,
        "overhead": overhead,
    }  # fmt: skip
    for table in (rows, overhead):
        print(" ".join(f"{name:>21}" for name in table[0]))
        for row in table:
            print(" ".join(f"{value!s:>21}" for value in row.values()))
    print(json.dumps(found))
    path = ROOT / "build" / "bench" / "accounting.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
