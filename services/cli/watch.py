"""`wardround watch`: a running study, live, from anywhere with an operator's certificate.

The connection is made anew for as long as it takes: the aggregator may be killed, moved or upgraded meanwhile. Only a
refusal that no waiting mends (a certificate that is not this site's, say) ends it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from secrets import SystemRandom
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from services.cli.live import Snapshot, View, snapshot_of
from services.cli.operator import Address, Charter, Operator, dial_aggregator
from services.common.errors import ServiceError
from services.common.rpc.channel import Caller, stub
from services.common.rpc.errors import CODES
from wardround.admin.v1.admin_pb2 import GetStatusRequest, Status, WatchStatusRequest
from wardround.admin.v1.admin_pb2_grpc import AdministrationServiceStub

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_STREAM_SECONDS = 24 * 3600.0
_ONCE_SECONDS = 10.0


def watch(
    address: Address,
    operator: Operator,
    charter: Charter = Path("charter.yaml"),
    once: Annotated[bool, typer.Option("--once", help="show the state once, and end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, for scripts")] = False,
) -> None:
    """Watch a study until it is finished: rounds, who takes part, released quality, and what it waits for.

    Example: wardround watch --address centre.example.org:443 --charter charter.yaml --operator olga/
    """
    with dial_aggregator(address, charter, operator) as caller:
        if once:
            status = _ask(caller)
            print(_json_line(status) if as_json else snapshot_of(status).line())
        elif as_json:
            follow(caller, lambda status: print(_json_line(status), flush=True), lambda error, seconds: None)
        else:
            _show(caller, address)


def follow(
    caller: Caller,
    seen: Callable[[Status], None],
    lost: Callable[[ServiceError, float], None],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Hand every change to `seen` until the study is finished; `lost` hears of a broken connection and the wait.

    Raises what no waiting mends.
    """
    longest = _FIRST_WAIT
    while True:
        try:
            with caller.stream(_watch_status, WatchStatusRequest(), seconds=_STREAM_SECONDS) as answers:
                for answer in answers:
                    longest = _FIRST_WAIT
                    seen(answer.status)
                    if answer.status.finished:
                        return
        except ServiceError as error:
            if CODES[error.reason] is not grpc.StatusCode.UNAVAILABLE:
                raise
            seconds = SystemRandom().uniform(longest / 2, longest)
            lost(error, seconds)
            wait(seconds)
            longest = min(2 * longest, _LONGEST_WAIT)


def as_plain(status: Status) -> dict[str, Any]:
    """The status as plain values, for JSON: every key is always there."""
    members = {role: {m.id: m.phase for m in status.members if m.role == role} for role in ("pod", "hospital")}
    return {
        "id": status.id,
        "study": {"name": status.study_name, "sha256": status.study.hex()},
        "phase": status.phase,
        "round": status.round,
        "through_round": status.through_round,
        "attempt": status.attempt,
        "model_version": status.model_version,
        "finished": status.finished,
        "waiting_for": status.waiting,
        "pods": {"live": status.pods_live, "quorum": status.pods_quorum, "members": members["pod"]},
        "hospitals": {
            "watching": status.hospitals_enrolled,
            "submitted": status.hospitals_submitted,
            "minimum": status.hospitals_minimum,
            "members": members["hospital"],
        },
        "released": dict(status.figures),
    }


def _ask(caller: Caller) -> Status:
    return caller.unary(
        lambda channel: stub(AdministrationServiceStub, channel).GetStatus, GetStatusRequest(), seconds=_ONCE_SECONDS
    ).status


def _watch_status(channel: grpc.Channel) -> Any:
    return stub(AdministrationServiceStub, channel).WatchStatus


def _show(caller: Caller, address: str) -> None:
    newest: list[Snapshot] = []
    with View(Console(), f"Wardround · {address}") as view:

        def seen(status: Status) -> None:
            newest[:] = [snapshot_of(status)]
            view.show(newest[0])

        def lost(error: ServiceError, seconds: float) -> None:
            sentence = f"no connection: {error.detail}; next try in {seconds:.1f} s"
            if newest:
                view.show(replace(newest[0], notes=(sentence,)))
            else:
                view.say(sentence)

        follow(caller, seen, lost)
        view.say(f"{newest[0].line()} · the study is finished")


def _json_line(status: Status) -> str:
    return json.dumps(as_plain(status), ensure_ascii=False, sort_keys=True)
