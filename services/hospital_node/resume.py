"""Let a study go on that an alarm stopped at this hospital: `wardround hospital resume`, also without that command.

`kubectl exec POD -- python -m services.hospital_node.resume --study SHA256` says what stopped it; the same with
`--confirm "round R, result DIGEST"` acknowledges exactly that. The next result that cannot be followed stops it again.
"""

import argparse
import sys
from pathlib import Path

import grpc

from services.common.errors import Reason, ServiceError
from services.common.rpc.errors import from_rpc_error
from services.common.rpc.unix import dial_admin
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

SOCKET = Path("/run/wardround/admin.sock")  # as the chart says it
_SECONDS = 30.0


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m services.hospital_node.resume", description=__doc__)
    parser.add_argument("--study", required=True, help="SHA-256 of the study, 64 hex digits")
    parser.add_argument("--socket", type=Path, default=SOCKET)
    parser.add_argument("--confirm", default="", help="what is acknowledged, as this command says it without")
    found = parser.parse_args(arguments)
    try:
        print(resume(found.socket, bytes.fromhex(found.study), found.confirm))
    except (ValueError, ServiceError) as error:
        print(f"resume: {error.detail if isinstance(error, ServiceError) else error}", file=sys.stderr)
        return 2
    return 0


def resume(socket: Path, study: bytes, confirm: str) -> str:
    """What stopped the study and what `confirm` must say; with that, it is acknowledged and may go on.

    Raises NOT_FOUND for a study that is not stopped, CONFLICT when `confirm` names something else, UNREACHABLE.
    """
    try:
        with dial_admin(socket) as channel:
            stub = admin_pb2_grpc.AlarmServiceStub(channel)
            alarms = stub.ListAlarms(admin_pb2.ListAlarmsRequest(), timeout=_SECONDS).alarms
            alarm = next((alarm for alarm in alarms if alarm.study == study), None)
            if alarm is None:
                stopped = ", ".join(f"{alarm.study.hex()[:12]}…" for alarm in alarms) or "no study"
                raise ServiceError(
                    Reason.NOT_FOUND, f"study {study.hex()[:12]}… is not stopped at this hospital ({stopped} is)"
                )
            words = f"round {alarm.round}, result {alarm.result.hex()[:12]}"
            if not confirm:
                return (
                    f"study {study.hex()[:12]}… is stopped here by its round {alarm.round}: {alarm.detail}\n"
                    "Go on only when you know why, and with the other members: what is acknowledged is that this "
                    "very result is followed although it does not hold.\nIts round stays in the ledger at this "
                    "hospital's own noise alone, and the next result of that kind stops the study again.\n"
                    f'To acknowledge it: --confirm "{words}"'
                )
            if " ".join(confirm.split()) != words:
                raise ServiceError(
                    Reason.CONFLICT, f'--confirm "{confirm}" is not what stopped this study, "{words}": nothing changes'
                )
            request = admin_pb2.AcknowledgeAlarmRequest(study=study, round=alarm.round, result=alarm.result)
            stub.AcknowledgeAlarm(request, timeout=_SECONDS)
            return f"study {study.hex()[:12]}… goes on: {words} is acknowledged"
    except grpc.RpcError as error:
        refusal = from_rpc_error(error)
        raise ServiceError(refusal.reason, f"{socket}: {refusal.detail}") from None


if __name__ == "__main__":
    sys.exit(main())
