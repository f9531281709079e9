"""The hospital's metrics (prefix wardround_). The scraper need not be the site's own, so nothing here depends on
patients' data: no losses, no batch sizes, no training failures; ε is a function of the study and the rounds alone.
"""

from prometheus_client import Counter, Gauge

from services.common.errors import Reason
from services.hospital_node.ports import Progress

PHASES = (
    "starting",
    "idle",
    "waiting",
    "fetching",
    "training",
    "trained",
    "submitting",
    "submitted",
    "refused",
    "retrying",
    "stopped",
    "finished",
)
DATA_REASONS = frozenset({Reason.NOT_FINITE, Reason.OUT_OF_BOUND, Reason.INVALID_DATA})
"""Refusals that follow from the data: never counted, never sent (P-6)."""

_PHASE = Gauge("wardround_hospital_phase", "1 for what this hospital is doing now", ["phase"])
_ROUND = Gauge("wardround_hospital_round", "Round that the aggregator has open, as this hospital sees it")
_EPSILON = Gauge(
    "wardround_privacy_epsilon", "ε by scope: of this study and of the data set, spent and left", ["scope", "kind"]
)
_ROUNDS_LEFT = Gauge("wardround_privacy_rounds_left", "Training rounds that the ε caps still allow")
_REFUSALS = Counter("wardround_refusals_total", "Rounds or attempts that this hospital refused", ["reason"])
_HALTED = Gauge("wardround_study_halted", "1 when an alarm stopped the open study here")
_CONNECTED = Gauge("wardround_connected", "1 while the aggregator's state is being watched")
_LEDGER = Gauge("wardround_ledger_events", "Debits in the ledger")

_FIGURES = {
    "epsilon_spent": ("study", "spent"),
    "epsilon_left": ("study", "left"),
    "dataset_epsilon_spent": ("dataset", "spent"),
}


def show(progress: Progress) -> None:
    """Take what the node does now."""
    for phase in PHASES:
        _PHASE.labels(phase).set(phase == progress.phase)
    _ROUND.set(progress.round)
    for name, labels in _FIGURES.items():
        if name in progress.figures:
            _EPSILON.labels(*labels).set(progress.figures[name])
    if "rounds_left" in progress.figures:
        _ROUNDS_LEFT.set(progress.figures["rounds_left"])


def refused(reason: Reason) -> None:
    """Count a refusal, unless it would tell something about the data."""
    if reason not in DATA_REASONS:
        _REFUSALS.labels(reason.value).inc()


def halted(is_halted: bool) -> None:
    """Whether the open study is stopped here."""
    _HALTED.set(is_halted)


def connected(is_connected: bool) -> None:
    """Whether the watch stream is open."""
    _CONNECTED.set(is_connected)


def ledger_events(count: int) -> None:
    """How many debits the ledger holds."""
    _LEDGER.set(count)
