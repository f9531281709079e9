"""`wardround`: one command for every hand that a consortium has. Errors are one line with the next step."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.completion import completion_init  # type: ignore[attr-defined]  # imported there, not re-exported

from services.cli import (
    audit,
    charter,
    completion,
    data,
    demo,
    gather,
    hospital,
    ledger,
    model,
    policy,
    predict,
    report,
    simulate,
    site,
    study,
    verify,
    watch,
)
from services.common.errors import Reason, ServiceError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated training for hospitals: the model travels, the images stay; only the masked sum is ever opened.",
    epilog="A first look: wardround demo. A real site begins with: wardround site init --role hospital --id alice …",
)
app.add_typer(site.app, name="site")
app.add_typer(charter.app, name="charter")
app.add_typer(study.app, name="study")
app.add_typer(policy.app, name="policy")
app.add_typer(hospital.app, name="hospital")
app.add_typer(ledger.app, name="ledger")
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(gather.app, name="evidence")
app.command("demo")(demo.demo)
app.command("models")(model.list_architectures)
app.command("completion")(completion.completion)
app.command("simulate")(simulate.simulate)
app.command("predict")(predict.predict)
app.command("export")(predict.export)
app.command("passport")(predict.passport)
app.command("verify")(verify.verify)
app.command("report")(report.report)
app.command("watch")(watch.watch)
app.command("audit")(audit.audit)

USAGE, REFUSED, BROKEN, INTERRUPTED = 2, 1, 3, 130


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show where an error came from; also after a command")] = False,
) -> None:
    """Options before any command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Exit codes: 0 done, 1 refused, 2 wrong usage, 3 a fault of this program."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"]  # wherever it stands
    if completion.VARIABLE in os.environ:
        completion_init()
    try:
        code = app(words, prog_name="wardround", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except Exception as error:
        if words != given:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    if isinstance(error, ServiceError):
        if error.reason is Reason.INTERNAL:
            return _say(f"{error.detail}; run again with --debug and report it", BROKEN)
        return _say(error.detail, REFUSED)
    if isinstance(error, typer.Abort):
        return _say("stopped", REFUSED)
    if hasattr(error, "format_message"):  # every usage error of typer, whichever click it rests on
        context = getattr(error, "ctx", None)
        if not error.format_message():  # no command was given: typer has shown the help already
            return USAGE
        path = context.command_path if context is not None else "wardround"
        return _say(f"{error.format_message().rstrip('.')}: see {path} --help", USAGE)
    return _say(f"unexpected {type(error).__name__}: {error}; run again with --debug and report it", BROKEN)


def _say(sentence: str, code: int) -> int:
    print("wardround: " + " ".join(sentence.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
