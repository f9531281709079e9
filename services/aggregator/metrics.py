"""The aggregator's metrics: closed label sets, base units; of patients' data nothing but released figures."""

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from services.aggregator.round import Phase

PHASE = Gauge("wardround_round_phase", "1 for the present phase of the study, 0 for the others", ["phase"])
PHASE_SECONDS = Histogram(
    "wardround_round_phase_seconds",
    "Time spent in a phase before it was left",
    ["phase"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000, 10000),
)
ROUND = Gauge("wardround_round_number", "Newest round that was opened")
TARGET = Gauge("wardround_round_target", "Round that the plan in force runs through")
ATTEMPTS = Counter("wardround_round_attempts_total", "Attempts proposed")
ROUNDS = Counter("wardround_rounds_total", "Rounds that are over, by outcome", ["outcome"])
ATTEMPTS_ENDED = Counter("wardround_round_attempts_ended_total", "Attempts that were given up", ["outcome"])
ENROLLED = Gauge("wardround_hospitals_enrolled", "Hospitals that watch rounds now")
SUBMITTED = Gauge("wardround_hospitals_submitted", "Complete submissions of the open attempt")
DROPPED = Counter("wardround_hospitals_dropped_total", "Hospitals left out of a cohort after submitting")
COHORT = Gauge("wardround_cohort_size", "Hospitals in the newest cohort")
COHORT_MINIMUM = Gauge("wardround_cohort_minimum", "Smallest cohort of the study in force, in organisations")
PODS_LIVE = Gauge("wardround_pods_live", "Key-share pods that are connected and sign")
PODS_QUORUM = Gauge("wardround_pods_quorum", "Pods whose signatures fix a cohort")
CHARTERS = Gauge("wardround_charter_reports", "Members that hold a pinned charter (current, next)", ["charter", "role"])
SUBMIT_SECONDS = Histogram(
    "wardround_submit_seconds", "Time of one upload from its opening to its receipt",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000),
)  # fmt: skip
UNMASK_SECONDS = Histogram(
    "wardround_unmask_seconds", "Time from the last piece sum to the signed result",
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)  # fmt: skip
SUBMISSIONS = Counter("wardround_submissions_total", "Uploads that ended, by outcome", ["outcome"])
POD_REFUSALS = Counter("wardround_pod_refusals_total", "Refusals of pods", ["order", "reason"])
POD_FAULTS = Counter("wardround_pod_faults_total", "Pods named for a wrong sum, or in dispute about one", ["kind"])
GATE = Counter("wardround_gate_verdicts_total", "Verdicts on models", ["verdict"])
QUALITY = Gauge("wardround_model_quality", "Newest released figure", ["figure"])
MODEL_VERSION = Gauge("wardround_model_version", "Version of the model that the next round starts from")
PLAN_REFUSED = Gauge("wardround_plan_refused", "1 while the plan on disk is refused and an older one is served")

_ACCEPTED = ("accepted", "rejected", "stalled")
for _phase in Phase:
    PHASE.labels(_phase.value)
for _outcome in _ACCEPTED:
    ROUNDS.labels(_outcome)
for _outcome in ("abandoned", "failed"):
    ATTEMPTS_ENDED.labels(_outcome)
for _outcome in ("received", "repeated", "conflict", "late", "refused"):
    SUBMISSIONS.labels(_outcome)
for _kind in ("named", "disputed", "two_digests"):
    POD_FAULTS.labels(_kind)
for _verdict in ("kept", "rolled_back"):
    GATE.labels(_verdict)


def show_phase(phase: Phase) -> None:
    """Set the gauge of `phase` and clear the others."""
    for other in Phase:
        PHASE.labels(other.value).set(1 if other is phase else 0)


def show_charters(
    pinned: Mapping[str, bytes], pods: Mapping[str, tuple[bytes, ...]], hospitals: Mapping[str, tuple[bytes, ...]]
) -> None:
    """How many of the members that are connected hold each pinned charter (P-26)."""
    for word, digest in pinned.items():
        CHARTERS.labels(word, "pod").set(sum(digest in held for held in pods.values()))
        CHARTERS.labels(word, "hospital").set(sum(digest in held for held in hospitals.values()))
