"""`wardround policy`: a hospital's own consent, drafted for one study and tried against it."""

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.drafts import draft_policy
from services.cli.files import write_new
from services.common.documents.charter import load_charter
from services.common.documents.emit import emit
from services.common.documents.policy import load_policy
from services.common.documents.shape import check_study, total_rounds
from services.common.documents.site import read
from services.common.documents.study import load_study
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.hospital_node.policy import decide
from services.hospital_node.release import whole_study
from services.hospital_node.spending import Account, Caps

app = typer.Typer(no_args_is_help=True, help="A hospital's own consent: nothing outside it is allowed.")

_Charter = Annotated[Path, typer.Option(help="the charter that the study runs under")]
_Study = Annotated[Path, typer.Option(help="the study, exact bytes")]


@app.command()
def check(
    policy: Annotated[Path, typer.Argument(help="the policy")],
    study: _Study,
    charter: _Charter,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Would this policy let the whole study run, evaluations and spare rounds included? Exit code 1 if not.

    Example: wardround policy check policy.yaml --study study.yaml --charter charter.yaml
    """
    held, loaded = load_charter(read(charter), str(charter)), load_study(read(study), str(study))
    consent = load_policy(read(policy), str(policy))
    check_study(held, loaded)
    found = held.find(consent.document.hospital)
    if found is None or found[0] is not Role.HOSPITAL:
        raise ServiceError(
            Reason.UNKNOWN_MEMBER, f"{policy} is of {consent.document.hospital}, which is no hospital of {charter}"
        )
    document, allowed = consent.document, consent.allowed(loaded.digest)
    projection = Account(()).project(
        whole_study(held, loaded),
        [],
        remaining=0,
        study_cap=allowed.epsilon if allowed is not None else 0.0,
        caps=Caps(document.dataset_epsilon, document.dataset_delta),
    )
    projection = replace(projection, round=total_rounds(loaded), rounds_left=loaded.document.rounds)
    refusal = decide(consent, held, loaded, projection, datetime.datetime.now(datetime.UTC).date())
    if as_json:
        told = {
            "hospital": document.hospital,
            "study": loaded.digest.hex(),
            "allowed": refusal is None,
            "reason": refusal.reason.value if refusal is not None else "",
            "detail": refusal.detail if refusal is not None else "",
            "rounds": loaded.document.rounds,
            "epsilon": projection.study_after,
            "dataset_epsilon": projection.dataset_after,
            "dataset_epsilon_cap": document.dataset_epsilon,
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
    if refusal is not None:
        raise refusal
    if as_json:
        return
    Console(highlight=False, soft_wrap=True).print(
        f"{document.hospital} allows all {loaded.document.rounds} rounds of {loaded.document.name}"
        + (
            f": ε up to {projection.study_after:.3f}, {projection.dataset_after:.3f} of "
            f"{document.dataset_epsilon:g} for the data set, if nothing was spent before"
            if projection.study_after
            else ""
        )
    )


@app.command()
def draft(
    study: _Study,
    charter: _Charter,
    hospital: Annotated[str, typer.Option(help="this hospital's id")],
    out: Annotated[Path, typer.Option(help="the policy to write; not overwritten")],
    dataset: Annotated[str, typer.Option(help="name of the data set in the ledger")] = "images",
) -> None:
    """Write a policy that allows exactly this study. Read the study first: the policy is your consent to it.

    Example: wardround policy draft --study study.yaml --charter charter.yaml --hospital alice --out policy.yaml
    """
    held, loaded = load_charter(read(charter), str(charter)), load_study(read(study), str(study))
    check_study(held, loaded)
    blob = emit(draft_policy(held, loaded, hospital, dataset), comments=True)
    load_policy(blob, str(out))
    write_new(out, blob)
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: allows study {loaded.document.name} and nothing else\n"
        f"next: wardround policy check {out} --study {study} --charter {charter}"
    )
