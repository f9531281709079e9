"""What a hospital shows to whoever scrapes it."""

import subprocess
import sys
from pathlib import Path

from prometheus_client import REGISTRY

from services.common.errors import Reason, ServiceError
from services.hospital_node import metrics
from services.hospital_node.admin import StatusBoard
from services.hospital_node.config import SiteDocuments, load_config
from services.hospital_node.ports import Progress
from tests.support.hospital_world import make_world

STUDY = bytes(range(32))
LABEL = {"study": "000102030405"}


def shown(name: str, /, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"wardround_{name}", labels)


def test_when_training_was_done_is_not_to_be_seen() -> None:
    """privacy.md §3: at q < 1 the time that training took tells how many patients were drawn."""
    for phase in ("training", "trained"):
        metrics.show(Progress(phase=phase))
        assert shown("hospital_phase", phase="training") == 1
        assert sum(shown("hospital_phase", phase=name) or 0 for name in metrics.PHASES) == 1
    assert "trained" not in metrics.PHASES


def test_epsilon_is_shown_by_study_and_of_the_data_set() -> None:
    figures = {"epsilon_spent": 1.5, "epsilon_left": 0.5, "rounds_left": 2, "dataset_epsilon_spent": 4.0}
    metrics.show(Progress(study=STUDY, study_name="moles", round=3, figures=figures))
    assert shown("privacy_epsilon_spent", **LABEL) == 1.5
    assert shown("privacy_epsilon_left", **LABEL) == 0.5
    assert shown("privacy_rounds_left", **LABEL) == 2
    assert shown("privacy_dataset_epsilon_spent") == 4
    assert shown("study_info", **LABEL, name="moles") == 1
    assert shown("privacy_epsilon_solo_spent", **LABEL) is None  # nobody has proven one, so none is shown


def test_the_figures_of_one_study_are_not_shown_as_those_of_the_next() -> None:
    progress = Progress(study=STUDY, study_name="moles", figures={"epsilon_spent": 1.5})
    progress.take(bytes(32), 1, 1)
    assert progress.figures == {}
    assert progress.study_name == ""


def test_caps_are_known_before_any_aggregator_is(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", 5_000)
    documents = SiteDocuments(load_config(world.write_site(tmp_path / "alice", "127.0.0.1:1")))
    metrics.show_policy(documents.policy())
    (entry,) = documents.policy().document.studies
    assert shown("privacy_epsilon_cap", study=entry.sha256[:12]) == entry.epsilon
    assert shown("study_info", study=entry.sha256[:12], name="") == 1
    assert shown("privacy_dataset_epsilon_cap") == documents.policy().document.dataset_epsilon


def test_the_ledger_head_has_the_time_of_the_newest_event() -> None:
    head = metrics.LedgerHead(3, 50_000)
    assert shown("ledger_head_timestamp_seconds") == 50
    head.show(3, 60_000)
    assert shown("ledger_head_timestamp_seconds") == 50
    head.show(4, 70_000)
    assert (shown("ledger_events"), shown("ledger_head_timestamp_seconds")) == (4, 70)


def test_status_has_the_epsilon_of_the_moment_when_it_is_asked_for() -> None:
    spent = {STUDY: 1.0}
    board = StatusBoard("alice", lambda study: {"epsilon_spent": spent[study]})
    assert dict(board.status().figures) == {}  # no study is open
    board.show(Progress(study=STUDY, figures={"rounds_left": 4.0}))
    for value in (1.0, 2.5):
        spent[STUDY] = value
        assert dict(board.status().figures) == {"rounds_left": 4.0, "epsilon_spent": value}


def test_status_says_the_rest_while_the_policy_cannot_be_used() -> None:
    def unusable(study: bytes) -> dict[str, float]:
        raise ServiceError(Reason.INVALID_DOCUMENT, "policy.yaml")

    board = StatusBoard("alice", unusable)
    board.show(Progress(phase="refused", study=STUDY, figures={"rounds_left": 4.0}))
    assert (board.status().phase, dict(board.status().figures)) == ("refused", {"rounds_left": 4.0})


def test_speed_and_gpu_memory_are_coarse() -> None:
    metrics.computed(12_345, 1.0)
    metrics.show(Progress(phase="submitting"))
    assert shown("training_images_per_second") == 12_000
    for used in (1, 5 << 30):
        metrics.gpu_memory(used, 80 << 30)
        metrics.show(Progress(phase="submitting"))
        assert shown("gpu_memory_bytes", kind="used") == 5 << 30
    assert shown("gpu_memory_bytes", kind="total") == 80 << 30
    metrics.gpu_memory(0, 0)
    metrics.show(Progress(phase="submitting"))
    assert shown("gpu_memory_bytes", kind="used") == 0


def test_no_figure_moves_while_a_training_runs() -> None:
    """Else the last change would say when it was done."""
    metrics.computed(1000, 1.0)
    metrics.show(Progress(phase="submitted"))
    for phase in ("fetching", "training", "trained"):
        metrics.computed(5000, 1.0)
        metrics.gpu_memory(1 << 30, 16 << 30)
        metrics.show(Progress(phase=phase))
        assert shown("training_images_per_second") == 1000
    metrics.show(Progress(phase="submitting"))
    assert shown("training_images_per_second") == 5000
    assert shown("gpu_memory_bytes", kind="total") == 16 << 30


def test_processor_time_of_a_hospital_is_not_shown() -> None:
    """It follows the size of every batch."""
    program = (
        "from prometheus_client import generate_latest\n"
        "from services.hospital_node import metrics\n"
        "assert b'process_cpu_seconds_total' in generate_latest()\n"
        "metrics.hide_the_process()\n"
        "metrics.hide_the_process()\n"
        "print(generate_latest().decode())\n"
    )
    shown_now = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "wardround_hospital_phase" in shown_now
    assert "process_" not in shown_now
    assert "python_gc" not in shown_now
