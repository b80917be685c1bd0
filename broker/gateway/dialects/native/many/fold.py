"""The native dialect of a connection that has several runs."""

from __future__ import annotations

from typing import Any

from broker import sse
from broker.gateway.dialects.native import fold
from broker.gateway.dialects.native.many.cursor import GONE


class NativeOfMany(fold.Native):
    """One of the runs: what is said of it names it, and `gone` has an id as well."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id, long_ids=True)
        self.key = ("native", "of many")
        self._request_id = request_id

    def heartbeat(self, text: str) -> bytes:
        return sse.comment(f"{self._request_id} {text}")

    def gone(self, state: Any) -> bytes:
        """The cursor says that the client knows, so that it is not told again."""
        return sse.frame("error", fold.GONE, f"{self._request_id}/{GONE}")
