"""What both clients need of httpx."""

from __future__ import annotations

import errno
import os
import ssl
from typing import Any

import httpx

from broker.client.calls import Answer, Call, run_path
from broker.client.site import Site
from broker.client.tail import Broken, Tail
from broker.errors import Misconfigured

CONNECT_SECONDS = 10.0
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


def options(site: Site) -> dict[str, Any]:
    """Of an httpx client. As many connections as there are streams; a redirect would carry the token elsewhere.

    Raises Misconfigured for a URL that httpx takes for none, or whose host the resolver would stumble over.
    """
    try:
        httpx.URL(site.url).raw_host.decode("ascii").encode("idna")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise Misconfigured(f"The URL of the broker (BROKER_URL) is not one: {error}.") from None
    return {
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
        "follow_redirects": False,
        "verify": site.url.startswith("https:"),  # over plain HTTP the certificates need not be read
    }


def _timeout(site: Site, read: float) -> httpx.Timeout:
    """A host that is not there does not refuse: it says nothing."""
    return httpx.Timeout(site.timeout, read=read, connect=min(site.timeout, CONNECT_SECONDS))


def request(site: Site, call: Call[Any], headers: dict[str, str]) -> dict[str, Any]:
    """Arguments of an httpx client's `request`."""
    return {
        "method": call.method,
        "url": site.url + call.path,
        "params": dict(call.params) or None,
        "content": call.content,
        "headers": {**site.headers(), **headers},
        "timeout": _timeout(site, site.timeout + call.held),
    }


def stream(site: Site, tail: Tail, silence: float) -> dict[str, Any]:
    """Arguments of an httpx client's `stream`, for the tail's next connection."""
    return {
        "method": "GET",
        "url": f"{site.url}{run_path(tail.request_id)}/stream",
        "headers": {**site.headers(), **tail.headers()},
        "timeout": _timeout(site, silence),
    }


def opened(response: httpx.Response) -> Answer:
    """An answer without its body, where that is the stream."""
    body = b"" if response.status_code == 200 else response.content
    return Answer(response.status_code, _headers(response), body)


def answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, _headers(response), response.content)


def _headers(response: httpx.Response) -> dict[str, str]:
    return {name.lower(): text for name, text in response.headers.items()}


def sent(error: httpx.RequestError) -> bool:
    """Whether the service may have received the request."""
    return not isinstance(error, _NEVER_SENT)


def cause(error: httpx.RequestError | Broken) -> str:
    """What happened, for a person."""
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, httpx.ReadTimeout):
        return "nothing came for too long"
    system = _of_the_system(error)
    return os.strerror(system.errno or 0) if system is not None else str(error) or type(error).__name__


def _of_the_system(error: BaseException | None) -> OSError | None:
    """The error of the operating system at the bottom, which says why: above it anyio says that all attempts failed."""
    found = None
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno in errno.errorcode:
            found = error
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__
    return found
