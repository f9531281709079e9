"""Studies that an alarm stopped here, for the hospital's own people on the Unix socket, and their word to go on."""

from collections.abc import Callable

import grpc

from services.common.clock import Clock
from services.hospital_node.store import Store
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc


class Alarms(admin_pb2_grpc.AlarmServiceServicer):
    """`acknowledged` is called when a study may go on."""

    def __init__(self, store: Store, clock: Clock, acknowledged: Callable[[], None]) -> None:
        self._store = store
        self._clock = clock
        self._acknowledged = acknowledged

    def ListAlarms(  # noqa: N802  # generated name
        self, request: admin_pb2.ListAlarmsRequest, context: grpc.ServicerContext
    ) -> admin_pb2.ListAlarmsResponse:
        """The alarm of every study that is stopped here."""
        return admin_pb2.ListAlarmsResponse(
            alarms=(
                admin_pb2.Alarm(study=alarm.study, round=alarm.round, result=alarm.result, detail=alarm.detail)
                for alarm in self._store.alarms()
            )
        )

    def AcknowledgeAlarm(  # noqa: N802  # generated name
        self, request: admin_pb2.AcknowledgeAlarmRequest, context: grpc.ServicerContext
    ) -> admin_pb2.AcknowledgeAlarmResponse:
        """Let a study go on past the one result that stopped it. Raises NOT_FOUND, CONFLICT for another one."""
        self._store.acknowledge(request.study, request.round, request.result, self._clock.now_ms())
        self._acknowledged()
        return admin_pb2.AcknowledgeAlarmResponse()
