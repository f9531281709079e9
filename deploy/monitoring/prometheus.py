"""A Prometheus of our own on loopback, and its HTTP API: to prove dashboards and rules on figures that are real."""

import json
import math
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from services.common.errors import Reason, ServiceError

SCRAPE_SECONDS = 1


@dataclass(frozen=True)
class Series:
    """One series of an answer: Unix seconds and values, ascending; an instant query has one point."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        """The newest value that is a number, else NaN."""
        return next((value for _, value in reversed(self.points) if not math.isnan(value)), math.nan)


def free_address() -> str:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Prometheus:
    """The running process; a context manager. `targets`: name of a process to host:port of its metrics.

    Every target gets the labels job = wardround/NAME and instance = NAME, as a PodMonitor would make them.
    """

    def __init__(self, folder: Path, targets: Mapping[str, str], rules: Sequence[Path] = ()) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            raise ServiceError(
                Reason.NOT_FOUND, "prometheus is not installed: `apt-get install prometheus`, or put it on PATH"
            )
        folder.mkdir(parents=True, exist_ok=True)
        static = [
            {"targets": [address], "labels": {"job": f"wardround/{name}", "instance": name}}
            for name, address in targets.items()
        ]
        config = {
            "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
            "rule_files": [str(path.resolve()) for path in rules],
            "scrape_configs": [{"job_name": "wardround", "static_configs": static}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.address = free_address()
        arguments = [f"--web.listen-address={self.address}", f"--config.file={folder / 'prometheus.yml'}"]
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [binary, *arguments, f"--storage.tsdb.path={folder / 'tsdb'}"], stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5):
                    return self
            except OSError:
                threading.Event().wait(0.2)
        self.__exit__()
        raise ServiceError(Reason.UNREACHABLE, f"Prometheus did not start within a minute at {self.address}")

    def __exit__(self, *failure: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def query(self, expr: str, at: float) -> list[Series]:
        """An instant query at `at` (Unix seconds). Raises INVALID_DOCUMENT with Prometheus' own words."""
        found = self._get("query", query=expr, time=str(at))
        if found["resultType"] == "scalar":
            return [Series({}, [_point(found["result"])])]
        return [Series(one["metric"], [_point(one["value"])]) for one in found["result"]]

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """A range query."""
        found = self._get("query_range", query=expr, start=str(start), end=str(end), step=str(step))
        return [Series(one["metric"], [_point(point) for point in one["values"]]) for one in found["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Every alerting rule with its health and its alerts."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            said = json.load(error).get("error", error.reason)
            raise ServiceError(Reason.INVALID_DOCUMENT, f"{parameters.get('query', what)}: {said}") from None


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
