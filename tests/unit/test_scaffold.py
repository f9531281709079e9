"""SCAFFOLD against Algorithm 1 of Karimireddy et al. 2020 (arXiv:1910.06378), option II for c_i, in plain Python."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.aggregator.modelfile import check_model_file
from services.aggregator.next_model import next_model
from services.aggregator.tally import SumCheck
from services.common.documents.shape import check_study, round_shape
from services.common.documents.strategies import CONTROL, model_numbers, strategy_in_words
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import LaneTable
from services.hospital_node.architectures import build
from services.hospital_node.control import control_change
from services.hospital_node.dataset import Dataset
from services.hospital_node.gradients import gradients
from services.hospital_node.inputs import open_inputs
from services.hospital_node.models import initial_vector, load_vector, read_control, read_model_file
from services.hospital_node.training import Compute, Task, open_device, train_round
from tests.support.aggregator_world import model_bytes
from tests.support.documents import make_documents, make_study
from tests.support.packed import encoded
from tests.support.sites import small_site, small_study

ONE_CORE = Compute(device="cpu", threads=1)
RATE, STEPS = 0.25, 3
HOSPITALS = 4  # N: those of the charter
D = 500
WIDE = {"update_bound": 100.0, "update_clip": 1e6, "control_bound": 100.0, "control_clip": 1e6}


def counted_keys() -> Callable[[], bytes]:
    """A reproducible stand-in for the operating system."""
    numbers = itertools.count()
    return lambda: next(numbers).to_bytes(32, "big")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("site")
    return small_site(folder / "data", folder / "state")


def test_a_hospitals_round_is_algorithm_1(site: Dataset, tmp_path: Path) -> None:
    """Lines 7 to 12: y ← y − η_l (g(y) − c_i + c); c_i⁺ = c_i − c + (x − y)/(K η_l); Δy = y − x, Δc = c_i⁺ − c_i."""
    study = small_study("none", training={"learning_rate": RATE, "local_steps": STEPS})
    x = initial_vector(study.model, 1)
    drawn = np.random.default_rng(5)  # test data only
    c, c_i = (drawn.normal(0, 0.01, x.size).astype(np.float32) for _ in range(2))
    found = train_round(
        x, site, study, Task(bytes(32), 1, bytes(32)), progress=tmp_path, keys=counted_keys(),
        should_stop=lambda: False, compute=ONE_CORE, correction=c.astype(np.float64) - c_i,
    )  # fmt: skip
    assert found is not None
    change = control_change(c, found.delta, study)

    module = build(study.model).train()
    load_vector(module, x)
    inputs = open_inputs(site, study.model, open_device(ONE_CORE), None)
    gradient_of, steps = gradients(module, inputs, site, study, counted_keys())
    assert steps == STEPS
    y, path = [float(number) for number in x], []
    for _ in range(steps):
        load_vector(module, np.array(y))
        g = gradient_of()[0].tolist()
        path.append(g)
        y = [y[j] - RATE * (g[j] - float(c_i[j]) + float(c[j])) for j in range(len(y))]
    after = [float(c_i[j]) - float(c[j]) + (float(x[j]) - y[j]) / (STEPS * RATE) for j in range(len(y))]
    assert np.allclose(found.delta, [y[j] - float(x[j]) for j in range(len(y))], rtol=0, atol=1e-9)
    assert np.allclose(change, [after[j] - float(c_i[j]) for j in range(len(y))], rtol=0, atol=1e-9)
    # What option II is for: c_i⁺ is the mean of the gradients along the way.
    assert np.allclose(after, np.mean(path, axis=0), rtol=0, atol=1e-9)


def study_of(rounds: int = 3, learning_rate: float = 0.5) -> LoadedStudy:
    server = {"strategy": "scaffold", "learning_rate": learning_rate}
    return make_study(
        "none", rounds=rounds, server=server, encoding=WIDE, model={"parameters": D}, evaluation={"gate_rounds": ()}
    )


def summed(table: LaneTable, members: int, seed: int) -> tuple[dict[str, np.ndarray], bytes]:
    """(values of the sum by class, its packed lanes) of `members` hospitals."""
    drawn = np.random.default_rng(seed)  # test data only
    values = {name: drawn.integers(-(2**20), 2**20, D) for name in ("parameter", "control")}
    packed = bytearray(encoded(table, {"weight": np.ones(1, np.int64), **values}, noised=True))
    packed[:16] = members.to_bytes(4, "little") * 4
    return values, bytes(packed)


def test_the_servers_round_is_algorithm_1(tmp_path: Path) -> None:
    """Lines 16 and 17: x ← x + η_g mean Δy over S, c ← c + |S|/N mean Δc over S, with three, four, three of N = 4."""
    study = study_of()
    x = np.frombuffer(model_bytes(D)[-4 * D :], "<f4").tolist()
    c = [0.0] * D
    model = tmp_path / "v0"
    model.write_bytes(model_bytes(D))
    for number, members in ((1, 3), (2, 4), (3, 3)):
        table = round_shape(make_documents().charter, study, number).table
        values, packed = summed(table, members, number)
        (tmp_path / "sum").write_bytes(packed)
        keeps, pairs = next_model(study.document, number, members, HOSPITALS, table, model, None, tmp_path / "sum")
        model = tmp_path / f"v{number}"
        model.write_bytes(b"".join(numbers for numbers, _ in pairs))
        assert not keeps
        unit = {name: 2.0 ** table.lane_class(name).fraction_bits for name in values}
        for j in range(D):
            mean_y = values["parameter"][j] / unit["parameter"] / members
            mean_c = values["control"][j] / unit["control"] / members
            x[j] = float(np.float32(x[j] + 0.5 * mean_y))
            c[j] = float(np.float32(c[j] + members / HOSPITALS * mean_c))
        layout = (("w", (D,)),)
        assert np.allclose(read_model_file(model, layout), x, rtol=1e-6, atol=1e-6)
        if number < 3:
            assert np.allclose(read_control(model, layout), c, rtol=1e-6, atol=1e-6)
            with pytest.raises(ServiceError, match=f"it holds {2 * D} numbers"):
                check_model_file(model, D)  # no file to begin a study with
    # The last round publishes a model like any other.
    assert check_model_file(model, D)
    assert CONTROL not in json.loads(model.read_bytes()[8 : 8 + int.from_bytes(model.read_bytes()[:8], "little")])
    assert not read_control(model, layout).any()


def test_the_same_bytes_from_the_same_sum(tmp_path: Path) -> None:
    """`verify` makes the file again: nothing but the study, the charter's N, the last file and the sum is in it."""
    study, table = study_of(), round_shape(make_documents().charter, study_of(), 1).table
    (tmp_path / "v0").write_bytes(model_bytes(D))
    (tmp_path / "sum").write_bytes(summed(table, 3, 1)[1])

    def made(hospitals: int) -> bytes:
        pairs = next_model(study.document, 1, 3, hospitals, table, tmp_path / "v0", None, tmp_path / "sum")[1]
        return b"".join(numbers for numbers, _ in pairs)

    assert made(4) == made(4)
    assert made(4) != made(5)


