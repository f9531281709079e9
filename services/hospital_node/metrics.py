"""The hospital's metrics (prefix wardround_). The scraper need not be the site's own, so nothing here depends on
patients' data: no losses, no batch sizes, no training failures, no processor time, nor when training was done, which at
q < 1 tells how many were drawn; ε is a function of the study and the rounds alone.
"""

import contextlib
from collections.abc import Mapping

from prometheus_client import GC_COLLECTOR, PROCESS_COLLECTOR, REGISTRY, Counter, Gauge

from services.common.documents.policy import LoadedPolicy
from services.common.errors import Reason
from services.common.observe.process import short, show_studies
from services.hospital_node.ports import Progress

PHASES = (
    "starting",
    "idle",
    "waiting",
    "fetching",
    "training",
    "submitting",
    "submitted",
    "refused",
    "retrying",
    "stopped",
    "finished",
)
DATA_REASONS = frozenset({Reason.NOT_FINITE, Reason.OUT_OF_BOUND, Reason.INVALID_DATA})
"""Refusals that follow from the data: never counted, never sent (P-6)."""

_STUDY = ["study"]  # the first twelve hex digits of its SHA-256

_PHASE = Gauge("wardround_hospital_phase", "1 for what this hospital is doing now, 0 for the others", ["phase"])
_ROUND = Gauge("wardround_hospital_round", "Round that the aggregator has open, as this hospital sees it")
_MODEL = Gauge("wardround_hospital_model_version", "Version of the newest model that signed results lead to")
_SPENT = Gauge("wardround_privacy_epsilon_spent", "ε of this study that the ledger proves", _STUDY)
_SOLO = Gauge(
    "wardround_privacy_epsilon_solo_spent", "ε of this study if all other hospitals and the pods fail", _STUDY
)
_LEFT = Gauge("wardround_privacy_epsilon_left", "ε that the policy still allows this study", _STUDY)
_CAP = Gauge("wardround_privacy_epsilon_cap", "ε that the policy allows this study in all", _STUDY)
_ROUNDS_LEFT = Gauge(
    "wardround_privacy_rounds_left",
    "Training rounds that the caps still allow, the open one included, at most those that the study still has",
    _STUDY,
)
_ROUNDS_PLANNED = Gauge(
    "wardround_study_rounds_left", "Training rounds that the study still has, the open one included", _STUDY
)
_DATASET_SPENT = Gauge("wardround_privacy_dataset_epsilon_spent", "ε of the data set over all studies")
_DATASET_SOLO = Gauge(
    "wardround_privacy_dataset_epsilon_solo_spent", "ε of the data set if all other hospitals and the pods fail"
)
_DATASET_LEFT = Gauge("wardround_privacy_dataset_epsilon_left", "ε that the policy still allows the data set")
_DATASET_CAP = Gauge("wardround_privacy_dataset_epsilon_cap", "ε that the policy allows the data set in all")
_REFUSALS = Counter("wardround_refusals_total", "Rounds that this hospital refused", ["reason"])
_HALTED = Gauge("wardround_study_halted", "1 when an alarm stopped the open study here, else 0")
_CONNECTED = Gauge("wardround_connected", "1 while the aggregator's state is being watched, else 0")
_UNPINNED = Gauge("wardround_charter_unpinned", "1 while the open round runs under a charter not pinned here, else 0")
_SPEED = Gauge(
    "wardround_training_images_per_second",
    "Speed of the newest training in passes of fixed size, places that no patient fills included, in two digits",
)
_GPU = Gauge(
    "wardround_gpu_memory_bytes", "Memory of the GPU that trains, in sixteenths of it; 0 without one", ["kind"]
)
_LEDGER = Gauge("wardround_ledger_events", "Events in the ledger")
_LEDGER_HEAD = Gauge(
    "wardround_ledger_head_timestamp_seconds", "When the ledger's newest event was seen, Unix seconds (0: none yet)"
)

