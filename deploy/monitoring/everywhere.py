"""Panels that every dashboard has; `chosen` are the label matchers of the processes that were chosen."""

from typing import Any

from deploy.monitoring.panels import GREEN, ORANGE, RED, Look, Place, Query, listing, number


def certificate(place: Place, chosen: str) -> Any:
    """The shortest life that a TLS certificate has left."""
    steps = ((None, RED), (86_400, ORANGE), (604_800, GREEN))
    look = Look(place, "Certificate", "Life that the TLS certificate has left; the shortest, if several.", "s", steps)
    return number(look, Query(f"min(wardround_certificate_expiry_timestamp_seconds{{{chosen}}}) - time()"))


def disk(place: Place, chosen: str) -> Any:
    """How long the log's writes take."""
    steps = ((None, GREEN), (0.1, ORANGE), (1, RED))
    about = "99 of 100 writes to the log took no longer, over the time shown: no answer leaves before."
    buckets = f"sum by (le) (increase(wardround_store_append_seconds_bucket{{{chosen}}}[$__range]))"
    return number(Look(place, "Disk", about, "s", steps, decimals=3), Query(f"histogram_quantile(0.99, {buckets})"))


def runs(place: Place, chosen: str) -> Any:
    """Which version runs."""
    look = Look(place, "What runs", "Version of the service.", "none")
    query = Query(f"max by (id, version) (wardround_build_info{{{chosen}}})")
    return listing(look, query, columns={"id": "id", "version": "version"})
