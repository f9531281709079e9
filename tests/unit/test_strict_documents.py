"""One sentence for every way in which a file can be wrong; nothing is guessed."""

import datetime
import hashlib

import pytest

from services.common.documents.emit import emit
from services.common.documents.policy import load_plan, load_policy
from services.common.documents.strict import MAX_DOCUMENT_BYTES
from services.common.documents.study import Study, load_study
from services.common.errors import Reason, ServiceError
from tests.support.documents import make_documents, make_policy, make_study, study_blob, study_fields

GOOD = study_blob(study_fields())


def refusal(blob: bytes) -> str:
    with pytest.raises(ServiceError) as caught:
        load_study(blob, "study.yaml")
    assert caught.value.reason is Reason.INVALID_DOCUMENT
    assert "\n" not in caught.value.detail
    return caught.value.detail


def line_of(text: str) -> int:
    return GOOD.decode().splitlines().index(text) + 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  clip: 1.0", "  clp: 1.0", ["privacy.clp is unknown", "nearest is privacy.clip"]),
        ("rounds: 4", "rounds: 4\nrounds: 40", ["rounds", "twice"]),
        ("rounds: 4", "rounds: &all 4", ["anchor &all"]),
        ("rounds: 4", "rounds: !!python/name:os.system 4", ["tag"]),
        ("rounds: 4", "rounds: four", ["rounds must be a valid integer", "'four'"]),
        ("rounds: 4", 'rounds: "4"', ["rounds must be a valid integer", "'4'"]),
        ("rounds: 4", "rounds: 4.0", ["rounds must be a valid integer", "4.0"]),
        ("rounds: 4", "rounds: true", ["rounds must be a valid integer", "True"]),
        ("rounds: 4", "rounds: 0", ["rounds must be greater than or equal to 1", "got 0"]),
        ("rounds: 4", "<<: {rounds: 4}", ["'<<'"]),
        ("rounds: 4", "rounds: 4\n7: 8", ["'7' must be a plain word"]),
        ("name: lesions", "name: 2027-01-01", ["name must be a valid string", "in quotes"]),
        ("name: lesions", "name: Lesions", ["'Lesions'", "DNS label"]),
        ("synthetic: true", "synthetic: yes", ["synthetic must be a valid boolean"]),
        ("expires: 2030-01-31", "expires: 2030-13-31", ["expires cannot be read"]),
        ("expires: 2030-01-31", "expires: 2030-01-31 10:00:00", ["expires must be a valid date"]),
        ("  delta: 1e-05", "  delta: .nan", ["privacy.delta must be a finite number"]),
        ("  clip: 1.0", "  clip: .inf", ["privacy.clip must be a finite number"]),
        ("  mechanism: local", "  mechanism: lokal", ["privacy.mechanism must be 'local', 'shared' or 'none'"]),
        ("  classes: [benign, malignant]", "  classes: [benign, benign]", ["model.classes", "twice"]),
        ("  classes: [benign, malignant]", "  classes: benign", ["model.classes must be a valid tuple"]),
        ("  gate_rounds: [2]", "  gate_rounds: [3, 2]", ["gate_rounds must ascend"]),
        ("wardround: study/v1", "wardround: study/v2", ["'study/v2'", "study/v1 is needed"]),
        ("wardround: study/v1\n", "", ["begin it with `wardround: study/v1`"]),
        ("rounds: 4", "rounds: [4", ["is not YAML here"]),
        ("rounds: 4", "---\nrounds: 4", ["another document"]),
        ("rounds: 4\n", "", ["rounds is missing"]),
        ("  learning_rate: 0.1\n  momentum", "  momentum", ["training.learning_rate is missing"]),
    ],
)
def test_refused_in_one_sentence(old: str, new: str, words: list[str]) -> None:
    text = GOOD.decode()
    assert old in text
    sentence = refusal(text.replace(old, new, 1).encode())
    for word in words:
        assert word in sentence
    assert sentence.startswith("study.yaml")


def test_the_line_is_named() -> None:
    line = line_of("  noise_multiplier: 4.0")
    assert f"study.yaml line {line}: privacy.noise_multiplier must be" in refusal(
        GOOD.replace(b"  noise_multiplier: 4.0", b"  noise_multiplier: -4.0")
    )
    assert f"study.yaml line {line}: the key privacy.noise_multiplyer is unknown" in refusal(
        GOOD.replace(b"  noise_multiplier: 4.0", b"  noise_multiplyer: 4.0")
    )


