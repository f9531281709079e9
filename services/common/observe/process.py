"""Metrics that every process has: what it is, and until when its certificate is valid."""

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cryptography import x509
from prometheus_client import Gauge, disable_created_metrics

from services.common.observe.scrape import Look

LOOK = Look()  # before every gauge that is set by it
"""What this process reads at every scrape."""

_BUILD = Gauge("wardround_build_info", "Always 1; the labels say what runs", ["role", "id", "version", "python"])
_EXPIRY = Gauge(
    "wardround_certificate_expiry_timestamp_seconds", "End of the TLS leaf's validity, Unix seconds (NaN: unreadable)"
)
_CHARTER = Gauge(
    "wardround_charter_info", "Always 1; the labels say which charters are pinned here", ["charter", "digest"]
)
_STUDY = Gauge("wardround_study_info", "Always 1; the labels name the studies of this process", ["study", "name"])
_pinned: list[tuple[str, str]] = []
_studies: dict[str, str] = {}
_START = Gauge(
    "wardround_certificate_start_timestamp_seconds", "Start of the TLS leaf's validity, Unix seconds (NaN: unreadable)"
)


def package_version() -> str:
    """The installed version of this distribution, or `unknown` in a bare checkout."""
    try:
        return version("wardround")
    except PackageNotFoundError:
        return "unknown"


def short(digest: bytes) -> str:
    """A digest as labels and people name it: the first twelve hex digits of what sha256sum prints."""
    return digest.hex()[:12]


def show_charters(digests: Sequence[bytes]) -> None:
    """Which charters are pinned here: the current one, then the next one if there is one."""
    now = list(zip(("current", "next"), map(short, digests), strict=False))
    if now != _pinned:
        _pinned[:] = now
        _CHARTER.clear()
    for word, digest in now:
        _CHARTER.labels(word, digest).set(1)


def show_studies(names: Mapping[str, str]) -> None:
    """The studies that this process has to do with: `short` digest to name, empty while it is unknown."""
    if names != _studies:
        _studies.clear()
        _studies.update(names)
        _STUDY.clear()
    for study, name in names.items():
        _STUDY.labels(study, name).set(1)


def announce(role: str, id: str, certificate: Path) -> None:
    """Set the build info, and let every scrape read the certificate file's validity afresh."""
    # It writes one more series for each counter, which nobody reads.
    disable_created_metrics()  # type: ignore[no-untyped-call]  # without types in prometheus_client
    _BUILD.labels(role, id, package_version(), platform.python_version()).set(1)
    _EXPIRY.set_function(lambda: certificate_validity(certificate)[1])
    _START.set_function(lambda: certificate_validity(certificate)[0])


def certificate_now(certificate: Path, now_ms: int) -> tuple[bool, str]:
    """Whether the leaf is valid at `now_ms`, and a sentence: what every role's readiness looks at."""
    begin, end = certificate_validity(certificate)
    if math.isnan(end):
        return False, f"{certificate} cannot be read: put the leaf there, it is read again by itself"
    edges = [datetime.fromtimestamp(edge, UTC).strftime("%Y-%m-%dT%H:%MZ") for edge in (begin, end)]
    if begin <= now_ms / 1000 <= end:
        return True, f"valid until {edges[1]}"
    return False, (
        f"{certificate} is valid from {edges[0]} to {edges[1]}, not now: renew it with `wardround site renew` "
        "(or set the clock); it is read again by itself"
    )


def certificate_validity(certificate: Path) -> tuple[float, float]:
    """(not before, not after) of a PEM certificate in Unix seconds; NaN twice where it cannot be read."""
    try:
        leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError):
        return math.nan, math.nan
    return leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
