"""Dashboard Site, for a hospital: how much privacy is left, what the node does, what leaves the house."""

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
    dial,
    lanes,
    listing,
    number,
    or_none,
)

JOB = 'job="$job"'
LEFT = ((None, RED), (0.1, ORANGE), (0.25, GREEN))
COURSE = {
    "idle|starting|waiting|stopped": ("waiting", GRAY),
    "fetching|training": ("training", BLUE),
    "submitting": ("submitting", PURPLE),
    "submitted": ("submitted", GREEN),
    "refused": ("refused", ORANGE),
    "retrying": ("retrying", RED),
    "finished": ("study finished", "semi-dark-green"),
}


def of(metric: str, more: str = "") -> str:
    """One metric of the chosen hospital node."""
    return f"max(wardround_{metric}{{{JOB}{more}}})"


def by_study(metric: str) -> str:
    """A figure of each study, with the study's name."""
    names = f"max by (study, name) (wardround_study_info{{{JOB}}})"
    return f"max by (study) (wardround_{metric}{{{JOB}}}) * on (study) group_left (name) {names}"


def _privacy() -> list[object]:
    cap = f"(max by (study) (wardround_privacy_epsilon_cap{{{JOB}}}) > 0)"
    exhausted = f'sum(increase(wardround_refusals_total{{{JOB}, reason="BUDGET_EXHAUSTED"}}[$__range])) > bool 0'
    short = f"max(wardround_study_rounds_left{{{JOB}}} - wardround_privacy_rounds_left{{{JOB}}}) > bool 0"
    return [
        dial(
            Look(
                (0, 0, 6, 8),
                "Privacy left for the study",
                "Share of the ε that this hospital's policy allows the study. At 0 the hospital takes no further part.",
                "percentunit",
                LEFT,
                decimals=0,
            ),
            Query(f"{by_study('privacy_epsilon_left')} / on (study) group_left () {cap}", "{{name}}"),
        ),
        dial(
            Look(
                (6, 0, 6, 8),
                "Privacy left for the data set",
                "Share of the ε that the policy allows the data set over all studies, for its whole life.",
                "percentunit",
                LEFT,
                decimals=0,
            ),
            Query(f"{of('privacy_dataset_epsilon_left')} / ({of('privacy_dataset_epsilon_cap')} > 0)"),
        ),
        number(
            Look((12, 0, 3, 4), "ε spent", "ε of the study that the ledger proves.", "none", decimals=2),
            Query(by_study("privacy_epsilon_spent"), "{{name}}"),
        ),
        number(
            Look(
                (15, 0, 3, 4),
                "ε solo",
                "What ε would be if all other hospitals and the pods failed or colluded. Equal to ε under `local`.",
                "none",
                decimals=2,
            ),
            Query(by_study("privacy_epsilon_solo_spent"), "{{name}}"),
        ),
        number(
            Look(
                (18, 0, 3, 4),
                "Rounds left",
                "Training rounds that the caps still allow, and those that the study still has; the open one included.",
                "none",
            ),
            Query(of("privacy_rounds_left"), "allowed"),
            Query(of("study_rounds_left"), "planned"),
            name=True,
        ),
        number(
            Look(
                (21, 0, 3, 4),
                "Budget",
                "Whether the ε that is left lasts to the end of the study, and no round was refused for it in the "
                "time shown.",
                "none",
                words={0: ("lasts", GREEN), 1: ("runs out", RED)},
            ),
            Query(f"clamp_max(({exhausted}) + ({short}), 1)"),
        ),
        number(
            Look((12, 4, 3, 4), "Now", "What the node is doing.", "none"),
            Query(f"max by (phase) (wardround_hospital_phase{{{JOB}}}) == 1", "{{phase}}"),
            only_name=True,
        ),
        number(
            Look((15, 4, 3, 4), "Round", "Round that the aggregator has open, and the newest model.", "none"),
            Query(of("hospital_round"), "round"),
            Query(of("hospital_model_version"), "model"),
            name=True,
        ),
        number(
            Look(
                (18, 4, 3, 4),
                "Connection",
                "Whether the aggregator's state is being watched.",
                "none",
                words={0: ("none", RED), 1: ("up", GREEN)},
            ),
            Query(of("connected")),
        ),
        everywhere.certificate((21, 4, 3, 4), JOB),
    ]


def _spending() -> list[object]:
    return [
        curves(
            Look(
                (0, 8, 12, 8),
                "ε of the study",
                "Every step is one round that left this hospital. It never falls: what was spent does not come back.",
                "none",
                decimals=2,
            ),
            Query(by_study("privacy_epsilon_spent"), "spent on {{name}}"),
            Query(by_study("privacy_epsilon_solo_spent"), "solo, {{name}}"),
            Query(of("privacy_epsilon_cap"), "cap"),
            steps=True,
            limit="cap",
        ),
        curves(
            Look(
                (12, 8, 12, 8),
                "ε of the data set",
                "Over all studies that ever ran on it.",
                "none",
                decimals=2,
            ),
            Query(of("privacy_dataset_epsilon_spent"), "spent"),
            Query(of("privacy_dataset_epsilon_solo_spent"), "solo"),
            Query(of("privacy_dataset_epsilon_cap"), "cap"),
            steps=True,
            limit="cap",
        ),
    ]


