"""The command line as a whole: every command teaches with an example, one voice for errors."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from typer.main import get_command

from services.cli.__main__ import BROKEN, REFUSED, USAGE, app, main
from services.cli.completion import VARIABLE
from services.cli.reference import commands, told
from tests.support.documented import parse

TREE = {" ".join(words): command for words, command in commands(get_command(app))}
FOR_SCRIPTS = {
    "charter verify", "data check", "data import folder", "data import ham10000", "ledger show", "ledger verify",
    "model list", "models", "passport", "policy check", "predict", "report", "site check", "study check", "verify",
    "watch",
}  # fmt: skip


@pytest.mark.parametrize("name", TREE)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    text, example = told(TREE[name])
    assert text
    if name == "wardround completion":  # the one that a shell evaluates
        assert example == 'eval "$(wardround completion bash)"'
        example = "wardround completion bash"
    assert example.startswith(name if name != "wardround models" else "wardround model list"), example
    parse([word for word in shlex.split(example) if word != "…"])


@pytest.mark.parametrize("name", TREE)
def test_every_option_says_what_it_is(name: str) -> None:
    assert [parameter.name for parameter in TREE[name].params if not parameter.help] == []


def test_what_a_script_may_read_has_json() -> None:
    having = {
        name.removeprefix("wardround ")
        for name, command in TREE.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert having >= FOR_SCRIPTS


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["verify", "/nowhere"], REFUSED, "/nowhere"),
        (["verify"], USAGE, "see wardround verify --help"),
        (["verify", "--colour", "x"], USAGE, "see wardround verify --help"),
        (["no-such-command"], USAGE, "see wardround --help"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("wardround: ")
    assert said in err


@pytest.mark.parametrize("words", [["--debug", "verify", "/nowhere"], ["verify", "/nowhere", "--debug"]])
def test_debug_shows_where_an_error_came_from_wherever_it_stands(words: list[str]) -> None:
    with pytest.raises(Exception, match="/nowhere"):
        main(words)


def test_a_fault_of_the_program_says_so_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("services.cli.ledger.open_source", broken)
    assert main(["ledger", "show", "x"]) == BROKEN
    err = capsys.readouterr().err
    assert "planted" in err
    assert "--debug" in err
    assert "Traceback" not in err


def completed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    words = line.split(" ")
    monkeypatch.setenv(VARIABLE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    return capsys.readouterr().out.split()


def test_a_shell_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed("wardround stu", monkeypatch, capsys) == ["study"]
    assert {"check", "draft"} <= set(completed("wardround study ", monkeypatch, capsys))
    assert completed("wardround verify --js", monkeypatch, capsys) == ["--json"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_names_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{VARIABLE}=complete_{shell}" in script
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=script, text=True, check=True, env={"PATH": os.environ["PATH"]})


def test_completion_of_an_unknown_shell_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == USAGE
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err


def test_models_is_model_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    one = capsys.readouterr().out
    assert main(["model", "list", "--json"]) == 0
    assert capsys.readouterr().out == one
    assert all(row["suits"] for row in json.loads(one))
