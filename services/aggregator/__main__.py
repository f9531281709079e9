"""`python -m services.aggregator --config FILE`: exit code 2 and one line for what a person must mend."""

import argparse
import contextlib
import ctypes
import logging
import signal
import sys
import threading
from pathlib import Path

from services.aggregator.config import load_config
from services.aggregator.service import CONDITIONS, Aggregator
from services.common.errors import ServiceError
from services.common.ids import Role
from services.common.observe.http import Health, serve_http
from services.common.observe.last_words import refused
from services.common.observe.logs import configure
from services.common.store.durable import storing

_log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="services.aggregator", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    path = parser.parse_args(arguments).config
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    _steady_memory()
    try:
        config = load_config(path)
        configure(Role.AGGREGATOR.value, config.id, config.log_level)
        health = Health(CONDITIONS)
        with storing(f"the folder {config.state}"):
            config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        http = serve_http(config.http, health, config.state / "http.address")
        service = Aggregator(config, health)
    except ServiceError as error:
        return refused("aggregator", error)
    health.start()
    _log.info("started", extra={"listen": str(config.listen), "port": service.server.port})
    ended.wait()
    service.stop()
    http.stop()
    _log.info("stopped")
    return 0


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
