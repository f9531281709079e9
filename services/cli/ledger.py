"""`wardround ledger`: what a hospital has spent, its chain, and its export; offline (privacy.md L-5)."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from services.cli.files import write_new
from services.cli.ledger_source import Source, open_source
from services.cli.passport import round_up
from services.common.documents.policy import LoadedPolicy, load_policy
from services.common.documents.site import read
from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import LedgerMark
from services.hospital_node.events import Debit, Joined
from services.hospital_node.ledger import verify_entries
from services.hospital_node.spending import Account, Caps

app = typer.Typer(
    no_args_is_help=True, help="A hospital's ledger: what was spent, what is left, and whether it is whole."
)

_Source = Annotated[Path, typer.Argument(help="state folder of a hospital, its admin socket, or a ledger.jsonl")]


@app.command()
def show(
    source: _Source,
    policy: Annotated[
        Path | None, typer.Option(help="the policy in force; without it, the caps at the last joining")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """ε spent and left by study and for the data set, rounds left, and ε_solo: what the own noise alone would give.

    Example: wardround ledger show /var/lib/wardround --policy policy.yaml
    """
    opened = open_source(source)
    verify_source(opened)
    consent = load_policy(read(policy), str(policy)) if policy is not None else None
    found = figures(Account(entry.parsed() for entry in opened.entries), consent)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(Console(highlight=False), found, len(opened.entries))


@app.command()
def verify(
    source: _Source,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Walk the chain from its first link; of a state folder also: whatever was sent is debited, at the mark it names.

    Exit code 1 names the first broken link. What it cannot see is a chain that was cut at its end, or a whole folder
    that was put back from a backup: the last head must be the one in the last receipt, and the pods remember it.

    Example: wardround ledger verify ledger.jsonl
    """
    opened = open_source(source)
    mark = verify_source(opened)
    if as_json:
        found = {
            "events": mark.sequence if mark is not None else 0,
            "head": mark.head.hex() if mark is not None else "",
            "submissions": len(opened.sent) if opened.start is not None else None,
        }
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    if mark is None:
        console.print(f"{source}: empty, nothing was ever debited")
        return
    console.print(f"{source}: {mark.sequence} events in one chain")
    console.print(f"head {mark.head.hex()}")
    if opened.start is not None:
        console.print(f"{len(opened.sent)} submissions, each debited before it was signed")


@app.command()
def export(
    source: _Source,
    out: Annotated[Path | None, typer.Option(help="file to write, not overwritten; default: standard output")] = None,
) -> None:
    """Write the ledger as JSON lines, one event each with the head that binds it; verified before.

    Example: wardround ledger export /var/lib/wardround --out ledger.jsonl
    """
    opened = open_source(source)
    verify_source(opened)
    blob = "".join(entry.line() + "\n" for entry in opened.entries).encode()
    if out is None:
        sys.stdout.buffer.write(blob)
    else:
        write_new(out, blob)
        Console(highlight=False, soft_wrap=True).print(f"{out}: {len(opened.entries)} events")


def verify_source(source: Source) -> LedgerMark | None:
    """The chain's last mark. Raises ROLLED_BACK naming the first broken link, or what was sent without its debit."""
    mark = verify_entries(source.entries, source.start)
    joined, paid = set[str](), set[str]()
    for entry in source.entries:
        event = entry.parsed()
        if isinstance(event, Joined):
            joined.add(event.study)
        elif event.study not in joined:
            raise ServiceError(
                Reason.MALFORMED, f"event {entry.sequence} is of study {event.study[:12]}…, which was never joined"
            )
        elif isinstance(event, Debit):
            paid.add(event.vector)
    heads = {entry.sequence: entry.head for entry in source.entries}
    for sent in source.sent:
        if sent.vector not in paid or heads.get(sent.mark.sequence) != sent.mark.head:
            raise ServiceError(
                Reason.ROLLED_BACK,
                f"the submission of round {sent.round}, attempt {sent.attempt}, was signed at event "
                f"{sent.mark.sequence}, which this ledger does not hold so: this store did not send it; stop the "
                "hospital",
            )
    return mark


