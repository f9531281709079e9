"""Dashboard Committee, for the owner of key-share pods: do they sign, what have they promised, what did they refuse."""

from deploy.monitoring import everywhere
from deploy.monitoring.panels import (
    BLUE,
    GREEN,
    NONE_IS_GOOD,
    ORANGE,
    PURPLE,
    RED,
    Look,
    Query,
    bars,
    curves,
    dashboard,
    lanes,
    listing,
    number,
    or_none,
)

JOB = 'job=~"$job"'
ID = f"max by (job, id) (wardround_build_info{{{JOB}}})"
STANDING = {"committed": 1, "endorsed": 2, "locked": 3, "closed": 4, "abandoned": 5, "burned": 6, "waiting": 7}


def each(metric: str, more: str = "") -> str:
    """One figure a pod, with the pod's id."""
    return f"max by (job) (wardround_{metric}{{{JOB}{more}}}) * on (job) group_left (id) {ID}"


def _stats() -> list[object]:
    return [
        number(
            Look((0, 0, 4, 4), "Pods here that sign", "Pods seen here that have passed P-11.", "none", decimals=0),
            Query(f"sum(max by (job) (wardround_pod_live{{{JOB}}}))", "sign"),
            Query(f"count(max by (job) (wardround_pod_live{{{JOB}}}))", "seen"),
            name=True,
        ),
        number(
            Look(
                (4, 0, 5, 4),
                "Committee",
                "Of m pods, q fix a cohort and t together could open everything. From the pinned charter.",
                "none",
            ),
            Query(f"max(wardround_committee_pods{{{JOB}}})", "pods (m)"),
            Query(f"max(wardround_committee_quorum{{{JOB}}})", "fix a cohort (q)"),
            Query(f"max(wardround_committee_threshold{{{JOB}}})", "could open all (t)"),
            name=True,
        ),
        number(
            Look((9, 0, 3, 4), "Round", "Newest round that a pod here has committed to.", "none"),
            Query(f"max(wardround_pod_round{{{JOB}}})"),
        ),
        number(
            Look(
                (12, 0, 3, 4),
                "Alarms",
                "Things that a sound committee never sees, in the time shown.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(f"sum(round(increase(wardround_pod_alarms_total{{{JOB}}}[$__range])))"),
        ),
        number(
            Look(
                (15, 0, 3, 4),
                "Memory",
                "Whether memory that holds round keys is kept out of swap, at every pod here.",
                "none",
                words={0: ("not locked", ORANGE), 1: ("locked", GREEN)},
            ),
            Query(f"min(wardround_memory_locked{{{JOB}}})"),
        ),
        everywhere.certificate((18, 0, 3, 4), JOB),
        everywhere.disk((21, 0, 3, 4), JOB),
    ]


def _standing() -> list[object]:
    words = {
        1: ("committed", BLUE),
        2: ("endorsed", "semi-dark-blue"),
        3: ("locked", PURPLE),
        4: ("closed", GREEN),
        5: ("abandoned", ORANGE),
        6: ("burned", RED),
        7: ("waits for the others (P-11)", "yellow"),
    }
    promised = " or ".join(
        f'({value} * max by (job) (wardround_pod_phase{{{JOB}, phase="{phase}"}}) > 0)'
        for phase, value in STANDING.items()
    )
    return [
        lanes(
            Look(
                (0, 4, 24, 8),
                "What each pod has promised",
                "About its newest attempt. Burned: its keys are gone, because it restarted or went on; it helps "
                "again in the "
                "next attempt.",
                "none",
                words=words,
            ),
            Query(f"({promised}) * on (job) group_left (id) {ID}", "{{id}}"),
        ),
        lanes(
            Look(
                (0, 12, 12, 7),
                "Connection and standing",
                "Red: no connection. Orange: connected, but not live. Green: it signs.",
                "none",
                words={0: ("not connected", RED), 1: ("not live", ORANGE), 2: ("signs", GREEN)},
            ),
            Query(
                f"max by (job) (wardround_pod_connected{{{JOB}}}) * (1 + max by (job) (wardround_pod_live{{{JOB}}})) "
                f"* on (job) group_left (id) {ID}",
                "{{id}}",
            ),
        ),
        curves(
            Look(
                (12, 12, 12, 7),
                "Round keys in memory",
                "Attempts whose keys a pod holds. They are dropped at the end of the round, and at the latest when "
                "they expire.",
                "none",
                decimals=0,
            ),
            Query(each("pod_attempts_held"), "{{id}}"),
            steps=True,
        ),
    ]


def _orders() -> list[object]:
    spent, count = "wardround_pod_answer_seconds_sum", "wardround_pod_answer_seconds_count"
    return [
        bars(
            Look(
                (0, 19, 8, 9),
                "Mean time of an answer",
                "From an order to the end of its answer, over the time shown. Release is the summing of masks.",
                "s",
                decimals=3,
            ),
            Query(
                f"sum by (order) (increase({spent}{{{JOB}}}[$__range])) / "
                f"(sum by (order) (increase({count}{{{JOB}}}[$__range])) > 0)",
                "{{order}}",
            ),
        ),
        bars(
            Look((8, 19, 5, 9), "Orders answered", "Commands carried out in the time shown.", "none", decimals=0),
            Query(
                f'sum by (order) (round(increase(wardround_pod_answers_total{{{JOB}, outcome="done"}}[$__range])))',
                "{{order}}",
            ),
        ),
        listing(
            Look(
                (13, 19, 6, 9),
                "Refusals",
                "Commands that pods here refused since they started. NOT_LIVE and BURNED after a restart are sound.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(
                or_none(
                    f'sum by (order, outcome) (wardround_pod_answers_total{{{JOB}, outcome!="done"}}) > 0', "outcome"
                )
            ),
            columns={"order": "order", "outcome": "reason", "Value": "times"},
        ),
        listing(
            Look(
                (19, 19, 5, 9),
                "Hospitals left out",
                "Headers or boxes that pods here did not accept, since they started, by reason.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(or_none(f"sum by (reason) (wardround_pod_headers_refused_total{{{JOB}}}) > 0", "reason")),
            columns={"reason": "reason", "Value": "times"},
        ),
        curves(
            Look((0, 28, 12, 7), "Bytes sent", "What each pod sends: sums of masks, almost all of it.", "Bps"),
            Query(
                f'sum by (job) (rate(wardround_rpc_client_bytes_total{{{JOB}, direction="sent"}}[$__rate_interval])) '
                f"* on (job) group_left (id) {ID}",
                "{{id}}",
            ),
        ),
        listing(
            Look((12, 28, 7, 7), "Charters", "Digests of the charters that each pod has pinned.", "none"),
            Query(f"max by (job, charter, digest) (wardround_charter_info{{{JOB}}}) * on (job) group_left (id) {ID}"),
            columns={"id": "pod", "charter": "charter", "digest": "digest"},
        ),
        everywhere.runs((19, 28, 5, 7), JOB),
    ]


def compiled() -> str:
    """The JSON."""
    about = "Wardround at a pod's owner: which pods sign, what they have promised, what they refused."
    panels = [*_stats(), *_standing(), *_orders()]
    return dashboard("wardround-committee", "Wardround / Committee", about, "pod", panels, many=True)
