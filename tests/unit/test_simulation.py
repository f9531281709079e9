"""Virtual hospitals: who is where, sums with masks and without, rounds that are the services' own."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.cli.__main__ import main
from services.common.documents.costs import study_epsilon
from services.common.documents.shape import round_shape
from services.common.documents.study import load_study
from services.common.errors import ServiceError
from services.common.secagg.encoding import LaneTable, decode_class
from services.common.secagg.rounding import clip_update
from services.hospital_node.architectures import build
from services.hospital_node.dataset import SPLITS
from services.hospital_node.evaluation import evaluate
from services.hospital_node.gradients import gradients
from services.hospital_node.models import initial_vector, load_vector, read_model_file
from services.hospital_node.training import Compute, Task, train_round
from services.simulation import partition
from services.simulation.consortium import COMMITTEE, assumed_charter, charter_for
from services.simulation.pool import Arrays, Cohort, pool_arrays
from services.simulation.rounds import Rounds
from services.simulation.simulate import Division, Simulation, Sites, simulate
from services.simulation.sums import MaskedSum, PlainSum
from tests.support.simulated import features, head_study, pictures, plain_study
from tests.support.sites import small_site

ONE_CORE = Compute(device="cpu", threads=1)
LABELS = {
    "train": np.repeat(np.arange(4), 50),
    "validation": np.repeat(np.arange(4), 5),
    "test": np.repeat(np.arange(4), 10),
}


def run(study: Path, sites: Sites, division: Division | None = None, **more: Any) -> Simulation:
    return simulate(study, sites, division or Division(), compute=ONE_CORE, **more)


def refusal(study: Path, sites: Sites, division: Division | None = None, **more: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        run(study, sites, division, **more)
    return caught.value.detail


def counted_keys() -> Callable[[], bytes]:
    numbers = itertools.count()
    return lambda: next(numbers).to_bytes(32, "big")


# Partitions


def test_equal_parts_differ_by_one_patient_of_a_split_at_most() -> None:
    found = partition.equal(LABELS, 7, seed=3)
    for split in SPLITS:
        counts = np.bincount(found[split], minlength=7)
        assert counts.sum() == len(LABELS[split])
        assert counts.max() - counts.min() <= 1


def skew(alpha: float) -> float:
    """How far a hospital's share of its commonest class is above an even one, on average over hospitals."""
    found = partition.dirichlet(LABELS, 8, alpha, seed=5)["train"]
    shares = [np.bincount(LABELS["train"][found == h], minlength=4).max() / (found == h).sum() for h in range(8)]
    return float(np.mean(shares))


def test_a_small_alpha_makes_hospitals_of_few_classes_and_a_large_one_makes_them_even() -> None:
    assert skew(0.05) > 0.75
    assert skew(1000.0) < 0.45


@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_under_dirichlet_everybody_has_somebody_to_train_on(alpha: float) -> None:
    found = partition.dirichlet(LABELS, 150, alpha, seed=1)
    assert np.bincount(found["train"], minlength=150).min() >= 1
    assert all(len(found[split]) == len(LABELS[split]) for split in SPLITS)


def test_a_partition_is_its_seeds() -> None:
    one, again, other = (partition.dirichlet(LABELS, 9, 0.5, seed) for seed in (4, 4, 5))
    assert all((one[split] == again[split]).all() for split in SPLITS)
    assert any((one[split] != other[split]).any() for split in SPLITS)


def test_no_patient_is_at_two_hospitals(tmp_path: Path) -> None:
    """Every image of the pool belongs to exactly one hospital, and all images of a patient to the same."""
    arrays = features(60)
    model = load_study(head_study(tmp_path, "local").read_bytes()).document.model
    pool = pool_arrays({"all": arrays}, model, bytes(32), tmp_path, by_site=False)
    assigned = partition.equal(pool.labels, 9, 1)
    inputs = pool.open(load_study((tmp_path / "study.yaml").read_bytes()).document, ONE_CORE)
    cohort = Cohort(tuple(f"h{i}" for i in range(9)), assigned, pool.dataset, inputs)
    at: dict[int, set[int]] = {}
    images = []
    for hospital in range(9):
        dataset, _ = cohort.open(hospital)
        for split in SPLITS:
            for own in dataset.fold(split).images:
                images += own.tolist()
                for image in own:
                    at.setdefault(int(np.asarray(arrays.patients)[image]), set()).add(hospital)
    assert sorted(images) == list(range(120))
    assert all(len(hospitals) == 1 for hospitals in at.values())


# Sums


