"""Structured logs: one JSON object a line, on standard error."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

from broker.settings import Settings


def configure(level: int = logging.INFO) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            json_ensure_ascii=True,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "arq.worker", "arq.connections", "arq.jobs", "httpx", "httpcore", "redis"):
        logging.getLogger(name).setLevel(logging.WARNING)


def print_settings(settings: Settings, role: str) -> None:
    logging.getLogger("broker").info("settings", extra={"role": role, "settings": settings.redacted()})
