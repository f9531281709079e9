"""Administration on the pod's Unix socket: status for people, the audit log for `wardround verify`."""

from collections.abc import Iterator

import grpc

from services.common.rpc.feed import Feed
from services.keyshare.pod import Pod
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc


class Administration(admin_pb2_grpc.AdministrationServiceServicer):
    """GetStatus, WatchStatus, ExportEvidence."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._watchers: list[Feed[admin_pb2.WatchStatusResponse]] = []

    def show(self) -> None:
        """Tell every watcher the status of now."""
        self._watchers = [watcher for watcher in self._watchers if not watcher.ended]
        for watcher in self._watchers:
            watcher.replace(admin_pb2.WatchStatusResponse(status=self._status()))

    def GetStatus(  # noqa: N802  # generated name
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """What the pod holds now."""
        return admin_pb2.GetStatusResponse(status=self._status())

    def WatchStatus(  # noqa: N802  # generated name
        self, request: admin_pb2.WatchStatusRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.WatchStatusResponse]:
        """The same at every change."""
        feed: Feed[admin_pb2.WatchStatusResponse] = Feed(context)
        self._watchers.append(feed)
        feed.replace(admin_pb2.WatchStatusResponse(status=self._status()))
        yield from feed

    def ExportEvidence(  # noqa: N802  # generated name
        self, request: admin_pb2.ExportEvidenceRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.ExportEvidenceResponse]:
        """audit.jsonl: one chain over all studies, always whole."""
        yield admin_pb2.ExportEvidenceResponse(path="audit.jsonl")
        for line in self._pod.audit():
            yield admin_pb2.ExportEvidenceResponse(chunk=line)

    def _status(self) -> admin_pb2.Status:
        ref, phase, detail = self._pod.standing()
        study, number, attempt = ref or (b"", 0, 0)
        live = int(self._pod.live)
        return admin_pb2.Status(
            role="pod", id=self._pod.id, phase=phase, study=study, round=number, attempt=attempt, pods_live=live,
            detail=detail,
        )  # fmt: skip