_OF_STUDY = {
    "epsilon_spent": _SPENT,
    "epsilon_solo": _SOLO,
    "epsilon_left": _LEFT,
    "rounds_left": _ROUNDS_LEFT,
    "rounds_planned": _ROUNDS_PLANNED,
}
_OF_DATASET = {
    "dataset_epsilon_spent": _DATASET_SPENT,
    "dataset_epsilon_solo": _DATASET_SOLO,
    "dataset_epsilon_left": _DATASET_LEFT,
}
_speed = [0.0, 0.0]  # images and seconds since the figure was shown
_gpu: dict[str, int] = {}
_names: dict[str, str] = {}  # of studies; empty until the study was fetched

for _kind in ("used", "total"):
    _GPU.labels(_kind)
_phases = {phase: _PHASE.labels(phase) for phase in PHASES}
_now = [_phases["starting"]]
_now[0].set(1)
_figures: list[bytes | dict[str, float]] = []  # of the last `show`: (study, figures)
for _reason in Reason:
    if _reason not in DATA_REASONS:
        _REFUSALS.labels(_reason.value)


def show(progress: Progress) -> None:
    """Take what the node does now."""
    now = "training" if progress.phase == "trained" else progress.phase
    if now not in ("fetching", "training"):
        _show_training()
    if _phases[now] is not _now[0]:
        _now[0].set(0)
        _now[0] = _phases[now]
        _now[0].set(1)
    _ROUND.set(progress.round)
    _MODEL.set(progress.model_version)
    if progress.study:
        if progress.study_name and _names.get(short(progress.study)) != progress.study_name:
            _names[short(progress.study)] = progress.study_name
            show_studies(_names)
        if _figures != [progress.study, progress.figures]:
            _figures[:] = progress.study, dict(progress.figures)
            show_figures(progress.study, progress.figures)


def show_figures(study: bytes, figures: Mapping[str, float]) -> None:
    """ε and rounds of a study, and of the data set, as far as `figures` has them."""
    for key, gauge in _OF_STUDY.items():
        if key in figures:
            gauge.labels(short(study)).set(figures[key])
    for key, gauge in _OF_DATASET.items():
        if key in figures:
            gauge.set(figures[key])


def show_policy(policy: LoadedPolicy) -> None:
    """The caps that the site itself has set."""
    for entry in policy.document.studies:
        _CAP.labels(entry.sha256[:12]).set(entry.epsilon)
        _names.setdefault(entry.sha256[:12], "")
    show_studies(_names)
    _DATASET_CAP.set(policy.document.dataset_epsilon)


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


def unpinned(is_unpinned: bool) -> None:
    """Whether the open round's charter is none of those pinned here."""
    _UNPINNED.set(is_unpinned)


def computed(images: int, seconds: float) -> None:
    """A pass over `images`, the empty places of a fixed size included: its time is the machine's, not the data's.

    Shown with the next phase: a figure that moves while a training runs would tell how long it did.
    """
    _speed[0] += images
    _speed[1] += seconds


def gpu_memory(most_used: int, total: int) -> None:
    """Bytes, shown with the next phase. Coarse: how many patients were drawn must not be read from it."""
    step = max(1, total // 16)
    _gpu["used"], _gpu["total"] = min(total, -(-most_used // step) * step), total


def _show_training() -> None:
    if _speed[1] > 0:
        _SPEED.set(float(f"{_speed[0] / _speed[1]:.2g}"))
        _speed[:] = [0.0, 0.0]
    for kind, amount in _gpu.items():
        _GPU.labels(kind).set(amount)


def hide_the_process() -> None:
    """Take the client's own figures away: processor time and garbage collections follow the size of every batch."""
    for collector in (PROCESS_COLLECTOR, GC_COLLECTOR):
        with contextlib.suppress(KeyError):  # gone already
            REGISTRY.unregister(collector)


class LedgerHead:
    """The ledger's length, and when its newest event came: events carry no time."""

    def __init__(self, events: int, at_ms: int) -> None:
        """`at_ms`: the newest time known from an earlier life of this process (Unix ms, 0 = none)."""
        self._events = events
        _LEDGER.set(events)
        _LEDGER_HEAD.set(at_ms / 1000)

    def show(self, events: int, now_ms: int) -> None:
        """The ledger holds so many events now."""
        if events != self._events:
            self._events = events
            _LEDGER.set(events)
            _LEDGER_HEAD.set(now_ms / 1000)
