"""The aggregator's metrics: closed label sets, base units; of patients' data nothing but released figures."""

from collections.abc import Collection, Mapping, Sequence

from prometheus_client import Counter, Gauge, Histogram

from services.aggregator.facts import CohortFixed
from services.aggregator.round import Phase, State, ends
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason
from services.common.observe.process import short, show_studies
from services.common.secagg.roster import Roster

PHASE = Gauge("wardround_round_phase", "1 for the present phase of the study, 0 for the others", ["phase"])
PHASE_STARTED = Gauge(
    "wardround_round_phase_started_timestamp_seconds", "When the present phase was entered, Unix seconds (0: never)"
)
PHASE_ENDS = Gauge(
    "wardround_round_phase_ends_timestamp_seconds",
    "When the present phase should be over at the latest, Unix seconds (0: it may last for ever)",
)
PHASE_SECONDS = Histogram(
    "wardround_round_phase_seconds",
    "Time spent in a phase before it was left",
    ["phase"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000, 10000),
)
ROUND = Gauge("wardround_round_number", "Newest round that was opened")
TARGET = Gauge("wardround_round_target", "Round that the plan in force runs through")
ATTEMPT = Gauge("wardround_round_attempt", "Newest attempt of the newest round")
ATTEMPTS = Counter("wardround_round_attempts_total", "Attempts proposed")
ROUNDS = Counter("wardround_rounds_total", "Rounds that are over, by outcome", ["outcome"])
ATTEMPTS_ENDED = Counter("wardround_round_attempts_ended_total", "Attempts that were given up", ["outcome"])
ENROLLED = Gauge("wardround_hospitals_enrolled", "Hospitals that watch rounds now")
SUBMITTED = Gauge("wardround_hospitals_submitted", "Complete submissions of the open attempt")
DROPPED = Counter(
    "wardround_hospitals_dropped_total",
    "Hospitals of the charter that a cohort was fixed without: they sent nothing, declined, or a pod refused them",
    ["cause"],
)
DECLINED = Counter("wardround_declined_rounds_total", "Rounds that hospitals declined, by their reason", ["reason"])
CONNECTED = Gauge("wardround_member_connected", "1 while the member's stream is open here, else 0", ["role", "member"])
HAS_SUBMITTED = Gauge(
    "wardround_member_submitted", "1 when the hospital's update for the open attempt is complete here", ["member"]
)
HAS_DECLINED = Gauge("wardround_member_declined", "1 when the hospital has declined the open round", ["member"])
NEWEST_ROUND = Gauge(
    "wardround_member_round",
    "Newest round whose cohort holds the hospital, or was locked by the pod",
    ["role", "member"],
)
COHORT = Gauge("wardround_cohort_size", "Hospitals in the newest cohort")
COHORT_MINIMUM = Gauge("wardround_cohort_minimum", "Smallest cohort of the study in force, in organisations")
PODS_LIVE = Gauge("wardround_pods_live", "Key-share pods that are connected and sign")
PODS_QUORUM = Gauge("wardround_pods_quorum", "Pods whose signatures fix a cohort")
CHARTERS = Gauge("wardround_charter_reports", "Connected members that hold this pinned charter", ["charter", "role"])
CHARTER_DIFFERS = Gauge(
    "wardround_charter_differs", "Connected members that hold none of the charters pinned here", ["role"]
)
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
QUALITY = Gauge("wardround_model_quality", "Newest released figure of the study in force", ["study", "figure"])
MODEL_VERSION = Gauge("wardround_model_version", "Version of the model that the next round starts from")
PLAN_REFUSED = Gauge("wardround_plan_refused", "1 while the plan on disk is refused and an older one is served")
PLAN_WAITS = Gauge("wardround_plan_waits_for_model", "1 while the model that the plan's study begins with is not here")

_DECLINE_REASONS = (Reason.POLICY_REFUSES, Reason.BUDGET_EXHAUSTED, Reason.INTERNAL)
_shown: dict[str, list[str]] = {}  # what the labels of some gauges are about now

for _phase in Phase:
    PHASE.labels(_phase.value)
for _outcome in ("accepted", "rejected", "stalled"):
    ROUNDS.labels(_outcome)
