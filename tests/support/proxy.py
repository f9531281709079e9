"""Ways to a server: an HTTP forward proxy that knows CONNECT, and a port that loses its first connection."""

import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class _Port:
    """A port on loopback whose connections are served one thread each."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()


class ConnectProxy(_Port):
    """Remembers in `targets` where it was asked to go."""

    def __init__(self) -> None:
        super().__init__(self._connect)
        self.targets: list[str] = []
        self.url = f"http://{self.address}"

    def _connect(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        verb, target, _ = head.decode().split("\r\n")[0].split(" ")
        assert verb == "CONNECT"
        self.targets.append(target)
        host, _, port = target.rpartition(":")
        upstream = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        _join(client, upstream)


class LosesTheFirst(_Port):
    """Leads to another port, as a forwarded one whose pod was replaced: one connection is lost."""

    def __init__(self, port: int) -> None:
        super().__init__(self._forward)
        self.lost = 0
        self._port = port

    def _forward(self, client: socket.socket) -> None:
        if not self.lost:
            self.lost += 1
            client.close()
            return
        _join(client, socket.create_connection(("127.0.0.1", self._port)))


def _join(client: socket.socket, upstream: socket.socket) -> None:
    threading.Thread(target=_pump, args=(upstream, client), daemon=True).start()
    _pump(client, upstream)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return
