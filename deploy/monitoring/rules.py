"""The alert rules of each chart. PromQL of Prometheus 2.42 and older.

A rule says what a person must look at; what to do stands under its name in docs/operations.md, and the link to that
heading is made here for every rule. A counter that rose stays an alert for an hour; a gauge is waited for, so that
a restart or a rollout is no alarm.
"""

from dataclasses import dataclass
from io import StringIO
from typing import Literal

from ruamel.yaml import YAML

RUNBOOK = "docs/operations.md"
ROLES = {"aggregator": "aggregator", "hospital-node": "hospital", "keyshare": "pod"}
"""Chart to the role that its service has in metrics."""


@dataclass(frozen=True)
class Rule:
    """One alert; `held` is how long `expr` must hold before it fires. `summary` may use $labels and $value."""

    name: str
    severity: Literal["critical", "warning", "info"]
    summary: str
    expr: str
    held: str = "0s"

    @property
    def runbook(self) -> str:
        """The heading about this alert."""
        return f"{RUNBOOK}#{self.name.lower()}"


def rose(counter: str, window: str = "1h") -> str:
    """Whether a counter rose within `window`."""
    return f"increase({counter}[{window}]) > 0"


AGGREGATOR = (
    Rule(
        "WardroundRoundOverdue",
        "warning",
        "{{ $labels.job }}: the phase of the open round should have ended {{ $value | humanizeDuration }} ago.",
        "time() - (wardround_round_phase_ends_timestamp_seconds > 0) > 300",
        "1m",
    ),
    Rule(
        "WardroundRoundStalled",
        "critical",
        "{{ $labels.job }}: a round was stalled: it is spent, and one round of ε with it.",
        rose('wardround_rounds_total{outcome="stalled"}'),
    ),
    Rule(
        "WardroundRoundAbandoned",
        "warning",
        "{{ $labels.job }}: an attempt was abandoned; the same round is tried again.",
        rose('wardround_round_attempts_ended_total{outcome="abandoned"}'),
    ),
    Rule(
        "WardroundRoundRejected",
        "critical",
        "{{ $labels.job }}: a round's sum was rejected; the model stays what it was.",
        'round(increase(wardround_rounds_total{outcome="rejected"}[1h])) > ignoring (outcome, verdict) '
        'round(increase(wardround_gate_verdicts_total{verdict="rolled_back"}[1h]))',
    ),
    Rule(
        "WardroundGateRejected",
        "warning",
        "{{ $labels.job }}: the quality gate rolled a model back.",
        rose('wardround_gate_verdicts_total{verdict="rolled_back"}'),
    ),
    Rule(
        "WardroundSiteSilent",
        "warning",
        "{{ $labels.job }}: hospital {{ $labels.member }} has not been connected for a quarter of an hour.",
        'wardround_member_connected{role="hospital"} == 0',
        "15m",
    ),
    Rule(
        "WardroundPodSilent",
        "warning",
        "{{ $labels.job }}: key-share pod {{ $labels.member }} has not been connected for ten minutes.",
        'wardround_member_connected{role="pod"} == 0',
        "10m",
    ),
    Rule(
        "WardroundBelowQuorum",
        "critical",
        "{{ $labels.job }}: only {{ $value }} key-share pods sign, fewer than the quorum: no round can open or end.",
        "wardround_pods_live < wardround_pods_quorum",
        "5m",
    ),
    Rule(
        "WardroundBelowCohort",
        "warning",
        "{{ $labels.job }}: only {{ $value }} hospitals are connected, fewer than a cohort needs.",
        "wardround_hospitals_enrolled < wardround_cohort_minimum and wardround_round_number < wardround_round_target",
        "15m",
    ),
    Rule(
        "WardroundSiteDeclined",
        "info",
        "{{ $labels.job }}: a hospital declined a round: {{ $labels.reason }}.",
        rose("wardround_declined_rounds_total"),
    ),
    Rule(
        "WardroundPlanRefused",
        "critical",
        "{{ $labels.job }}: the plan that was rolled out is refused; the older one is served.",
        "wardround_plan_refused == 1",
        "1m",
    ),
    Rule(
        "WardroundPlanWaits",
        "warning",
        "{{ $labels.job }}: the plan's study waits for its first model, which an operator must push.",
        "wardround_plan_waits_for_model == 1",
        "5m",
    ),
    Rule(
        "WardroundConflictingSubmission",
        "critical",
        "{{ $labels.job }}: a hospital submitted two different updates for one attempt.",
        rose('wardround_submissions_total{outcome="conflict"}'),
    ),
    Rule(
        "WardroundPodAtFault",
        "critical",
        "{{ $labels.job }}: a key-share pod is at fault or in dispute about a sum ({{ $labels.kind }}).",
        rose("wardround_pod_faults_total"),
    ),
    Rule(
        "WardroundCharterDiffers",
        "warning",
        "{{ $labels.job }}: {{ $value }} connected members ({{ $labels.role }}) hold none of the charters pinned here.",
        "wardround_charter_differs > 0",
        "15m",
    ),
)

