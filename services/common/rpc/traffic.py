"""Counts the bytes that a dialling site sends and receives: what leaves the house, by RPC."""

from __future__ import annotations  # grpc classes are generic in their stubs only

from collections.abc import Callable
from typing import Any

import grpc
from prometheus_client import Counter

_BYTES = Counter(
    "wardround_rpc_client_bytes_total", "Message bytes of RPCs that this process made", ["method", "direction"]
)

Maker = Callable[..., Any]


class Counted(grpc.Channel):
    """A channel as it is, whose (de)serializers count: the sizes are known there and cost nothing."""

    def __init__(self, inner: grpc.Channel) -> None:
        self._inner = inner

    def unary_unary(self, method: str, *serializers: Any, **options: Any) -> Any:
        """As grpc.Channel's, counted."""
        return _counted(self._inner.unary_unary, method, *serializers, **options)

    def unary_stream(self, method: str, *serializers: Any, **options: Any) -> Any:
        """As grpc.Channel's, counted."""
        return _counted(self._inner.unary_stream, method, *serializers, **options)

    def stream_unary(self, method: str, *serializers: Any, **options: Any) -> Any:
        """As grpc.Channel's, counted."""
        return _counted(self._inner.stream_unary, method, *serializers, **options)

    def stream_stream(self, method: str, *serializers: Any, **options: Any) -> Any:
        """As grpc.Channel's, counted."""
        return _counted(self._inner.stream_stream, method, *serializers, **options)

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        """As grpc.Channel's."""
        self._inner.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        """As grpc.Channel's."""
        self._inner.unsubscribe(callback)

    def close(self) -> None:
        """As grpc.Channel's."""
        self._inner.close()

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _counted(
    make: Maker, method: str, request_serializer: Any = None, response_deserializer: Any = None, **options: Any
) -> Any:
    """`make` of the method; without a serializer a message is its bytes already."""
    outward, inward = _BYTES.labels(method, "sent"), _BYTES.labels(method, "received")

    def sent(message: Any) -> bytes:
        data: bytes = message if request_serializer is None else request_serializer(message)
        outward.inc(len(data))
        return data

    def received(data: bytes) -> Any:
        inward.inc(len(data))
        return data if response_deserializer is None else response_deserializer(data)

    return make(method, sent, received, **options)
