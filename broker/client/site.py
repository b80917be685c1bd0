"""Where the service is, who asks, and how patiently: a client's configuration, checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from broker import __version__
from broker.client.backoff import Backoff
from broker.errors import Misconfigured

DEFAULT_URL = "http://127.0.0.1:8000"

Token = str | Callable[[], str]
"""A bearer token, or what returns one; that is asked before each request, so that a token can be renewed."""


@dataclass(kw_only=True)
class Site:
    url: str
    token: Token | None
    timeout: float
    patience: float
    longest_pause: float
    known: bool = False
    """Whether it has ever answered."""

    def headers(self) -> dict[str, str]:
        """Raises Misconfigured for a token that no header can carry."""
        headers = {"User-Agent": f"stream-broker/{__version__}"}
        token = self.token() if callable(self.token) else self.token
        if token:
            if not (token.isascii() and token.isprintable()) or " " in token:
                raise Misconfigured("The token (BROKER_TOKEN) has characters that no bearer token has.")
            headers["Authorization"] = f"Bearer {token}"
        return headers

    def backoff(self, most: float | None = None) -> Backoff:
        patience = self.patience if most is None else min(self.patience, most)
        return Backoff(patience=patience, longest=self.longest_pause, known=self.known)


def site(url: str | None, token: Token | None, *, timeout: float, patience: float, longest_pause: float) -> Site:
    """What is None comes from BROKER_URL and BROKER_TOKEN. Raises Misconfigured."""
    if url is None:
        url = os.environ.get("BROKER_URL") or DEFAULT_URL
    if token is None:
        token = (os.environ.get("BROKER_TOKEN") or "").strip() or None
    return Site(url=_checked(url.strip()), token=token, timeout=timeout, patience=patience, longest_pause=longest_pause)


def _checked(url: str) -> str:
    if "@" in url:  # what stands before it must not be told
        raise Misconfigured("The URL of the broker (BROKER_URL) has an @; credentials go into BROKER_TOKEN.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Misconfigured(f"The URL of the broker (BROKER_URL) is not one: {error}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise Misconfigured(f"The URL of the broker (BROKER_URL) is {url!r}, not of the form {DEFAULT_URL}.")
    if parts.query or parts.fragment:
        raise Misconfigured("The URL of the broker (BROKER_URL) may have a path, but no query and no fragment.")
    return url.rstrip("/")
