"""Dashboard Rounds, for the coordinating centre: is the federation well, who is silent, what was released."""

from deploy.monitoring import everywhere
from deploy.monitoring.panels import (
    BLUE,
    GRAY,
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

JOB = 'job="$job"'
WORK = ("proposed", "endorsing", "offering", "locking", "releasing", "verified")
COURSE = {
    1: ("no round is open", GRAY),
    2: ("training at the hospitals", BLUE),
    3: ("hospitals submit", GREEN),
    4: ("the committee works", PURPLE),
    5: ("attempt given up", RED),
}
SPARE = ((None, RED), (0, ORANGE), (1, GREEN))


def of(metric: str, more: str = "") -> str:
    """One metric of the chosen aggregator; `max` bridges a restart, after which `instance` may differ."""
    return f"max(wardround_{metric}{{{JOB}{more}}})"


def _stats() -> list[object]:
    lost = f'sum(round(increase(wardround_rounds_total{{{JOB}, outcome!="accepted"}}[$__range])))'
    return [
        number(
            Look((0, 0, 4, 4), "Study", "The study in force; its digest is in every hospital's policy.", "none"),
            Query(f"max by (name) (wardround_study_info{{{JOB}}})", "{{name}}"),
            only_name=True,
        ),
        number(
            Look(
                (4, 0, 4, 4), "Round", "Newest round that was opened, and the one that the plan runs through.", "none"
            ),
            Query(of("round_number"), "open"),
            Query(of("round_target"), "through"),
            name=True,
        ),
        number(
            Look((8, 0, 4, 4), "Phase", "What the aggregator is doing now.", "none"),
            Query(f"max by (phase) (wardround_round_phase{{{JOB}}}) == 1", "{{phase}}"),
            only_name=True,
        ),
        number(
            Look(
                (12, 0, 3, 4),
                "Hospitals to spare",
                "Connected hospitals beyond the smallest cohort. Below 0 no round is opened.",
                "none",
                SPARE,
            ),
            Query(f"{of('hospitals_enrolled')} - {of('cohort_minimum')}"),
        ),
        number(
            Look(
                (15, 0, 3, 4),
                "Pods to spare",
                "Key-share pods that sign, beyond the quorum. Below 0 no sum can be opened.",
                "none",
                SPARE,
            ),
            Query(f"{of('pods_live')} - {of('pods_quorum')}"),
        ),
        number(
            Look(
                (18, 0, 3, 4),
                "Balanced accuracy",
                "Newest released figure: mean over the classes of the share found, summed over hospitals and noised.",
                "percentunit",
                decimals=1,
            ),
            Query(of("model_quality", ', figure="balanced_accuracy"')),
        ),
        number(
            Look(
                (21, 0, 3, 4),
                "Rounds lost",
                "Stalled and rejected rounds in the time shown: each cost its hospitals one round of ε.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(lost),
        ),
    ]


def _course() -> list[object]:
    phase = f"wardround_round_phase{{{JOB}"
    course = (
        f'max({phase}, phase=~"idle|finished"}}) + 2 * max({phase}, phase="training"}}) + '
        f'3 * max({phase}, phase="collecting"}}) + 4 * max({phase}, phase=~"{"|".join(WORK)}"}}) + '
        f'5 * max({phase}, phase="abandoning"}})'
    )
    return [
        lanes(
            Look(
                (0, 4, 24, 6),
                "Course of the rounds",
                "Which round and attempt is open, and what it waits for. The committee's work is short: it may fall "
                "between "
                "two scrapes. An attempt above 1 means that one was given up.",
                "none",
                words=COURSE,
            ),
            Query(of("round_number"), "round"),
            Query(of("round_attempt"), "attempt"),
            Query(course, "phase"),
            counting=("round", "attempt"),
        ),
        curves(
            Look(
                (0, 10, 12, 8),
                "Cohort against its minimum",
                "Hospitals in the newest cohort, connected, and submitted in the open attempt. Below the dashed line "
                "nothing "
                "is unmasked.",
                "none",
                decimals=0,
            ),
            Query(of("cohort_size"), "cohort"),
            Query(of("hospitals_enrolled"), "connected"),
            Query(of("hospitals_submitted"), "submitted"),
            Query(of("cohort_minimum"), "minimum"),
            steps=True,
            limit="minimum",
        ),
        curves(
            Look(
                (12, 10, 12, 8),
                "Quality released",
                "Figures that rounds released, of the model that the round started from. Under differential privacy "
                "they "
                "carry noise: a small step up or down says nothing.",
                "percentunit",
                decimals=1,
            ),
            Query(f"max by (figure) (wardround_model_quality{{{JOB}}})", "{{figure}}"),
            steps=True,
            most=1,
        ),
    ]


def _members() -> list[object]:
    connected = "wardround_member_connected"
    standing = {
        0: ("silent", RED),
        1: ("connected", BLUE),
        2: ("submitted, then left", "semi-dark-green"),
        3: ("submitted", GREEN),
        4: ("declined, then left", "yellow"),
        5: ("declined", ORANGE),
    }
    return [
        lanes(
            Look(
                (0, 18, 12, 8),
                "Hospitals: who is silent",
                "One lane for each hospital of the charter. A red gap in a round that ended without it is a drop-out.",
                "none",
                words=standing,
            ),
            Query(
                f'max by (member) ({connected}{{{JOB}, role="hospital"}}) + on (member) '
                f"2 * max by (member) (wardround_member_submitted{{{JOB}}}) + on (member) "
                f"4 * max by (member) (wardround_member_declined{{{JOB}}})",
                "{{member}}",
            ),
        ),
        lanes(
            Look(
                (12, 18, 12, 8),
                "Key-share pods: who is silent",
                "One lane for each pod of the committee. So many may be red at once as there are pods to spare.",
                "none",
                words={0: ("silent", RED), 1: ("connected", GREEN)},
            ),
            Query(f'max by (member) ({connected}{{{JOB}, role="pod"}})', "{{member}}"),
        ),
        listing(
            Look(
                (0, 26, 8, 7),
                "Members",
                "Newest round whose cohort holds the hospital, or was locked by the pod; 0 = none yet.",
                "none",
            ),
            Query(f"max by (member, role) (wardround_member_round{{{JOB}}})"),
            Query(f"max by (member, role) ({connected}{{{JOB}}})"),
            columns={"member": "member", "role": "role", "Value #A": "last round", "Value #B": "connection"},
            words={"connection": {0: ("none", RED), 1: ("up", GREEN)}},
        ),
        bars(
            Look(
                (8, 26, 5, 7),
                "Left out of cohorts",
                "Hospitals of the charter that cohorts were fixed without, in the time shown: silent sent nothing, "
                "declined "
                "said so, left_out was refused by a pod.",
                "none",
                ((None, GREEN), (1, ORANGE)),
                decimals=0,
            ),
            Query(
                f"sum by (cause) (round(increase(wardround_hospitals_dropped_total{{{JOB}}}[$__range])))", "{{cause}}"
            ),
        ),
        bars(
            Look(
                (13, 26, 5, 7),
                "Ends of rounds and attempts",
                "How rounds and attempts ended in the time shown. An abandoned attempt costs no ε, a stalled round "
                "does.",
                "none",
                decimals=0,
            ),
            Query(
                f"sum by (outcome) (round(increase(wardround_rounds_total{{{JOB}}}[$__range])))", "round {{outcome}}"
            ),
            Query(
                f"sum by (outcome) (round(increase(wardround_round_attempts_ended_total{{{JOB}}}[$__range])))",
                "attempt {{outcome}}",
            ),
        ),
        listing(
            Look(
                (18, 26, 6, 7),
                "Refusals by reason",
                "Rounds declined by hospitals in the time shown, and refusals of pods since the aggregator's start.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(
                or_none(
                    f"label_replace(sum by (reason) "
                    f"(round(increase(wardround_declined_rounds_total{{{JOB}}}[$__range]))) > 0, "
                    '"by", "hospital", "", "") or '
                    f'label_replace(sum by (reason) (wardround_pod_refusals_total{{{JOB}}}) > 0, "by", "pod", "", "")',
                    "reason",
                )
            ),
            columns={"reason": "reason", "by": "by", "Value": "times"},
        ),
    ]


def _work() -> list[object]:
    spent, count = "wardround_round_phase_seconds_sum", "wardround_round_phase_seconds_count"
    return [
        bars(
            Look(
                (0, 33, 8, 8),
                "Mean time in a phase",
                "Over the time shown. Training and collecting are the study's timing; the others are the committee's "
                "pace.",
                "s",
                decimals=2,
            ),
            Query(
                f"sum by (phase) (increase({spent}{{{JOB}}}[$__range])) / "
                f"(sum by (phase) (increase({count}{{{JOB}}}[$__range])) > 0)",
                "{{phase}}",
            ),
        ),
        number(
            Look(
                (8, 33, 4, 4),
                "Upload, mean",
                "From the opening of an upload to its receipt, over the time shown.",
                "s",
                decimals=2,
            ),
            Query(_mean("submit_seconds")),
        ),
        number(
            Look(
                (8, 37, 4, 4),
                "Unmasking, mean",
                "From the last sum of a piece to the signed result, over the time shown.",
                "s",
                decimals=2,
            ),
            Query(_mean("unmask_seconds")),
        ),
        bars(
            Look(
                (12, 33, 6, 8),
                "Bytes by RPC",
                "Message bytes at the aggregator in the time shown, both directions, of the eight busiest RPCs.",
                "bytes",
            ),
            Query(
                "sort_desc(label_replace(topk(8, sum by (method) "
                f"(increase(wardround_rpc_bytes_total{{{JOB}}}[$__range]))), "
                '"call", "$1", "method", ".*/(.*)"))',
                "{{call}}",
            ),
        ),
        curves(
            Look(
                (18, 33, 6, 8),
                "Traffic",
                "Message bytes a second at the aggregator: received are updates and sums of masks, sent are models.",
                "Bps",
            ),
            Query(f"sum by (direction) (rate(wardround_rpc_bytes_total{{{JOB}}}[$__rate_interval]))", "{{direction}}"),
        ),
        listing(
            Look(
                (0, 41, 8, 6),
                "Charters",
                "How many connected members hold each charter that the centre has pinned. During an amendment `next` "
                "fills up.",
                "none",
            ),
            Query(f"max by (charter, role) (wardround_charter_reports{{{JOB}}})"),
            columns={"charter": "charter", "role": "held by", "Value": "members"},
        ),
        number(
            Look(
                (8, 41, 4, 3),
                "Members that differ",
                "Connected members that hold none of the centre's charters.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(f"sum(wardround_charter_differs{{{JOB}}})"),
        ),
        number(
            Look(
                (8, 44, 4, 3),
                "Plan",
                "Whether the plan that was rolled out last is served, is refused, or waits for its first model.",
                "none",
                words={0: ("accepted", GREEN), 1: ("refused", RED), 2: ("waits for its model", ORANGE)},
            ),
            Query(f"{of('plan_refused')} == 1 or 2 * {of('plan_waits_for_model')}"),
        ),
        number(
            Look(
                (12, 41, 4, 3),
                "Pods at fault",
                "Pods named for a wrong sum, in dispute about one, or caught with two digests, in the time shown.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(f"sum(round(increase(wardround_pod_faults_total{{{JOB}}}[$__range])))"),
        ),
        number(
            Look(
                (12, 44, 4, 3),
                "Conflicting updates",
                "Uploads that contradict an earlier one of the same hospital, in the time shown.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(f'sum(round(increase(wardround_submissions_total{{{JOB}, outcome="conflict"}}[$__range])))'),
        ),
        everywhere.certificate((16, 41, 4, 3), JOB),
        everywhere.disk((16, 44, 4, 3), JOB),
        everywhere.runs((20, 41, 4, 6), JOB),
    ]


def _by(label: str, counter: str) -> str:
    return f"sum by ({label}) (round(increase(wardround_{counter}{{{JOB}}}[$__range])))"


def _mean(histogram: str) -> str:
    total, count = f"wardround_{histogram}_sum", f"wardround_{histogram}_count"
    return f"sum(increase({total}{{{JOB}}}[$__range])) / (sum(increase({count}{{{JOB}}}[$__range])) > 0)"


def compiled() -> str:
    """The JSON."""
    about = "Wardround at the coordinating centre: rounds, cohorts, released quality, and who is silent."
    panels = [*_stats(), *_course(), *_members(), *_work()]
    return dashboard("wardround-rounds", "Wardround / Rounds", about, "aggregator", panels)
