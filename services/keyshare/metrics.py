"""The pod's metrics (prefix wardround_)."""

from prometheus_client import Counter, Gauge, Histogram

from services.common.errors import Reason
from services.common.observe.process import show_charters
from services.keyshare.custody import Phase
from services.keyshare.pod import Pod

ORDERS = ("high_water", "propose", "endorse", "offer", "lock", "release", "digest", "abandon", "close")
STANDINGS = ("idle", "waiting", "rolled back", *(phase.value for phase in Phase))
ALARMING = (Reason.CONFLICT, Reason.ROLLED_BACK)
_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000)

LIVE = Gauge("wardround_pod_live", "1 when the pod has passed the high-water check (P-11) and signs, else 0")
CONNECTED = Gauge("wardround_pod_connected", "1 while the pod's Watch stream to the aggregator is open, else 0")
PHASE = Gauge("wardround_pod_phase", "1 for what the pod has promised about the newest attempt, else 0", ["phase"])
ROUND = Gauge("wardround_pod_round", "Round of the newest attempt that the pod committed to")
HELD = Gauge("wardround_pod_attempts_held", "Attempts whose round keys are in memory")
ANSWERS = Counter("wardround_pod_answers_total", "Commands answered, by order and outcome", ["order", "outcome"])
SECONDS = Histogram("wardround_pod_answer_seconds", "From an order to its answer's end", ["order"], buckets=_SECONDS)
REFUSED = Counter("wardround_pod_headers_refused_total", "Hospitals left out of accept lists, by reason", ["reason"])
ALARMS = Counter("wardround_pod_alarms_total", "Things that a sound committee never sees", ["reason"])
MEMBERS = Gauge("wardround_committee_pods", "m: pods of the committee in this pod's charter")
THRESHOLD = Gauge("wardround_committee_threshold", "t: pods that together could open everything")
QUORUM = Gauge("wardround_committee_quorum", "q: pods whose signatures fix a cohort")

for _standing in STANDINGS:
    PHASE.labels(_standing)
for _order in ORDERS:
    ANSWERS.labels(_order, "done")
for _reason in ALARMING:
    ALARMS.labels(_reason.value)


def show(pod: Pod) -> None:
    """Where the pod stands now."""
    ref, standing, _ = pod.standing()
    for name in STANDINGS:
        PHASE.labels(name).set(name == standing)
    committee = next(iter(pod.rosters.values())).committee
    gauges = {ROUND: ref.round, LIVE: pod.live, HELD: len(pod.state.held)}
    gauges |= {MEMBERS: committee.pods, THRESHOLD: committee.threshold, QUORUM: committee.quorum}
    for gauge, value in gauges.items():
        gauge.set(value)
    show_charters(tuple(pod.rosters))
