"""The plain HTTP port of every role (9464): /startupz /readyz /livez /metrics."""

import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from services.common.errors import Reason, ServiceError


class Health:
    """What the probes say. `conditions` are the closed list that makes this role ready; each starts unmet.

    No condition may wait for another party (deploy: readiness is about this process alone).
    """

    def __init__(self, conditions: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._started = False
        self._conditions = dict.fromkeys(conditions, (False, "not yet"))
        self._looks: dict[str, Callable[[], tuple[bool, str]]] = {}
        self._notes: dict[str, str] = {}

    def start(self) -> None:
        """/startupz says yes from now on."""
        with self._lock:
            self._started = True

    def set(self, condition: str, met: bool, text: str = "") -> None:
        """Whether one of the conditions holds, and why or why not in a person's words."""
        with self._lock:
            if condition not in self._conditions:
                raise KeyError(condition)
            self._conditions[condition] = (met, text)

    def look(self, condition: str, at: Callable[[], tuple[bool, str]]) -> None:
        """Ask `at` for (met, text) at every probe: for what changes by itself, as a certificate's validity does."""
        with self._lock:
            if condition not in self._conditions:
                raise KeyError(condition)
            self._looks[condition] = at

    def note(self, name: str, text: str | None) -> None:
        """A sentence in /readyz that changes nothing else (a refused plan, say); None takes it away."""
        with self._lock:
            self._notes.pop(name, None)
            if text is not None:
                self._notes[name] = text

    def startup(self) -> tuple[bool, str]:
        """Whether the process has started, with text."""
        with self._lock:
            return self._started, "started\n" if self._started else "starting\n"

    def ready(self) -> tuple[bool, str]:
        """Whether all conditions hold, with one line for each and for each note."""
        with self._lock:
            conditions, looks = dict(self._conditions), dict(self._looks)
            notes, started = list(self._notes.items()), self._started
        conditions.update({name: look() for name, look in looks.items()})
        lines = [f"{'ok' if met else 'NOT'} {name}: {text}" for name, (met, text) in conditions.items()]
        lines += [f"note {name}: {text}" for name, text in notes]
        met = started and all(met for met, _ in conditions.values())
        return met, "\n".join([*lines, "ready" if met else "not ready", ""])


class HttpServer:
    """The running endpoint; `address` is what it is bound to, host:port."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        host, port = server.server_address[:2]
        self.address = f"{host!s}:{port}"
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True, name="http")
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_http(
    address: str, health: Health, address_file: Path | None = None, registry: CollectorRegistry = REGISTRY
) -> HttpServer:
    """Answer probes and scrapes at `address` (host:port, port 0 = any) from a daemon thread.

    The bound address is written to `address_file` when given. Raises UNREACHABLE when the port cannot be had.
    """
    host, _, port = address.rpartition(":")
    try:
        server = _Server((host.strip("[]"), int(port)), _handler(health, registry))
    except OSError as error:
        raise ServiceError(
            Reason.UNREACHABLE, f"cannot listen on {address} for probes ({error.strerror}): free it or change `http`"
        ) from error
    running = HttpServer(server)
    if address_file is not None:
        try:
            address_file.write_text(running.address)
        except OSError as error:
            running.stop()
            raise ServiceError(
                Reason.STORAGE,
                f"{address_file} was not written ({error.strerror}): free or enlarge the volume, or mend its owner",
            ) from error
    return running


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def _handler(health: Health, registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a probe that does not finish its request frees its thread
        server_version = "wardround"
        sys_version = ""

        def do_GET(self) -> None:
            kind = "text/plain; charset=utf-8"
            match self.path.partition("?")[0]:
                case "/startupz":
                    met, text = health.startup()
                case "/readyz":
                    met, text = health.ready()
                case "/livez":
                    met, text = True, "alive\n"
                case "/metrics":
                    met, text, kind = True, generate_latest(registry).decode(), CONTENT_TYPE_LATEST
                case _:
                    self.send_error(404)
                    return
            body = text.encode()
            self.send_response(200 if met else 503)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes every few seconds are no news."""

    return Handler
