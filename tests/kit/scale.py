"""How long a long loop is: a tenth by default, whole with BROKER_TEST_LONG=1."""

from __future__ import annotations

import os

LONG = os.environ.get("BROKER_TEST_LONG") == "1"


def scaled(n: int) -> int:
    return n if LONG else max(1, n // 10)
