"""What a hospital and a pod serve on their Unix socket: the status, once or at every change, and the evidence."""

import threading
from collections.abc import Callable, Iterable, Iterator

import grpc

from services.common.rpc.feed import Feed
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

_BLOCK = 1 << 20
Files = Iterable[tuple[str, Iterable[bytes]]]
"""(path, its bytes in parts) of each file."""


class Administration(admin_pb2_grpc.AdministrationServiceServicer):
    """`status` is asked at every call; `evidence` gives the files of one study, or of all for an empty digest."""

    def __init__(self, status: Callable[[], admin_pb2.Status], evidence: Callable[[bytes], Files]) -> None:
        self._status = status
        self._evidence = evidence
        self._lock = threading.Lock()
        self._watchers: list[Feed[None]] = []

    def show(self) -> None:
        """The status has changed: every watcher asks for it in its own thread, so the last one told is the newest."""
        with self._lock:
            self._watchers = [watcher for watcher in self._watchers if not watcher.ended]
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.replace(None)

    def GetStatus(  # noqa: N802  # generated name
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """What this process is doing now."""
        return admin_pb2.GetStatusResponse(status=self._status())

    def WatchStatus(  # noqa: N802  # generated name
        self, request: admin_pb2.WatchStatusRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.WatchStatusResponse]:
        """The same now and at every change."""
        changes: Feed[None] = Feed(context)
        changes.push(None)
        with self._lock:
            self._watchers.append(changes)
        for _ in changes:
            yield admin_pb2.WatchStatusResponse(status=self._status())

    def ExportEvidence(  # noqa: N802  # generated name
        self, request: admin_pb2.ExportEvidenceRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.ExportEvidenceResponse]:
        """Each file's path, then its bytes."""
        for path, parts in self._evidence(request.study):
            yield admin_pb2.ExportEvidenceResponse(path=path)
            for part in parts:
                for start in range(0, len(part), _BLOCK):
                    yield admin_pb2.ExportEvidenceResponse(chunk=part[start : start + _BLOCK])
