"""The aggregator's sum, checks and server step against plain integers (protocol.md §4 step 9, §7, §8)."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.aggregator.modelfile import check_model_file, rewrite
from services.aggregator.strategy import Scalars, Step, fedavg
from services.aggregator.tally import SumCheck, class_blocks, class_sums, unmask
from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import SENTINEL, LaneTable
from services.common.secagg.messages import LaneClass
from tests.support import integer_oracle as oracle
from tests.support.aggregator_world import model_bytes
from tests.support.packed import encoded


def table_of(parameters: int, bits: int, bound: int = 100) -> LaneTable:
    lanes = (SENTINEL, LaneClass("weight", 1, 0, 1, 1), LaneClass("gate", 4, 0, bound, 2))
    return LaneTable((*lanes, LaneClass("parameter", parameters, 3, bound, 1)), bits)


def vectors(table: LaneTable, seed: int, count: int) -> list[dict[str, np.ndarray]]:
    drawn = np.random.default_rng(seed)  # test data only
    return [
        {
            lane.name: drawn.integers(-lane.bound, lane.bound + 1, lane.values).astype(np.int64)
            if lane.name == "parameter"
            else np.ones(lane.values, np.int64)
            for lane in table.lanes[1:]
        }
        for _ in range(count)
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([16, 24, 32]),
    parameters=st.sampled_from([1, 7, 200]),
    count=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_sum_minus_masks_is_the_integer_sum(tmp_path: Path, bits: int, parameters: int, count: int, seed: int) -> None:
    table = table_of(parameters, bits)
    values = vectors(table, seed, count)
    drawn = np.random.default_rng(seed + 1)  # test data only
    masks = [drawn.bytes(table.total_bytes) for _ in range(3)]
    paths = []
    for index, of_one in enumerate(values):
        y = encoded(table, of_one)
        for mask in masks:
            y = oracle.add([y, mask], bits, table.total_bytes)
        path = tmp_path / f"y{index}"
        path.write_bytes(y + b"an opening behind it")
        paths.append(path)
    pieces = []
    for index, mask in enumerate(masks):
        whole = bytes(table.total_bytes)
        for _ in range(count):
            whole = oracle.add([whole, mask], bits, table.total_bytes)
        path = tmp_path / f"p{index}"
        path.write_bytes(whole)
        pieces.append(path)
    check = SumCheck(table, count)
    found = b"".join(check.add(chunk) for chunk in unmask(table, paths, pieces))
    assert check.fault == ""
    assert check.digest.result() == oracle.vector_digest(found)
    summed = [sum(int(of_one["parameter"][i]) for of_one in values) for i in range(parameters)]
    (tmp_path / "sum").write_bytes(found)
    assert class_sums(table, "parameter", tmp_path / "sum").tolist() == summed
    assert class_sums(table, "gate", tmp_path / "sum").tolist() == [count] * 4
    assert check.squares["parameter"] == pytest.approx(sum(value * value for value in summed) / 64)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_many_chunks_with_many_workers_keep_their_order(tmp_path: Path, bits: int) -> None:
    table = table_of(1_200_000, bits)
    (values,) = vectors(table, 3, 1)
    (tmp_path / "y").write_bytes(encoded(table, values))
    found = b"".join(unmask(table, [tmp_path / "y", tmp_path / "y"], [tmp_path / "y"], workers=3))
    assert found == (tmp_path / "y").read_bytes()


def faulty(lane: str, value: int, size: int = 3) -> str:
    table = table_of(6, 32)
    numbers = {entry.name: np.zeros(entry.values, np.int64) for entry in table.lanes[1:]}
    numbers[lane][0] = value
    packed = bytearray(encoded(table, numbers, noised=True))
    packed[:16] = size.to_bytes(4, "little") * 4
    check = SumCheck(table, 3)
    check.add(bytes(packed))
    return check.fault


def test_P_23_wrong_sentinels_and_impossible_lanes_reject_the_sum() -> None:
    assert faulty("parameter", 300) == ""
    assert "parameter" in faulty("parameter", 301)
    assert "parameter" in faulty("parameter", -301)
    assert "weight" in faulty("weight", 4)
    assert "sentinels" in faulty("parameter", 0, size=4)


def test_the_norm_is_held_to_the_clip() -> None:
    table = table_of(100, 32)
    check = SumCheck(table, 2)
    numbers = {entry.name: np.zeros(entry.values, np.int64) for entry in table.lanes[1:]}
    numbers["parameter"][:] = 80
    packed = bytearray(encoded(table, numbers))
    packed[:16] = (2).to_bytes(4, "little") * 4
    check.add(bytes(packed))
    check.check_norm("parameter", 50.0)  # the norm is 10 * sqrt(100) = 100 = 2 * 50
    assert check.fault == ""
    check.check_norm("parameter", 47.0)
    assert "norm" in check.fault


def test_a_lost_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(b"short")
    with pytest.raises(ServiceError) as caught:
        list(unmask(table_of(6, 32), [tmp_path / "y"], []))
    assert caught.value.reason is Reason.STORAGE


def test_fedavg_moves_by_the_mean_and_copies_the_header(tmp_path: Path) -> None:
    (tmp_path / "v0").write_bytes(model_bytes(1000, 0.5))
    sums = np.arange(1000, dtype=np.int64) - 500
    blocks = iter([sums[:600], sums[600:]])
    pairs = list(rewrite(tmp_path / "v0", None, 1000, blocks, Step(0, Scalars(1), 3, fedavg(0.5, 4))))
    new = b"".join(numbers for numbers, _ in pairs)
    assert b"".join(kept for _, kept in pairs) == b""
    old = (tmp_path / "v0").read_bytes()
    offset = check_model_file(tmp_path / "v0", 1000)
    assert new[:offset] == old[:offset]
    expected = [np.float32(np.float32(i % 7 + 0.5) + 0.5 * (i - 500) / 8 / 4) for i in range(1000)]
    assert np.frombuffer(new[offset:], "<f4").tolist() == expected


def test_a_step_beyond_float32_is_refused() -> None:
    step = Step(0, Scalars(1), 0, fedavg(1e38, 1))
    with pytest.raises(ServiceError) as caught:
        step.run(np.array([1e38], np.float32), np.zeros((0, 1)), np.array([100], np.int64))
    assert caught.value.reason is Reason.NOT_FINITE


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(kind: str, count: int, start: int, stop: int) -> dict[str, object]:
    return {"dtype": kind, "shape": [count], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 20,
        header([1]) + bytes(4),
        header({"w": tensor("F16", 2, 0, 4)}) + bytes(4),
        header({"w": tensor("F32", 1, 4, 8)}) + bytes(8),
        header({"w": tensor("F32", 1, 0, 4)}) + bytes(8),
        header({"w": tensor("F32", 2, 0, 8)}) + bytes(8),
        header({"b": tensor("F32", 1, 0, 4), "a": tensor("F32", 0, 4, 4)}) + bytes(4),
    ],
)
def test_other_model_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(ServiceError) as caught:
        check_model_file(tmp_path / "m", 1)
    assert caught.value.reason is Reason.INVALID_DATA


def test_blocks_of_a_class_never_split_a_value(tmp_path: Path) -> None:
    table = table_of(50, 24)
    (values,) = vectors(table, 9, 1)
    (tmp_path / "sum").write_bytes(encoded(table, values))
    blocks = list(class_blocks(table, "gate", tmp_path / "sum", values=3))
    assert [len(block) for block in blocks] == [3, 1]
    assert np.array_equal(
        np.concatenate(list(class_blocks(table, "parameter", tmp_path / "sum", 7))), values["parameter"]
    )
