"""What the coordinating centre shows of a round in which one hospital declines and one stays away."""

from dataclasses import replace
from pathlib import Path

from prometheus_client import REGISTRY

from services.aggregator.metrics import show_history, show_members
from services.aggregator.round import State
from tests.support.aggregator_world import make_world, until
from tests.support.fake_federation import federation, over


def shown(name: str, /, **labels: str) -> float:
    value = REGISTRY.get_sample_value(f"wardround_{name}", labels)
    assert value is not None, f"{name} {labels} is not there"
    return value


def test_the_metrics_name_who_took_part_and_survive_a_restart(tmp_path: Path) -> None:
    causes = ("silent", "declined", "left_out")
    before = {cause: shown("hospitals_dropped_total", cause=cause) for cause in causes}
    declined = shown("declined_rounds_total", reason="POLICY_REFUSES")
    timing = {"train_seconds": 0.5, "submit_seconds": 3}
    with federation(
        tmp_path, rounds=1, hospitals=("alice", "bob", "carol", "dave", "erin"), study={"timing": timing}
    ) as whole:
        whole.join("alice", "bob", "carol")
        whole.join("dave", auto=False)
        whole.hospitals["dave"].wait_for(lambda now: now.round == 1)
        assert shown("round_phase_ends_timestamp_seconds") > shown("round_phase_started_timestamp_seconds") > 0
        whole.hospitals["dave"].decline(whole.hospitals["dave"].now)
        until(lambda: shown("member_declined", member="dave") == 1)
        whole.hospitals["alice"].wait_for(over(1))
        until(lambda: shown("round_phase", phase="finished") == 1)
        after = {cause: shown("hospitals_dropped_total", cause=cause) - before[cause] for cause in causes}
        assert after == {"silent": 1, "declined": 1, "left_out": 0}
        assert shown("declined_rounds_total", reason="POLICY_REFUSES") == declined + 1
        assert shown("member_connected", role="hospital", member="dave") == 1
        assert shown("member_connected", role="hospital", member="erin") == 0
        assert shown("round_phase_ends_timestamp_seconds") == 0
        assert shown("charter_reports", charter="current", role="pod") == 4
        assert shown("charter_differs", role="hospital") == 0
        world = whole.world
    with world.start():
        assert shown("cohort_size") == 3
        assert shown("member_round", role="hospital", member="alice") == 1
        assert shown("member_round", role="hospital", member="dave") == 0
        assert max(shown("member_round", role="pod", member=pod.id) for pod in world.documents.charter.roster.pods) == 1
        assert shown("study_info", study=world.study.digest.hex()[:12], name=world.study.document.name) == 1


def test_a_member_with_another_charter_is_counted(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        whole.join("alice")
        until(lambda: shown("member_connected", role="hospital", member="alice") == 1)
        whole.running.coordinator.enrolment.join(object(), "bob", (b"?" * 32,))
        assert shown("charter_differs", role="hospital") == 1


def test_nothing_is_shown_of_a_charter_or_a_member_that_an_amendment_left_behind(tmp_path: Path) -> None:
    roster = make_world(tmp_path).documents.charter.roster
    *stay, leaves = roster.hospitals
    old, new = b"1" * 32, b"2" * 32
    show_members(roster, {"current": old, "next": new}, {}, {leaves: (old, new)})
    show_history(roster, State(), roster.hospitals, {})
    assert shown("charter_reports", charter="next", role="hospital") == 1
    assert shown("member_connected", role="hospital", member=leaves) == 1
    assert shown("member_round", role="hospital", member=leaves) == 0
    smaller = replace(roster, hospitals={name: roster.hospitals[name] for name in stay})
    show_members(smaller, {"current": new}, {}, {stay[0]: (new,)})
    show_history(smaller, State(), stay, {})
    assert shown("charter_reports", charter="current", role="hospital") == 1
    for name, labels in {
        "charter_reports": {"charter": "next", "role": "hospital"},
        "member_connected": {"role": "hospital", "member": leaves},
        "member_round": {"role": "hospital", "member": leaves},
        "member_submitted": {"member": leaves},
        "member_declined": {"member": leaves},
    }.items():
        assert REGISTRY.get_sample_value(f"wardround_{name}", labels) is None, name
    assert shown("member_connected", role="hospital", member=stay[0]) == 1