def test_a_misspelt_key_is_told_before_the_key_that_is_then_missing() -> None:
    assert "purpos is unknown; the nearest is purpose" in refusal(GOOD.replace(b"purpose:", b"purpos:"))


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"", "mapping"),
        (b"- 1", "mapping"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
        (GOOD.replace(b"lesions", b"les\x00ions"), "not YAML"),
        (b"[" * 100_000, "nested too deeply"),
        (GOOD + b"#" * MAX_DOCUMENT_BYTES, f"at most {MAX_DOCUMENT_BYTES}"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchor"),
    ],
)
def test_what_is_no_document_is_refused(blob: bytes, words: str) -> None:
    assert words in refusal(blob)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_scientific_notation_is_a_number(text: str) -> None:
    blob = GOOD.replace(b"  delta: 1e-05", f"  delta: {text}".encode())
    assert load_study(blob).document.privacy.delta == 1e-5


def test_the_digest_is_that_of_the_exact_bytes() -> None:
    """CRLF and trailing newlines change the digest, never the meaning (kubernetes.md: templating must keep both)."""
    variants = [GOOD, GOOD.replace(b"\n", b"\r\n"), GOOD + b"\n", GOOD.rstrip(b"\n"), b"# note\n" + GOOD]
    loaded = [load_study(blob) for blob in variants]
    assert [study.digest for study in loaded] == [hashlib.sha256(blob).digest() for blob in variants]
    assert len({study.digest for study in loaded}) == len(variants)
    assert all(study.document == loaded[0].document for study in loaded)
    assert [study.blob for study in loaded] == variants


def test_a_loaded_document_never_changes() -> None:
    study = load_study(GOOD)
    with pytest.raises(Exception, match="frozen"):
        study.document.rounds = 9  # type: ignore[misc]


def test_drafts_are_read_back_equal() -> None:
    charter, study = make_documents().charter, make_study()
    policy = make_policy("alice", study)
    for document in (charter.document, study.document, policy.document):
        for comments in (False, True):
            blob = emit(document, comments=comments)
            assert type(document).model_validate(document) == document
            assert emit(_loaded(document, blob), comments=comments) == blob


def _loaded(document: object, blob: bytes) -> object:
    from services.common.documents.strict import Document, load

    assert isinstance(document, Document)
    found = load(type(document), blob, "draft")
    assert found == document
    return found


@pytest.mark.parametrize("text", ["yes", "null", "12e4567", "a: b", " x", "ü\n", "#", "", "- a", "0x10", "~", '"', "é"])
def test_any_text_survives_a_draft(text: str) -> None:
    fields = study_fields()
    fields["purpose"] = f"{text} and at least ten letters"
    fields["model"]["classes"] = (text or "empty", "other")
    study = load_study(study_blob(fields))
    assert study.document == Study.model_validate(fields)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "abc"}, "studies[0].sha256 must be exactly 64 lower-case hex digits"),
        ({"mechanisms": ("none",), "no_privacy": None}, "no_privacy: accepted"),
        ({"minimum_cohort": 3, "colluding_hospitals": 2}, "at least colluding_hospitals + 2 = 4 (P-12)"),
    ],
)
def test_a_senseless_policy_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ServiceError) as caught:
        make_policy("alice", make_study(), **changes)
    assert words in caught.value.detail


def test_a_policy_denies_what_it_does_not_list() -> None:
    study, other = make_study(), make_study(name="other")
    policy = make_policy("alice", study)
    entry = policy.allowed(study.digest)
    assert entry is not None
    assert entry.until == datetime.date(2030, 1, 31)
    assert policy.allowed(other.digest) is None
    blob = policy.blob + policy.blob[policy.blob.index(b"  - sha256") :]
    with pytest.raises(ServiceError, match="repeats the study"):
        load_policy(blob)


def test_a_plan_names_its_study() -> None:
    plan = load_plan(b'wardround: plan/v1\nstudy: "' + b"ab" * 32 + b'"\nthrough_round: 3\n')
    assert plan.through_round == 3
    with pytest.raises(ServiceError, match="study must be exactly 64"):
        load_plan(b"wardround: plan/v1\nstudy: abc\nthrough_round: 3\n")
