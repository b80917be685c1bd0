"""Models behind OpenAI-compatible servers: one interface, whichever API the server has."""

from __future__ import annotations

import os

from broker.settings import Settings
from worker.models.model import Model


def open_model(settings: Settings) -> Model:
    """The models of the server that OPENAI_BASE_URL and OPENAI_API_KEY name: the same object for the same settings.

    It connects when it is asked first. Where something is missing, that fails, and not this.
    """
    # The SDK takes most of a second to import, which a worker without a model need not spend.
    from worker.models.provider import OPENAI, PLACEHOLDER_KEY, Server, opened

    base_url = os.environ.get("OPENAI_BASE_URL", "").strip()
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return opened(
        Server(
            base_url=base_url or OPENAI,
            key=key or (PLACEHOLDER_KEY if base_url else None),
            api=settings.model_api,
            stall_seconds=settings.model_stall_seconds,
            retry_seconds=settings.model_retry_seconds,
        )
    )
