"""Plain FedAvg over the same gRPC stack, to compare with: `python -m bench.plain_round --config FILE.json`.

One server that adds fp32 updates into one float array as they come and publishes the next model; clients that
fetch the model, check its SHA-256 and send their update in chunks. Same protos, certificates, interceptor, limits
and chunk size as the secure round; no masks, no signatures, no log. Nothing is on the disk, or, `durable`, what a
server needs that must not lose a round when it is killed: each update before it is acknowledged, each model before it
is announced. Everything a client sends is readable by the server.
"""

import argparse
import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.round_hospital import update
from services.common.documents.charter import load_charter
from services.common.ids import Role
from services.common.rpc.certificates import server_name
from services.common.rpc.channel import Caller, dial, stub
from services.common.rpc.feed import Feed
from services.common.rpc.interceptor import peer
from services.common.rpc.leaf import LeafFiles
from services.common.rpc.members import Members
from services.common.rpc.server import serve
from services.common.secagg.ring import CHUNK_BYTES
from services.common.store.blobs import BlobStore
from wardround.model.v1 import model_pb2, model_pb2_grpc
from wardround.round.v1 import round_pb2, round_pb2_grpc
from wardround.submission.v1 import submission_pb2, submission_pb2_grpc

_BLOCK = 1 << 20
_SECONDS = 3600.0


class PlainServer(
    round_pb2_grpc.RoundCoordinationServiceServicer,
    model_pb2_grpc.ModelDistributionServiceServicer,
    submission_pb2_grpc.UpdateSubmissionServiceServicer,
):
    """The model, the running sum and who is there. Round 1 opens when `clients` watch; ends after `rounds`."""

    def __init__(self, clients: int, parameters: int, rounds: int, times: Path, kept: BlobStore | None) -> None:
        self._clients, self._rounds, self._times, self._kept = clients, rounds, times, kept
        self._lock = threading.Lock()
        self._model = np.zeros(parameters, np.float32)
        self._sum = np.zeros(parameters, np.float32)
        self._digest = hashlib.sha256(self._model.data).digest()
        self._round = 0
        self._opened = 0.0
        self._seconds: list[float] = []
        self._came: set[str] = set()
        self._updates: list[bytes] = []
        self._feeds: list[Feed[round_pb2.WatchRoundsResponse]] = []

    def WatchRounds(  # noqa: N802  # gRPC's names
        self, request: round_pb2.WatchRoundsRequest, context: grpc.ServicerContext
    ) -> Iterator[round_pb2.WatchRoundsResponse]:
        """Every opening of a round, then FINISHED."""
        feed = Feed[round_pb2.WatchRoundsResponse](context)
        with self._lock:
            self._feeds.append(feed)
            if len(self._feeds) == self._clients:
                self._open()
        yield from feed

    def FetchModel(  # noqa: N802
        self, request: model_pb2.FetchModelRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.FetchModelResponse]:
        """The model, 1 MiB at a time. It is replaced only after every client has sent, so after every fetch."""
        data = memoryview(self._model).cast("B")
        for start in range(0, len(data), _BLOCK):
            yield model_pb2.FetchModelResponse(chunk=bytes(data[start : start + _BLOCK]), total=len(data))

    def SubmitUpdate(  # noqa: N802
        self, request_iterator: Iterator[submission_pb2.SubmitUpdateRequest], context: grpc.ServicerContext
    ) -> submission_pb2.SubmitUpdateResponse:
        """Add the chunks; the last client's end makes the next model."""
        next(request_iterator)  # the opening message
        if self._kept is not None:
            update = self._kept.write(self._added(request_iterator))
        else:
            for _ in self._added(request_iterator):
                pass
        with self._lock:
            self._came.add(peer(context).id)
            if self._kept is not None:
                self._updates.append(update)
            if len(self._came) == self._clients:
                self._close()
        return submission_pb2.SubmitUpdateResponse()

    def _added(self, parts: Iterator[submission_pb2.SubmitUpdateRequest]) -> Iterator[bytes]:
        per_chunk = CHUNK_BYTES // 4
        for part in parts:
            numbers = np.frombuffer(part.chunk.data, "<f4")
            place = self._sum[part.chunk.index * per_chunk :][: len(numbers)]
            with self._lock:
                np.add(place, numbers, out=place)
            yield part.chunk.data

    def _open(self) -> None:
        self._round += 1
        self._opened = time.perf_counter()
        self._say(round_pb2.ROUND_PHASE_COLLECTING)

    def _close(self) -> None:
        """Server step: the next model is ready when its digest is known. The round ends there."""
        self._model = self._model + self._sum / np.float32(self._clients)
        if self._kept is None:
            self._digest = hashlib.sha256(self._model.data).digest()
        else:
            before, self._digest = self._digest, self._kept.write([self._model.tobytes()])
            self._kept.delete(before, *self._updates)
            self._updates.clear()
        self._seconds.append(time.perf_counter() - self._opened)
        self._sum[:] = 0
        self._came.clear()
        partial = self._times.with_suffix(".new")
        partial.write_text(json.dumps(self._seconds))
        partial.rename(self._times)
        if self._round == self._rounds:
            self._say(round_pb2.ROUND_PHASE_FINISHED)
        else:
            self._open()

    def _say(self, phase: round_pb2.RoundPhase.ValueType) -> None:
        for feed in self._feeds:
            feed.push(round_pb2.WatchRoundsResponse(phase=phase, round=self._round, model=self._digest))