def _node() -> list[object]:
    return [
        lanes(
            Look(
                (0, 16, 24, 5),
                "What the node did",
                "`training` lasts until the round collects, whatever it took: when it was done would tell how many "
                "patients "
                "were drawn.",
                "none",
                words=dict(enumerate(COURSE.values(), 1)),
            ),
            Query(of("hospital_round"), "round"),
            Query(
                " + ".join(
                    f'{number_of} * max(wardround_hospital_phase{{{JOB}, phase=~"{phases}"}})'
                    for number_of, phases in enumerate(COURSE, 1)
                ),
                "node",
            ),
            counting=("round",),
        ),
        curves(
            Look(
                (0, 21, 8, 6),
                "Speed of training",
                "Images a second in passes of fixed size, empty places included, in two digits: the machine's speed, "
                "and "
                "nothing about the data.",
                "none",
            ),
            Query(of("training_images_per_second"), "images/s"),
        ),
        curves(
            Look(
                (8, 21, 8, 6),
                "GPU memory",
                "The most that training took, in sixteenths of the card; 0 where training runs on a CPU.",
                "bytes",
            ),
            Query(f"max by (kind) (wardround_gpu_memory_bytes{{{JOB}}})", "{{kind}}"),
        ),
        bars(
            Look(
                (16, 21, 8, 6),
                "Bytes that left the house",
                "Sent by this node in the time shown, by RPC. SubmitUpdate is the masked vector; its size is the "
                "model's, not "
                "the data's.",
                "bytes",
            ),
            Query(
                f"sort_desc(label_replace(sum by (method) (increase(wardround_rpc_client_bytes_total{{{JOB}, "
                f'direction="sent"}}'
                '[$__range])) > 0, "call", "$1", "method", ".*/(.*)"))',
                "{{call}}",
            ),
        ),
    ]


def _record() -> list[object]:
    return [
        number(
            Look((0, 27, 4, 4), "Ledger events", "Debits and notes in the ledger: it only grows.", "none", decimals=0),
            Query(of("ledger_events")),
        ),
        number(
            Look(
                (0, 31, 4, 4),
                "Newest event",
                "Age of the ledger's head. It should not be older than the newest round of this hospital.",
                "s",
            ),
            Query(f"time() - ({of('ledger_head_timestamp_seconds')} > 0)"),
        ),
        number(
            Look(
                (4, 27, 4, 4),
                "Study",
                "Stopped means that an alarm ended the open study here for good.",
                "none",
                words={0: ("runs", GREEN), 1: ("stopped", RED)},
            ),
            Query(of("study_halted")),
        ),
        number(
            Look(
                (4, 31, 4, 4),
                "Charter of the round",
                "Whether the open round runs under a charter that is pinned here.",
                "none",
                words={0: ("pinned", GREEN), 1: ("not pinned", RED)},
            ),
            Query(of("charter_unpinned")),
        ),
        listing(
            Look(
                (8, 27, 6, 8),
                "Refusals by reason",
                "Rounds or attempts that this hospital refused in the time shown, never for a reason that the data "
                "gave. The "
                "sentence is in the log.",
                "none",
                NONE_IS_GOOD,
            ),
            Query(
                or_none(f"sum by (reason) (round(increase(wardround_refusals_total{{{JOB}}}[$__range]))) > 0", "reason")
            ),
            columns={"reason": "reason", "Value": "times"},
        ),
        listing(
            Look(
                (14, 27, 10, 4),
                "Studies",
                "ε by study of the policy: spent, still allowed, and allowed in all.",
                "none",
                decimals=2,
            ),
            Query(by_study("privacy_epsilon_spent")),
            Query(by_study("privacy_epsilon_left")),
            Query(by_study("privacy_epsilon_cap")),
            columns={"name": "name", "study": "study", "Value #A": "ε spent", "Value #B": "ε left", "Value #C": "cap"},
        ),
        listing(
            Look(
                (14, 31, 5, 4),
                "Charters",
                "Digests of the charters pinned here; compare them with the centre's.",
                "none",
            ),
            Query(f"max by (charter, digest) (wardround_charter_info{{{JOB}}})"),
            columns={"charter": "charter", "digest": "digest"},
        ),
        everywhere.runs((19, 31, 5, 4), JOB),
    ]


def compiled() -> str:
    """The JSON."""
    about = "Wardround at a hospital: privacy spent and left, what the node does, what leaves the house."
    panels = [*_privacy(), *_spending(), *_node(), *_record()]
    return dashboard("wardround-site", "Wardround / Site", about, "hospital", panels)
