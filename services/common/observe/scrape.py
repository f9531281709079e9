"""Figures that are read when somebody scrapes, and not at every turn of a busy loop.

A gauge says what is true when it is asked; to set hundreds of them at every message would cost rounds their time.
"""

import logging
import threading
from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.registry import Collector

_log = logging.getLogger(__name__)


class Look(Collector):
    """Calls what watches before the metrics behind it are written out.

    A registry collects in the order of registration: a module makes its `Look` before its gauges.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._lock = threading.Lock()
        self._at: Callable[[], None] | None = None
        registry.register(self)

    def watch(self, at: Callable[[], None]) -> None:
        """Call `at` at every scrape from now on, in the scraper's thread."""
        with self._lock:
            self._at = at

    def forget(self, at: Callable[[], None]) -> None:
        """No more, unless another watches by now."""
        with self._lock:
            if self._at == at:
                self._at = None

    def describe(self) -> Iterable[Metric]:
        """It has no metric of its own."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """A fault of the look leaves the old figures, and a line in the log: the others must still be had."""
        with self._lock:
            try:
                if self._at is not None:
                    self._at()
            except Exception:
                _log.exception("some figures could not be read for a scrape")
        return ()
