"""A caller that reaches a fake aggregator in this very process: no thread, no socket, so that a process may fork."""

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from services.common.rpc.signed import from_wire
from services.common.secagg.messages import Signed
from services.common.secagg.signing import digest
from tests.support.fake_aggregator_for_hospitals import Arrived, FakeAggregator


class _Channel:
    """As much of a channel as a generated stub asks for."""

    def __init__(self, servicer: object) -> None:
        self._servicer = servicer

    def unary_unary(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        return lambda request, timeout: getattr(self._servicer, path.rpartition("/")[2])(request, None)

    unary_stream = stream_unary = unary_unary


class _Answers:
    def __init__(self, answers: Iterator[Any]) -> None:
        self._answers = answers

    def __enter__(self) -> Iterator[Any]:
        return self._answers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class DirectCaller:
    """Stands where `Caller` does; what is uploaded is also a line in `log`, before the aggregator sees it."""

    def __init__(
        self, aggregator: FakeAggregator, log: Path, pass_by: Callable[[str], None] = lambda what: None
    ) -> None:
        self._pass_by = pass_by  # called before anything leaves or comes
        self._channel = _Channel(aggregator)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def unary(self, pick: Any, request: Any, *, seconds: float) -> Any:
        return pick(self._channel)(request, timeout=seconds)

    def stream(self, pick: Any, request: Any, *, seconds: float) -> _Answers:
        return _Answers(pick(self._channel)(request, timeout=seconds))

    def upload(self, pick: Any, requests: Iterator[Any], *, seconds: float) -> Any:
        def seen() -> Iterator[Any]:
            for request in requests:
                if request.HasField("open"):
                    header = from_wire(request.open.header)
                    self._note("open", header.blob, header.signature, request.open.chunk_digests, *request.open.boxes)
                else:
                    self._note("chunk", request.chunk.data)
                yield request

        answer = pick(self._channel)(seen(), timeout=seconds)
        self._note("receipt", answer.receipt.blob, answer.receipt.signature)
        return answer

    def close(self) -> None:
        os.close(self._log)

    def _note(self, kind: str, *parts: bytes) -> None:
        self._pass_by(f"sending {kind}")
        line = json.dumps([kind, *(base64.b64encode(part).decode() for part in parts)]) + "\n"
        os.write(self._log, line.encode())


def read_log(log: Path) -> list[tuple[str, list[bytes]]]:
    """What left, in order: ("open", [header, signature, chunk digests, boxes …]), ("chunk", [data]), ("receipt", …)."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(kind, [base64.b64decode(part) for part in parts]) for kind, *parts in lines]


def remember(aggregator: FakeAggregator, log: Path) -> None:
    """Give the aggregator what arrived in an earlier life of the hospital."""
    current: Arrived | None = None
    for kind, parts in read_log(log):
        if kind == "open":
            header = Signed(parts[0], parts[1])
            current = aggregator.arrived.setdefault(
                digest("header", header.blob), Arrived(header, tuple(parts[3:]), parts[2])
            )
        elif current is not None and kind == "chunk":
            current.chunks.append(parts[0])
        elif current is not None:
            current.receipt = Signed(parts[0], parts[1])
