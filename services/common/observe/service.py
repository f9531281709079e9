"""The command line of a service: one configuration, signals, one line where it must not start."""

import argparse
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from services.common.errors import ServiceError
from services.common.observe.last_words import refused


def serve_until_stopped(
    name: str, run: Callable[[Path, threading.Event], None], arguments: list[str] | None = None
) -> int:
    """`run` the service of `--config FILE` until SIGTERM or SIGINT sets its event.

    The exit code: 0, or 2 with one line for what a person must mend (`run` raised ServiceError).
    """
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--config", type=Path, required=True)
    path = parser.parse_args(arguments).config
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(path, stop)
    except ServiceError as error:
        return refused(name, error)
    return 0
