"""Tickets: short-lived permission to read one run's stream, in the URL, for an EventSource, which can set no headers.

A ticket is a JWT, but under a key of its own, derived from the one that the gateways share: it is no bearer token
anywhere, and no bearer token is a ticket.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from typing import NamedTuple

import jwt

from broker.errors import NotConfigured, Unauthorized
from broker.gateway.auth import Principal
from broker.ids import Owner
from broker.settings import Settings

MAX_TICKET_BYTES = 1024
_ALGORITHM = "HS256"
_AUDIENCE = "stream-broker/ticket"
_LABEL = b"stream-broker ticket 1"
_COMPACT_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
_NOBODY = Owner("", "")
_ANOTHER = "POST …/runs/{id}/ticket gives out another."


class Ticket(NamedTuple):
    text: str
    expires_at: int
    """Unix seconds."""


class Tickets:
    """Any gateway with the same settings takes what another one has made."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.ticket_seconds
        self._keys = _keys(settings)

    def make(self, request_id: str, principal: Principal) -> Ticket:
        """For the run that the caller may see; it ends before the caller's own credentials do. Raises NotConfigured."""
        if not self._keys:
            raise NotConfigured(
                "This service signs no tickets: there is no BROKER_JWT_SECRET to make a key from. "
                "Set BROKER_TICKET_KEY, the same for all gateways."
            )
        ends = time.time() + self._seconds
        if principal.expires_at is not None:
            ends = min(ends, principal.expires_at)
        expires_at = math.ceil(ends)
        claims = {"aud": _AUDIENCE, "run": request_id, "exp": expires_at}
        return Ticket(jwt.encode(claims, self._keys[0], algorithm=_ALGORITHM), expires_at)

    def principal(self, text: str, request_id: str) -> Principal:
        """Who may read this run's stream, and nothing else. Raises Unauthorized."""
        if len(text) > MAX_TICKET_BYTES or not _COMPACT_JWS.fullmatch(text):
            raise Unauthorized(f"This is no ticket. {_ANOTHER}")
        for key in self._keys:
            try:
                claims = jwt.decode(
                    text,
                    key,
                    algorithms=[_ALGORITHM],
                    audience=_AUDIENCE,
                    options={"require": ["exp", "aud", "run"]},
                )
            except jwt.ExpiredSignatureError:
                raise Unauthorized(f"The ticket has expired. {_ANOTHER}") from None
            except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
                continue
            if claims["run"] != request_id:
                break
            return Principal(_NOBODY, frozenset(), int(claims["exp"]), ticket_for=request_id)
        raise Unauthorized(f"This is no ticket for this run. {_ANOTHER}")


def _keys(settings: Settings) -> list[bytes]:
    """Under the first tickets are signed; all are accepted."""
    texts = settings.ticket_keys
    if not texts and settings.jwt_secret is not None:
        texts = (settings.jwt_secret.get_secret_value(),)
    if not texts and settings.auth == "none":
        texts = ("",)  # a ticket allows nothing there that everybody on this machine may not
    return [hmac.digest(text.encode(), _LABEL, hashlib.sha256) for text in texts]