def test_masked_and_plain_sums_are_the_integers_sum(tmp_path: Path) -> None:
    """The same released integers, bit for bit; what the aggregator would hold before the pods' release is not them."""
    charter = assumed_charter([f"h{i}" for i in range(5)], 3, 1)
    study = load_study(plain_study(tmp_path, cohort={"minimum": 3, "colluding_hospitals": 1}).read_bytes())
    for ring_bits in (16, 24, 32):
        table = LaneTable(round_shape(charter, study, 1).table.lanes, ring_bits)
        random = np.random.default_rng(ring_bits)
        vectors = [random.integers(-5, 6, table.total_lanes) for _ in range(5)]
        plain, masked = PlainSum(table), MaskedSum(table, COMMITTEE)
        for number, vector in enumerate(vectors):
            packed = table.ring.pack(vector.astype(np.int64).view(np.uint64).astype(np.uint32))
            plain.add(f"h{number}", packed)
            masked.add(f"h{number}", packed)
        held, total = masked.masked(), plain.close()
        assert masked.close() == total
        assert held != total
        oracle = sum(vectors)
        first, behind = table.lane_range("parameter")
        width = table.ring.lane_bytes
        found = decode_class(table, "parameter", total[first * width : behind * width])
        assert (found == oracle[first:behind]).all()


# Rounds


def test_the_history_under_none_is_what_the_pure_functions_give(tmp_path: Path) -> None:
    study = load_study(plain_study(tmp_path).read_bytes())
    document, arrays = study.document, pictures(30)
    pool = pool_arrays({"all": arrays}, document.model, bytes(32), tmp_path, by_site=False)
    cohort = Cohort(("a", "b"), partition.equal(pool.labels, 2, 1), pool.dataset, pool.open(document, ONE_CORE))
    charter = charter_for(study, cohort.names)
    start = initial_vector(document.model, 1)
    rounds = Rounds(charter, study, cohort, start, tmp_path, masks=False, compute=ONE_CORE, keys=counted_keys())
    told = rounds.run()

    keys, vector, hits, totals = counted_keys(), start, np.zeros(2), np.zeros(2)
    for number in (1, 2):
        lane = round_shape(charter, study, number).table.lane_class("parameter")
        total = np.zeros(start.size, np.int64)
        for hospital in (0, 1):
            dataset, inputs = cohort.open(hospital)
            if number == 2:
                counts = evaluate(vector, dataset, "validation", document, ONE_CORE, inputs)
                hits, totals = hits + counts.hits, totals + counts.totals
            result = train_round(
                vector, dataset, document, Task(study.digest, number, bytes(32)),
                progress=None, keys=keys, should_stop=lambda: False, compute=ONE_CORE, inputs=inputs,
            )  # fmt: skip
            assert result is not None
            clipped = clip_update(result.delta, document.encoding.update_clip, document.encoding.update_bound)
            within = np.clip(result.delta * clipped.factor, -clipped.limit, clipped.limit)
            total += np.rint(np.ldexp(within, lane.fraction_bits)).astype(np.int64)
        mean = np.ldexp(total.astype(np.float64), -lane.fraction_bits) / 2
        vector = (vector.astype(np.float64) + mean).astype(np.float32)
    assert np.array_equal(rounds.model.vector, vector)
    assert [one.verdict for one in told] == ["accepted"] * 3
    assert [(one.started_from, one.version) for one in told] == [(0, 1), (1, 2), (2, 2)]
    assert told[0].figures == {}
    assert told[1].figures["accuracy"] == hits.sum() / totals.sum()
    assert set(told[2].figures) == {"accuracy", "balanced_accuracy", "macro_auc"}