def figures(account: Account, policy: LoadedPolicy | None) -> dict[str, Any]:
    """What `show` prints, as plain data. ε are rounded up, what is left is rounded down; None: not bounded."""
    studies = account.studies()
    last = account.joined[studies[-1]] if studies else None
    if policy is not None:
        document = policy.document
        name, caps = document.dataset, Caps(document.dataset_epsilon, document.dataset_delta)
    else:
        name = last.dataset if last is not None else ""
        caps = Caps(last.dataset_epsilon, last.dataset_delta) if last is not None else Caps(0.0, 0.0)
    total, solo = account.dataset(caps), account.dataset(caps, solo=True)
    return {
        "dataset": {
            "name": name,
            "epsilon": _up(total.epsilon),
            "bound": total.rule,
            "epsilon_cap": caps.epsilon,
            "epsilon_left": _left(caps.epsilon, total.epsilon),
            "epsilon_solo": _up(solo.epsilon),
            "delta": caps.delta,
        },
        "studies": [_study(account, account.joined[study], policy, caps) for study in studies],
    }


def _study(account: Account, joined: Joined, policy: LoadedPolicy | None, caps: Caps) -> dict[str, Any]:
    debits = [debit for debit in account.debits if debit.study == joined.study]
    allowed = policy.allowed(bytes.fromhex(joined.study)) if policy is not None else None
    cap = joined.study_epsilon if policy is None else allowed.epsilon if allowed is not None else 0.0
    training = [debit for debit in debits if debit.split == "train"]
    remaining = joined.rounds - max((debit.round for debit in training), default=0)
    left = remaining
    if training and training[-1].mechanism != "none":
        plain = [training[-1]]
        left = account.project(plain, plain, remaining=remaining, study_cap=cap, caps=caps).rounds_left
    spent = account.study(joined.study)
    return {
        "study": joined.study,
        "name": joined.name,
        "mechanism": debits[0].mechanism if debits else "",
        "rounds": len({debit.round for debit in debits}),
        "debits": len(debits),
        "exposed_rounds": sorted(number for study, number in account.exposed if study == joined.study),
        "epsilon": _up(spent),
        "epsilon_by_split": {split: _up(value) for split, value in account.splits(joined.study).items()},
        "epsilon_cap": cap,
        "epsilon_left": _left(cap, spent),
        "rounds_left": left,
        "epsilon_solo": _up(account.study(joined.study, solo=True)),
        "delta": joined.delta,
    }


def _print(console: Console, found: dict[str, Any], events: int) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "δ", "rounds", "ε spent", "cap", "ε left", "rounds left", "ε_solo"):
        table.add_column(column, justify="left" if not column else "right")
    for one in found["studies"]:
        table.add_row(
            f"{one['name']} {one['study'][:12]}…",
            f"{one['delta']:g}",
            str(one["rounds"]),
            _shown(one["epsilon"]),
            f"{one['epsilon_cap']:g}",
            _shown(one["epsilon_left"]),
            str(one["rounds_left"]),
            _shown(one["epsilon_solo"]),
        )
    dataset = found["dataset"]
    table.add_row(
        f"data set {dataset['name']}",
        f"{dataset['delta']:g}",
        "",
        _shown(dataset["epsilon"]),
        f"{dataset['epsilon_cap']:g}",
        _shown(dataset["epsilon_left"]),
        "",
        _shown(dataset["epsilon_solo"]),
    )
    console.print(table)
    bound = {"sum": "the sum of its studies", "filter": "the Rényi filter at half of δ"}[dataset["bound"]]
    console.print(f"the data set's ε is {bound}; {events} events, one chain")
    for one in found["studies"]:
        if one["exposed_rounds"]:
            rounds = ", ".join(map(str, one["exposed_rounds"]))
            console.print(f"{one['name']}: round {rounds} counts with this hospital's own noise alone, after an alarm")


def _up(value: float) -> float | None:
    return round_up(value, 4) if math.isfinite(value) else None


def _left(cap: float, spent: float) -> float:
    return math.floor(max(0.0, cap - spent) * 1e4) / 1e4 if math.isfinite(spent) else 0.0


def _shown(value: float | None) -> str:
    return "not bounded" if value is None else f"{value:.3f}"