def run_server(config: dict[str, Any], ended: threading.Event) -> None:
    """Listen, write the address, serve until `ended`."""
    folder, state = Path(config["folder"]), Path(config["state"])
    charter = load_charter(Path(config["charter"]).read_bytes())
    members = Members.of([charter.document])
    state.mkdir(parents=True, exist_ok=True)
    kept = BlobStore(state / "kept") if config["durable"] else None
    plain = PlainServer(config["clients"], config["parameters"], config["rounds"], state / "times.json", kept)
    running = serve(
        [
            (round_pb2_grpc.add_RoundCoordinationServiceServicer_to_server, plain),
            (model_pb2_grpc.add_ModelDistributionServiceServicer_to_server, plain),
            (submission_pb2_grpc.add_UpdateSubmissionServiceServicer_to_server, plain),
        ],
        lambda: members,
        (Role.AGGREGATOR, config["id"]),
        LeafFiles(folder / "tls.pem", folder / "tls-key.pem"),
        address="127.0.0.1:0",
        max_workers=3 * config["clients"] + 4,
    )
    (state / "listen.address").write_text(f"127.0.0.1:{running.port}")
    ended.wait()
    running.stop(0.5)


def run_client(config: dict[str, Any], ended: threading.Event) -> None:
    """Take part in every round that is announced; then wait for `ended`."""
    folder = Path(config["folder"])
    document = load_charter(Path(config["charter"]).read_bytes()).document
    name, root = server_name(document.aggregator.id, document.consortium), document.aggregator.tls_root.encode()
    caller = Caller(
        lambda leaf: dial(config["address"], name, leaf, root), LeafFiles(folder / "tls.pem", folder / "tls-key.pem")
    )
    numbers = update(config["parameters"]).astype("<f4")
    watching = caller.stream(
        lambda c: stub(round_pb2_grpc.RoundCoordinationServiceStub, c).WatchRounds,
        round_pb2.WatchRoundsRequest(),
        seconds=_SECONDS,
    )
    with watching as answers:
        for answer in answers:
            if answer.phase == round_pb2.ROUND_PHASE_FINISHED:
                break
            _fetch(caller, answer.model)
            _send(caller, numbers)
        ended.wait()
    caller.close()


def _fetch(caller: Caller, digest: bytes) -> bytearray:
    """The model's bytes, checked."""
    model = bytearray()
    with caller.stream(
        lambda c: stub(model_pb2_grpc.ModelDistributionServiceStub, c).FetchModel,
        model_pb2.FetchModelRequest(digest=digest),
        seconds=_SECONDS,
    ) as answers:
        for answer in answers:
            model += answer.chunk
    if hashlib.sha256(model).digest() != digest:
        raise RuntimeError("the model is not the one that was announced")
    return model


def _send(caller: Caller, numbers: Any) -> None:
    data = memoryview(numbers).cast("B")

    def parts() -> Iterator[submission_pb2.SubmitUpdateRequest]:
        yield submission_pb2.SubmitUpdateRequest(open=submission_pb2.SubmissionOpen())
        for index, start in enumerate(range(0, len(data), CHUNK_BYTES)):
            chunk = submission_pb2.SubmissionChunk(index=index, data=bytes(data[start : start + CHUNK_BYTES]))
            yield submission_pb2.SubmitUpdateRequest(chunk=chunk)

    caller.upload(
        lambda c: stub(submission_pb2_grpc.UpdateSubmissionServiceStub, c).SubmitUpdate, parts(), seconds=_SECONDS
    )


def main() -> int:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path)
    config = json.loads(parser.parse_args().config.read_text())
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    (run_server if config["role"] == "server" else run_client)(config, ended)
    return 0


if __name__ == "__main__":
    sys.exit(main())