def test_scaffold_is_algorithm_1_from_end_to_end(tmp_path: Path) -> None:
    """Karimireddy 2020 (arXiv:1910.06378), option II, over whole rounds: gradients, lanes, sums, c and every c_i."""
    steps, rate, rounds, names = 4, 0.3, 3, ("a", "b")
    training = {"learning_rate": rate, "local_steps": steps, "batch_size": 64}
    path = plain_study(tmp_path, training=training, rounds=rounds, server={"strategy": "scaffold"})
    study = load_study(path.read_bytes())
    document = study.document
    pool = pool_arrays({"all": pictures(30)}, document.model, bytes(32), tmp_path, by_site=False)
    cohort = Cohort(names, partition.equal(pool.labels, 2, 1), pool.dataset, pool.open(document, ONE_CORE))
    charter, start = charter_for(study, names), initial_vector(document.model, 1)
    found = Rounds(charter, study, cohort, start, tmp_path, masks=True, compute=ONE_CORE, keys=counted_keys())
    assert [one.verdict for one in found.run()] == ["accepted"] * (rounds + 1)

    keys, x = counted_keys(), start.astype(np.float64)
    c, own = np.zeros(x.size), [np.zeros(x.size) for _ in names]
    for _ in range(rounds):
        moves, changes = [], []
        for hospital, c_i in enumerate(own):
            dataset, inputs = cohort.open(hospital)
            module = build(document.model).train()
            load_vector(module, x.astype(np.float32))
            gradient_of, _steps = gradients(module, inputs, dataset, document, keys)
            y = x.copy()
            for _ in range(steps):
                load_vector(module, y)
                y = y - rate * (gradient_of()[0] - c_i + c)
            after = c_i - c + (x - y) / (steps * rate)
            moves.append(y - x)
            changes.append(after - c_i)
            own[hospital] = after
        x = x + np.mean(moves, axis=0)
        c = c + np.sum(changes, axis=0) / len(names)
    assert np.abs(c).max() > 1e-3
    assert np.allclose(found.model.vector, x, rtol=0, atol=1e-5)
    plain = plain_study(tmp_path / "plain", training=training, rounds=rounds)
    fedavg = load_study(plain.read_bytes())
    other = Rounds(charter, fedavg, cohort, start, tmp_path, masks=False, compute=ONE_CORE, keys=counted_keys())
    other.run()
    assert not np.allclose(other.model.vector, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("mechanism", ["local", "shared"])
def test_every_mechanism_runs_and_says_what_study_check_says(tmp_path: Path, mechanism: str, masks: bool) -> None:
    study = head_study(tmp_path, mechanism)
    found = run(study, features(90), Division("equal", hospitals=3), masks=masks)
    assert [one["verdict"] for one in found.history] == ["accepted"] * 3
    assert found.version == 2
    assert not np.array_equal(found.vector, read_model_file(tmp_path / "v0.safetensors", found.layout))
    expected = study_epsilon(found.study.document)
    assert found.privacy["epsilon"] == max(expected.values())
    assert {split: values["with_spare_rounds"] for split, values in found.privacy["splits"].items()} == expected
    assert sum(found.patients["train"]) + sum(found.patients["validation"]) + sum(found.patients["test"]) == 90


def test_noise_is_fresh_although_the_partition_has_a_seed(tmp_path: Path) -> None:
    study = head_study(tmp_path, "local")
    one, two = (run(study, features(60), Division("equal", hospitals=3, seed=8)) for _ in range(2))
    assert one.patients == two.patients
    assert not np.array_equal(one.vector, two.vector)


def test_a_training_that_fails_is_absent_and_too_many_end_the_study(tmp_path: Path) -> None:
    study = plain_study(tmp_path, training={"learning_rate": 1e300, "local_steps": 4, "batch_size": 64})
    detail = refusal(study, pictures(20), Division("equal", hospitals=2))
    assert detail.startswith("round 1: the training of 2 of 2 hospitals failed, the study needs 2 in a sum")


def test_arrays_have_a_partition_by_their_own_sites(tmp_path: Path) -> None:
    arrays = pictures(20)
    sited = Arrays(labels=arrays.labels, images=arrays.images, sites=["North"] * 12 + ["south_west"] * 8)
    found = run(plain_study(tmp_path), sited, Division("column"))
    assert found.hospitals == ("north", "south-west")
    assert [sum(found.patients[split][i] for split in SPLITS) for i in (0, 1)] == [12, 8]


# Folders and the command line


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    for name in ("alice", "bob"):
        small_site(folder / name, folder / f"{name}-state")
    return folder


def test_the_command_writes_history_model_and_curve(
    sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = plain_study(tmp_path), tmp_path / "out"
    assert main(["simulate", str(study), "--data", str(sites), "--masks", "--json", "--output", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((out / "history.json").read_text())
    assert [one["hospital"] for one in told["hospitals"]] == ["alice", "bob"]
    assert told["privacy"] == {
        "mechanism": "none", "delta": None, "claimed_epsilon": None, "epsilon": None, "splits": {},
    }  # fmt: skip
    assert told["masks"] is True
    assert [row["number"] for row in told["history"]] == [1, 2, 3]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    again = main(["simulate", str(study), "--data", str(sites), "--output", str(out)])
    assert again == 1
    assert "is not overwritten" in capsys.readouterr().err


def test_a_folder_is_a_namespace_of_patients(sites: Path, tmp_path: Path) -> None:
    """p1 of alice is not p1 of bob: all 48 are there after a new partition."""
    found = run(plain_study(tmp_path), sites, Division("equal", hospitals=5))
    assert sum(sum(found.patients[split]) for split in SPLITS) == 48


def test_a_study_can_be_drafted_without_a_charter_to_be_simulated(
    sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafted = ["study", "draft", "--classes", "dark,light", "--image-size", "12", "--rounds", "1"]
    both = [*drafted, "--mechanism", "none", "--out", str(tmp_path / "s")]
    assert main([*both, "--hospitals", "2"]) == 0
    assert main(["simulate", str(tmp_path / "s" / "study.yaml"), "--data", str(sites)]) == 0
    assert "no single patient would be protected" in capsys.readouterr().out
    assert main([*drafted, "--out", str(tmp_path / "t")]) == 1
    assert "give either --charter FILE, or --hospitals N" in capsys.readouterr().err


# Refusals


@pytest.mark.parametrize(
    ("division", "sentence"),
    [
        (Division(), "1 hospital is no federation"),
        (Division("equal", hospitals=1), "1 hospitals, a federation has at least 2"),
        (Division("equal", hospitals=40), "40 hospitals cannot share"),
        (Division("dirichlet", hospitals=40), "40 hospitals cannot share"),
        (Division("dirichlet", hospitals=3, alpha=0.0), "alpha is 0, a Dirichlet needs one above 0"),
        (Division("column"), "arrays has no `sites` to divide it by"),
        (Division("thirds"), "partition 'thirds' is unknown: choose sites, column, equal, dirichlet"),
    ],
)
def test_a_partition_that_cannot_be_is_refused(tmp_path: Path, division: Division, sentence: str) -> None:
    assert refusal(plain_study(tmp_path), pictures(20), division).startswith(sentence)


def test_a_study_that_asks_for_more_hospitals_than_there_are(tmp_path: Path) -> None:
    study = plain_study(tmp_path, cohort={"minimum": 5, "colluding_hospitals": 1})
    detail = refusal(study, pictures(30), Division("equal", hospitals=4))
    assert detail.startswith("small asks for cohort.minimum 5, these are 4 hospitals")


GREY = np.zeros((4, 12, 12, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (Arrays(labels=[0, 1, 0, 1], images=GREY[:3]), "images of shape (3, 12, 12, 3) and uint8, the study needs (4,"),
        (Arrays(labels=[0, 1, 0, 1], images=GREY[:, :8]), "images of shape (4, 8, 12, 3) and uint8"),
        (Arrays(labels=[0, 1, 0, 1], images=GREY.astype(float)), "images of shape (4, 12, 12, 3) and float64"),
        (Arrays(labels=[0, 1, 0, 1], features=np.zeros((4, 9))), "has features, but small-cnn sees images"),
        (Arrays(labels=[0, 1, 0, 1]), "needs either `images` or `features`"),
        (Arrays(labels=[0, 1, 0, 2], images=GREY), "label 2 is not one of the study's (dark, light)"),
        (Arrays(labels=["grey"] * 4, images=GREY), "label 'grey' is not one of the study's"),
        (Arrays(labels=[0, 1, 0, 1], images=GREY, patients=[1, 2]), "has 4 labels and 2 patients"),
        (Arrays(labels=[0, 1, 0, 1], images=GREY, folds=["train"] * 3 + ["dev"]), "fold 'dev' is not train"),
        (
            Arrays(labels=[0, 1, 0, 1], images=GREY, patients=[1, 1, 2, 2], folds=["train", "test"] * 2),
            "'1' is in two folds",
        ),
        (Arrays(labels=[0, 1, 0, 1], images=GREY, folds=["test"] * 4), "no image is left to train on"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: Arrays, sentence: str) -> None:
    assert sentence in refusal(plain_study(tmp_path), arrays, Division("equal", hospitals=2))


def test_a_patient_at_two_sites_is_refused(tmp_path: Path) -> None:
    arrays = Arrays(labels=[0, 1, 0, 1], images=GREY, patients=[1, 1, 2, 2], sites=["x", "y", "x", "x"])
    assert refusal(plain_study(tmp_path), arrays, Division("column")).startswith("'1' is at x and at y")


def test_features_of_another_width_are_refused(tmp_path: Path) -> None:
    arrays = Arrays(labels=[0, 1], features=np.zeros((2, 512)))
    detail = refusal(head_study(tmp_path, "local"), arrays, Division("equal", hospitals=2))
    assert detail.startswith("arrays: features of shape (2, 512), the study needs (2, 1280)")


def test_folders_that_cannot_be_a_pool_are_refused(sites: Path, tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no metadata.csv, and no folder in it does" in refusal(study, tmp_path / "empty")
    assert "holds no metadata.csv" in refusal(study, tmp_path / "nowhere")
    assert "has no column 'ward'" in refusal(study, sites, Division("column", column="ward"))
    assert "some sites are folders and some are arrays" in refusal(study, {"a": sites / "alice", "b": pictures(9)})
    assert "the same name in small letters" in refusal(study, {"A": sites / "alice", "a": sites / "bob"})


def test_another_model_than_the_studys_is_refused(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no model")
    assert "is not the model that small starts from" in refusal(study, pictures(20), initial=other)
    (tmp_path / "v0.safetensors").unlink()
    found = run(study, pictures(20), Division("equal", hospitals=2))  # drafted with the usual seed: made again
    assert found.version == 2
    study.write_bytes(study.read_bytes().replace(found.study.document.model.initial.encode(), b"0" * 64))
    assert "is not beside it: give its file" in refusal(study, pictures(20), Division("equal", hospitals=2))
