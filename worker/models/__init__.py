"""Models behind OpenAI-compatible servers: one interface, whichever API the server has."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from broker.errors import Misconfigured
from broker.settings import Settings
from worker.models.model import Model


def open_model(settings: Settings) -> Model:
    """The models of the server that OPENAI_BASE_URL and OPENAI_API_KEY name: the same object for the same settings.

    It connects when it is asked first. Where something is missing, that fails, and not this. Raises Misconfigured for
    a URL or a key that cannot be one.
    """
    # The SDK takes most of a second to import, which a worker without a model need not spend.
    from worker.models.provider import OPENAI, PLACEHOLDER_KEY, Server, opened

    base_url = os.environ.get("OPENAI_BASE_URL", "").strip()
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if base_url and not _is_url(base_url):
        raise Misconfigured("OPENAI_BASE_URL is not of the form http://127.0.0.1:11434/v1.")
    if not (key.isascii() and key.isprintable()):
        raise Misconfigured("OPENAI_API_KEY has characters that no header can carry.")
    return opened(
        Server(
            base_url=base_url or OPENAI,
            key=key or (PLACEHOLDER_KEY if base_url else None),
            api=settings.model_api,
            stall_seconds=settings.model_stall_seconds,
            retry_seconds=settings.model_retry_seconds,
        )
    )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:  # a port or an IPv6 address that is none
        return False
