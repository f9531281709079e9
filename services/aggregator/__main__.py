"""`python -m services.aggregator --config FILE`: exit code 2 and one line for what a person must mend."""

import contextlib
import ctypes
import logging
import sys
import threading
from pathlib import Path

from services.aggregator.config import load_config
from services.aggregator.service import CONDITIONS, Aggregator
from services.common.ids import Role
from services.common.observe.http import Health, serve_http
from services.common.observe.logs import configure
from services.common.observe.service import serve_until_stopped
from services.common.store.durable import storing

_log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; the exit code."""
    return serve_until_stopped("aggregator", run, arguments)


def run(path: Path, stop: threading.Event) -> None:
    """Serve until `stop` is set. Raises ServiceError where the aggregator must not start."""
    _steady_memory()
    config = load_config(path)
    configure(Role.AGGREGATOR.value, config.id, config.log_level)
    health = Health(CONDITIONS)
    with storing(f"the folder {config.state}"):
        config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    http = serve_http(config.http, health, config.state / "http.address")
    service = Aggregator(config, health)
    health.start()
    _log.info("started", extra={"listen": str(config.listen), "port": service.server.port})
    stop.wait()
    service.stop()
    http.stop()
    _log.info("stopped")


def _steady_memory() -> None:
    """Two heaps for all threads, freed chunks of vectors used again there: glibc else keeps some for every thread, and
    a mapping for each chunk costs a third of this process' time in page faults."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        c = ctypes.CDLL(None)
        c.mallopt(_M_MMAP_THRESHOLD, 8 << 20)
        c.mallopt(_M_TRIM_THRESHOLD, 16 << 20)
        c.mallopt(_M_ARENA_MAX, 2)


if __name__ == "__main__":
    sys.exit(main())