def test_a_control_variate_beyond_float32_rejects_the_round(tmp_path: Path) -> None:
    study, table = study_of(), round_shape(make_documents().charter, study_of(), 1).table
    (tmp_path / "sum").write_bytes(summed(table, 3, 1)[1])
    header = json.dumps({
        "w": {"dtype": "F32", "shape": [D], "data_offsets": [0, 4 * D]},
        CONTROL: {"dtype": "F32", "shape": [D], "data_offsets": [4 * D, 8 * D]},
    }).encode()  # fmt: skip
    numbers = np.concatenate([np.zeros(D), np.zeros(D)]).astype("<f4").tobytes()
    (tmp_path / "v1").write_bytes(len(header).to_bytes(8, "little") + header + numbers)
    (tmp_path / "v1").write_bytes((tmp_path / "v1").read_bytes()[:-4] + np.array(np.inf, "<f4").tobytes())
    pairs = next_model(study.document, 1, 3, 1, table, tmp_path / "v1", None, tmp_path / "sum")[1]
    with pytest.raises(ServiceError) as caught:
        list(pairs)
    assert caught.value.reason is Reason.NOT_FINITE


def test_a_round_carries_two_lanes_a_parameter() -> None:
    charter, study = make_documents().charter, study_of()
    check_study(charter, study)
    table = round_shape(charter, study, 1).table
    assert [(lane.name, lane.values) for lane in table.lanes[-2:]] == [("parameter", D), ("control", D)]
    assert model_numbers(study.document) == 2 * D
    assert "control" not in {lane.name for lane in round_shape(charter, study, 4).table.lanes}  # the final evaluation
    assert strategy_in_words(study.document) == "SCAFFOLD (learning rate 0.5)"


