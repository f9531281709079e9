"""What a study claims, in words and figures: ε and ε_solo side by side, wherever an ε is shown (privacy.md §2)."""

import math
from typing import Any

from services.common.documents.costs import study_epsilon
from services.common.documents.study import Study


def claim(study: Study) -> dict[str, Any]:
    """All that a claim names: (ε, δ, adjacency, unit, n_min, k, ε_solo), and against whom. ε is None under `none`."""
    privacy, solo = study.privacy, study_epsilon(study, solo=True)
    return {
        "mechanism": privacy.mechanism,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "adjacency": "add/remove",
        "unit": privacy.unit,
        "minimum_cohort": study.cohort.minimum,
        "colluding_hospitals": study.cohort.colluding_hospitals,
        "against": privacy.against if privacy.mechanism == "shared" else "anybody",
        "epsilon_solo": max(solo.values(), default=None),
    }


def claim_in_words(claimed: dict[str, Any], unit: str) -> str:
    """One sentence of `claim` for people; `unit`: the word for what the privacy unit really is."""
    if claimed["epsilon"] is None:
        return "no noise was added: no ε is claimed, only sums are hidden"
    words = f"ε = {claimed['epsilon']:g} at δ = {claimed['delta']:g} for one {unit} of one hospital, add/remove; "
    if claimed["mechanism"] == "local":
        return words + "mechanism local, so it holds whoever else colludes"
    minimum, colluding = claimed["minimum_cohort"], claimed["colluding_hospitals"]
    who = "against the aggregator and the public ONLY, not against a fellow hospital (k = 0)"
    if claimed["against"] == "hospitals":
        who = f"against fellow hospitals too, while at most k = {colluding} of them collude"
    return (
        f"{words}mechanism shared: it holds {who}, and every sum is over at least {minimum} hospitals; "
        f"ε_solo = {up(claimed['epsilon_solo'], 2)} if all the others collude or fail"
    )


def up(value: float, digits: int = 3) -> str:
    """Rounded up: an ε that is shown is one that the accounting proves."""
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}" if math.isfinite(value) else "not bounded"
