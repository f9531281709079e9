"""docs/documents.md: its examples load and fit one another, and no key is left unexplained."""

import hashlib
import re
from pathlib import Path

import pytest

from services.common.documents.charter import Charter, load_charter, load_join, load_signatures
from services.common.documents.pin import load_pin, select
from services.common.documents.policy import AllowedStudy, Policy, load_plan, load_policy
from services.common.documents.shape import check_study
from services.common.documents.strict import Section
from services.common.documents.study import Study, load_study

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "documents.md").read_text()


def example(name: str) -> bytes:
    return (DOCS / "examples" / name).read_bytes()


def test_the_examples_load_and_fit_one_another() -> None:
    charter = load_charter(example("charter.yaml"))
    assert len(load_signatures(example("charter.signatures.yaml"), charter)) == charter.roster.committee.quorum
    assert select(load_pin(example("pin.yaml")), [charter]).current is charter
    join = load_join(example("join.yaml"))
    found = charter.find(join.id)
    assert found is not None
    assert found == (join.role, join.member)
    study = load_study(example("study.yaml"))
    check_study(charter, study)
    policy = load_policy(example("policy.yaml"))
    assert policy.document.hospital == join.id
    assert policy.allowed(study.digest) is not None
    assert load_plan(example("plan.yaml")).study == hashlib.sha256(example("study.yaml")).hexdigest()


@pytest.mark.parametrize("name", ["pin.yaml", "study.yaml", "policy.yaml", "plan.yaml"])
def test_the_guide_shows_the_very_files(name: str) -> None:
    shown = re.search(rf"\(examples/{re.escape(name)}\):\n```yaml\n(.*?)```", GUIDE, re.DOTALL)
    assert shown is not None
    assert shown[1].encode() == example(name)


def keys(section: type[Section]) -> set[str]:
    return set(section.model_fields)


@pytest.mark.parametrize("section", [Charter, Study, Policy, AllowedStudy])
def test_every_key_is_explained(section: type[Section]) -> None:
    names = keys(section)
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names |= keys(field.annotation)
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", GUIDE)) == []