for _outcome in ("abandoned", "failed"):
    ATTEMPTS_ENDED.labels(_outcome)
for _outcome in ("received", "repeated", "conflict", "late", "refused"):
    SUBMISSIONS.labels(_outcome)
for _kind in ("named", "disputed", "two_digests"):
    POD_FAULTS.labels(_kind)
for _verdict in ("kept", "rolled_back"):
    GATE.labels(_verdict)
for _cause in ("silent", "declined", "left_out"):
    DROPPED.labels(_cause)
for _reason in _DECLINE_REASONS:
    DECLINED.labels(_reason.value)


def _only(what: str, names: Sequence[str], *gauges: Gauge) -> None:
    """These gauges are about `names` from now on: nothing stays of a study, member or charter that was left behind."""
    if _shown.get(what) != list(names):
        _shown[what] = list(names)
        for gauge in gauges:
            gauge.clear()


def show_study(study: LoadedStudy, figures: Mapping[str, float]) -> None:
    """Which study is in force and its newest released figures: after secure aggregation and noise, so everybody's."""
    name = short(study.digest)
    _only("study", [name], QUALITY)
    show_studies({name: study.document.name})
    for figure, value in figures.items():
        QUALITY.labels(name, figure).set(value)


def show_state(state: State) -> None:
    """What follows from the open round."""
    for phase in Phase:
        PHASE.labels(phase.value).set(phase is state.phase)
    PHASE_STARTED.set(state.entered / 1000)
    PHASE_ENDS.set(ends(state) / 1000)
    ROUND.set(state.round)
    ATTEMPT.set(state.attempt)
    MODEL_VERSION.set(state.version)
    SUBMITTED.set(len(state.submissions))


def show_history(roster: Roster, state: State, cohort: Collection[str], newest: Mapping[tuple[str, str], int]) -> None:
    """Who took part: in the open attempt, in the newest cohort, and in which round last (by role and member)."""
    COHORT.set(len(cohort))
    _only("history", _members(roster), HAS_SUBMITTED, HAS_DECLINED, NEWEST_ROUND)
    for hospital in roster.hospitals:
        HAS_SUBMITTED.labels(hospital).set(hospital in state.submissions)
        HAS_DECLINED.labels(hospital).set(hospital in state.declined)
        NEWEST_ROUND.labels("hospital", hospital).set(newest.get(("hospital", hospital), 0))
    for pod in roster.pods:
        NEWEST_ROUND.labels("pod", pod.id).set(newest.get(("pod", pod.id), 0))


def show_members(
    roster: Roster,
    pinned: Mapping[str, bytes],
    pods: Mapping[str, tuple[bytes, ...]],
    hospitals: Mapping[str, tuple[bytes, ...]],
) -> None:
    """Who is connected, and which of the pinned charters they hold (P-26); the maps say what each reports."""
    _only("members", _members(roster), CONNECTED)
    _only("charters", list(pinned), CHARTERS)
    listed: dict[str, Collection[str]] = {"pod": [pod.id for pod in roster.pods], "hospital": roster.hospitals}
    for role, reports in (("pod", pods), ("hospital", hospitals)):
        for member in listed[role]:
            CONNECTED.labels(role, member).set(member in reports)
        for word, digest in pinned.items():
            CHARTERS.labels(word, role).set(sum(digest in held for held in reports.values()))
        CHARTER_DIFFERS.labels(role).set(sum(set(held).isdisjoint(pinned.values()) for held in reports.values()))
    ENROLLED.set(len(hospitals))
    PODS_QUORUM.set(roster.committee.quorum)


def _members(roster: Roster) -> list[str]:
    return [*roster.hospitals, *(pod.id for pod in roster.pods)]


def count_dropped(state: State, fact: CohortFixed, roster: Roster) -> None:
    """Why hospitals of the charter are not in the cohort of `fact`; `state` is the one before or after it."""
    missing = set(roster.hospitals) - set(state.submissions)
    declined = len(missing & set(state.declined))
    DROPPED.labels("silent").inc(len(missing) - declined)
    DROPPED.labels("declined").inc(declined)
    DROPPED.labels("left_out").inc(len(state.submissions) - len(fact.members))