HOSPITAL = (
    Rule(
        "WardroundDisconnected",
        "warning",
        "{{ $labels.job }}: no connection to the aggregator for a quarter of an hour.",
        "wardround_connected == 0",
        "15m",
    ),
    Rule(
        "WardroundBudgetNearlySpent",
        "warning",
        "{{ $labels.job }}: the ε that is left buys {{ $value }} more rounds, and study {{ $labels.study }} has more.",
        "(wardround_privacy_rounds_left < wardround_study_rounds_left) > 0",
    ),
    Rule(
        "WardroundDatasetBudgetNearlySpent",
        "warning",
        "{{ $labels.job }}: {{ $value | humanizePercentage }} of the data set's ε is left over all studies.",
        "(wardround_privacy_dataset_epsilon_left / (wardround_privacy_dataset_epsilon_cap > 0)) < 0.1",
    ),
    Rule(
        "WardroundBudgetExhausted",
        "critical",
        "{{ $labels.job }}: the privacy budget is exhausted: this hospital takes no further part.",
        'sum by (job, instance) (increase(wardround_refusals_total{reason="BUDGET_EXHAUSTED"}[1h])) > 0 or '
        "count by (job, instance) (wardround_privacy_rounds_left == 0 and wardround_study_rounds_left > 0)",
    ),
    Rule(
        "WardroundPolicyRefuses",
        "info",
        "{{ $labels.job }}: a round was refused because the site's own policy does not allow it.",
        rose('wardround_refusals_total{reason="POLICY_REFUSES"}'),
    ),
    Rule(
        "WardroundRoundNotTrusted",
        "critical",
        "{{ $labels.job }}: a round was refused for {{ $labels.reason }}: an honest aggregator does not send that.",
        rose('wardround_refusals_total{reason=~"BAD_SIGNATURE|BAD_DIGEST|MALFORMED|CONFLICT|WRONG_CORE|ROLLED_BACK"}')
        + " unless on (job, instance) max_over_time(wardround_charter_unpinned[1h]) == 1",
    ),
    Rule(
        "WardroundStudyHalted",
        "critical",
        "{{ $labels.job }}: an alarm stopped the open study at this hospital for good.",
        "wardround_study_halted == 1",
    ),
    Rule(
        "WardroundCharterUnpinned",
        "warning",
        "{{ $labels.job }}: the open round runs under a charter that is not pinned here.",
        "wardround_charter_unpinned == 1",
        "15m",
    ),
    Rule(
        "WardroundRetrying",
        "warning",
        "{{ $labels.job }}: what this hospital tries has failed for a quarter of an hour.",
        'wardround_hospital_phase{phase="retrying"} == 1',
        "15m",
    ),
)

POD = (
    Rule(
        "WardroundPodDisconnected",
        "warning",
        "{{ $labels.job }}: no connection to the aggregator for ten minutes.",
        "wardround_pod_connected == 0",
        "10m",
    ),
    Rule(
        "WardroundPodNotLive",
        "warning",
        "{{ $labels.job }}: connected, but not live for ten minutes: too few other pods have answered (P-11).",
        "wardround_pod_live == 0 and wardround_pod_connected == 1",
        "10m",
    ),
    Rule(
        "WardroundPodRolledBack",
        "critical",
        "{{ $labels.job }}: the store of this pod went back in time: it never signs again under this id.",
        'wardround_pod_phase{phase="rolled back"} == 1',
    ),
    Rule(
        "WardroundPodAlarm",
        "critical",
        "{{ $labels.job }}: this pod was asked for what a sound committee never asks ({{ $labels.reason }}).",
        rose("wardround_pod_alarms_total"),
    ),
    Rule(
        "WardroundHospitalLeftOut",
        "warning",
        "{{ $labels.job }}: this pod left a hospital out of its accept list: {{ $labels.reason }}.",
        rose("wardround_pod_headers_refused_total"),
    ),
    Rule(
        "WardroundMemoryNotLocked",
        "warning",
        "{{ $labels.job }}: memory that holds round keys could be written to swap.",
        "wardround_memory_locked == 0",
        "5m",
    ),
)


def _everywhere(role: str) -> tuple[Rule, ...]:
    """For one role alone: a Prometheus may hold the rules of several charts."""
    mine = f'on (job, instance) wardround_build_info{{role="{role}"}}'
    expiry, start = "wardround_certificate_expiry_timestamp_seconds", "wardround_certificate_start_timestamp_seconds"
    return (
        Rule(
            "WardroundDown",
            "critical",
            f"No {role} of Wardround has been scraped for ten minutes.",
            f'absent(wardround_build_info{{role="{role}"}})',
            "10m",
        ),
        Rule(
            "WardroundCertificateExpiring",
            "warning",
            "{{ $labels.job }}: {{ $value | humanizePercentage }} of the TLS certificate's life is left.",
            f"({expiry} - time()) / ({expiry} - {start}) < 1 / 3 and {mine}",
            "15m",
        ),
        Rule(
            "WardroundCertificateUnreadable",
            "critical",
            "{{ $labels.job }}: the TLS certificate cannot be read.",
            f"({expiry} != {expiry}) and {mine}",  # NaN differs from itself
            "5m",
        ),
    )


RULES: dict[str, tuple[Rule, ...]] = {
    "aggregator": (*AGGREGATOR, *_everywhere("aggregator")),
    "hospital-node": (*HOSPITAL, *_everywhere("hospital")),
    "keyshare": (*POD, *_everywhere("pod")),
}


def compiled(chart: str) -> str:
    """The chart's files/rules.yaml."""
    rules = [
        {
            "alert": rule.name,
            "expr": rule.expr,
            **({"for": rule.held} if rule.held != "0s" else {}),
            "labels": {"severity": rule.severity},
            "annotations": {"summary": rule.summary, "runbook_url": rule.runbook},
        }
        for rule in RULES[chart]
    ]
    out = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 10_000, False  # type: ignore[assignment]  # ruamel declares them as None
    yaml.dump({"groups": [{"name": f"wardround-{chart}", "rules": rules}]}, out)
    return "# Made by `make charts` from deploy/monitoring/rules.py: edit that.\n" + out.getvalue()
