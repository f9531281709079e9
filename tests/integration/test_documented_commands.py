"""Every command in the quick start and the operations guide is real: it parses, or names charts and values that are."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.documented import commands, parse, untitled

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "docs" / name for name in ("quickstart.md", "operations.md", "simulate.md")]
_HELM = ("install", "upgrade", "test", "uninstall", "rollback")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_block_of_code_has_a_title(guide: Path) -> None:
    assert untitled(guide) == 0


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_wardround_command_parses(guide: Path) -> None:
    found = [words for title in ("laptop", "site") for words in commands(guide, title)]
    assert len(found) >= 5
    for words in found:
        assert Path(words[0]).name == "wardround", words
        parse(words)


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["wardround", "report", "RUN", "--colour"])


def test_every_helm_command_names_a_chart_and_its_values() -> None:
    helm = [words for words in commands(ROOT / "docs" / "operations.md", "kubernetes") if words[0] == "helm"]
    assert len(helm) >= 6
    charts: dict[str, str] = {}
    for words in helm:
        assert words[1] in _HELM, words
        if words[1] in ("install", "upgrade"):
            charts[words[2]] = words[3]
            values = YAML(typ="safe").load((ROOT / words[3] / "values.yaml").read_text())
            for flag, setting in pairwise(words):
                if flag in ("--set", "--set-file"):
                    place = values
                    for key in setting.split("=")[0].split("."):
                        assert key in place, f"{setting} is no value of {words[3]}"
                        place = place[key]
        else:
            assert words[2] in charts, f"{words[2]} was never installed"


def test_every_module_that_runs_in_a_container_is_there() -> None:
    found = [words for words in commands(ROOT / "docs" / "operations.md", "kubernetes") if "-m" in words]
    assert found
    for words in found:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