def test_another_tensor_in_the_place_of_the_control_variate_is_refused(tmp_path: Path) -> None:
    study, table = study_of(), round_shape(make_documents().charter, study_of(), 1).table
    (tmp_path / "sum").write_bytes(summed(table, 3, 1)[1])
    (tmp_path / "v1").write_bytes(model_bytes(2 * D))
    with pytest.raises(ServiceError) as caught:
        list(next_model(study.document, 1, 3, HOSPITALS, table, tmp_path / "v1", None, tmp_path / "sum")[1])
    assert caught.value.reason is Reason.INVALID_DATA


def test_a_sum_of_changes_beyond_the_clip_is_a_fault() -> None:
    """protocol.md §7: the norm of the control lanes' sum is held to |U| times their own clip."""
    table = round_shape(make_documents().charter, study_of(), 1).table
    values, packed = summed(table, 3, 1)
    check = SumCheck(table, 3)
    check.add(packed)
    norm = float(np.linalg.norm(values["control"] / 2.0 ** table.lane_class("control").fraction_bits))
    check.check_norm("control", norm / 3 * 1.001)
    assert check.fault == ""
    check.check_norm("control", norm / 3 * 0.999)
    assert "control" in check.fault


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("local", {}, "control variates beside the updates, which the proof of local does not cover"),
    ("shared", {}, "control variates beside the updates, which the proof of shared does not cover"),
    ("none", {"training": {"momentum": 0.5}}, "whose own step is plain SGD"),
    ("none", {"training": {"proximal": 0.5}}, "whose own step is plain SGD"),
    ("none", {"server": {"averaging": "ema"}}, "server.averaging does not go with scaffold"),
    ("none", {"server": {"momentum": 0.5}}, "server.momentum is set, but scaffold does not read it"),
    ("none", {"gate": {"largest_drop": 0.5}}, "under scaffold set it to 1, or no gate_rounds"),
    ("none", {"encoding": {"control_bound": 1e10}}, "encoding.control_bound 1e+10 does not fit"),
    ("none", {"server": {"strategy": "fedavg"}, "encoding": {"control_clip": 1.0}}, "control_clip is set, but fedavg"),
]


@pytest.mark.parametrize(("mechanism", "changes", "words"), REFUSED)
def test_what_algorithm_1_does_not_have_is_refused(mechanism: str, changes: dict[str, Any], words: str) -> None:
    server = {"strategy": "scaffold", "momentum": 0.0, "learning_rate": 1.0, **changes.get("server", {})}
    study = make_study(mechanism, **{**changes, "server": server})
    with pytest.raises(ServiceError) as caught:
        check_study(make_documents().charter, study)
    assert caught.value.reason is Reason.INVALID_DOCUMENT
    assert words in caught.value.detail
    assert "\n" not in caught.value.detail
