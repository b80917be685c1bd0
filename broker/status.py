"""The statuses of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Status = Literal["queued", "running", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
STATUS_OF: Mapping[str, Status] = {"final": "completed", "error": "failed", "cancelled": "cancelled"}
"""The types of a terminal event, and what its run is then."""
