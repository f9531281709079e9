"""Logs, probes and the metrics that every process has."""

import json
import logging
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from services.common.clock import SystemClock
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.observe.http import Health, HttpServer, serve_http
from services.common.observe.logs import JsonLines, configure
from services.common.observe.process import announce, certificate_validity
from services.common.observe.scrape import Look
from tests.support.tls import make_consortium


def get(server: HttpServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.address}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def health() -> Health:
    return Health(["log replayed", "certificate"])


@pytest.fixture
def server(health: Health, tmp_path: Path) -> Iterator[HttpServer]:
    running = serve_http("127.0.0.1:0", health, tmp_path / "http.address", CollectorRegistry())
    yield running
    running.stop()


def test_probes_follow_the_conditions(server: HttpServer, health: Health, tmp_path: Path) -> None:
    assert (tmp_path / "http.address").read_text() == server.address
    assert get(server, "/startupz") == (503, "starting\n")
    assert get(server, "/livez") == (200, "alive\n")
    health.start()
    health.set("log replayed", True, "12 events")
    assert get(server, "/startupz")[0] == 200
    code, text = get(server, "/readyz")
    assert code == 503
    assert "NOT certificate: not yet" in text
    health.set("certificate", True, "until May")
    health.note("plan", "refused: study has no purpose")
    code, text = get(server, "/readyz")
    assert (code, text.splitlines()) == (
        200,
        [
            "ok log replayed: 12 events",
            "ok certificate: until May",
            "note plan: refused: study has no purpose",
            "ready",
        ],
    )
    health.note("plan", None)
    assert "plan" not in get(server, "/readyz")[1]
    assert get(server, "/secrets")[0] == 404


def test_a_condition_that_nobody_declared_is_a_fault_of_the_code(health: Health) -> None:
    with pytest.raises(KeyError):
        health.set("quorum", True)


def test_metrics_are_served(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    Counter("wardround_test_total", "x", registry=registry).inc(3)
    server = serve_http("127.0.0.1:0", Health([]), registry=registry)
    assert "wardround_test_total 3.0" in get(server, "/metrics")[1]
    server.stop()


def test_a_probe_port_in_use_is_one_clear_line(server: HttpServer) -> None:
    with pytest.raises(ServiceError) as caught:
        serve_http(server.address, Health([]))
    assert caught.value.reason is Reason.UNREACHABLE
    assert server.address in caught.value.detail


def test_the_expiry_follows_the_file(tmp_path: Path) -> None:
    consortium = make_consortium(tmp_path, pods=(), hospitals=("north",))
    who = (Role.HOSPITAL, "north")
    announce("hospital", "north", consortium.leaf(*who).certificate)
    name = "wardround_certificate_expiry_timestamp_seconds"
    now = SystemClock().now_ms() / 1000
    assert REGISTRY.get_sample_value(name) == pytest.approx(now + 86_400, abs=60)
    consortium.issue(*who, days=7)
    assert REGISTRY.get_sample_value(name) == pytest.approx(now + 7 * 86_400, abs=60)
    assert all(math.isnan(edge) for edge in certificate_validity(tmp_path / "missing"))
    consortium.leaf(*who).certificate.write_bytes(b"?")
    assert math.isnan(REGISTRY.get_sample_value(name) or 0)


def test_a_log_line_is_json_with_who_what_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure("pod", "pod-a", "info")
        logger = logging.getLogger("x")
        logger.debug("unheard")
        try:
            raise ValueError("line one\nline two")
        except ValueError:
            logger.exception("failed ε %d", 3, extra={"method": "/a/B", "role": "forged"})
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    (text,) = capsys.readouterr().err.splitlines()
    line = json.loads(text)
    assert (line["message"], line["level"], line["method"]) == ("failed ε 3", "error", "/a/B")
    assert (line["role"], line["id"]) == ("pod", "pod-a")
    assert "ValueError: line one\nline two" in line["trace"]


def test_what_json_cannot_carry_is_written_as_text() -> None:
    record = logging.makeLogRecord({"msg": "m", "path": Path("/x"), "created": 0.0})
    line = json.loads(JsonLines("pod", "pod-a").format(record))
    assert (line["path"], line["time"]) == ("/x", "1970-01-01T00:00:00.000+00:00")


def test_what_is_read_at_a_scrape_is_what_is_true_then() -> None:
    registry = CollectorRegistry()
    look = Look(registry)
    gauge = Gauge("wardround_test_now", "x", registry=registry)
    now = iter([1, 2])

    def read() -> None:
        gauge.set(next(now))

    look.watch(read)
    assert [registry.get_sample_value("wardround_test_now") for _ in range(3)] == [1, 2, 2]  # the third look fails
    look.forget(gauge.inc)
    look.forget(read)
    gauge.set(7)
    assert registry.get_sample_value("wardround_test_now") == 7
