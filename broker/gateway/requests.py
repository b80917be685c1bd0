"""What clients send, read with limits: bodies, cursors, preferences. Everything malformed is a BrokerError."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from broker.errors import BadCursor, BadRequest, Invalid, TooLarge, UnsupportedMediaType
from broker.gateway.api import SubmitBody
from broker.ids import Cursor
from broker.runs.record import Submission
from broker.settings import Settings
from broker.status import STATUSES

Body = TypeVar("Body", bound=BaseModel)

MAX_BODY = 256 * 1024
MAX_WAIT_SECONDS = 60.0
MAX_DEPTH = 100
MAX_FIELD_ERRORS = 20
CURSORS = ("Last-Event-ID", "last_event_id", "lastEventId")
"""Where a client may say where it stands: a route's parameters."""
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)


async def submission(request: Request, settings: Settings) -> Submission:
    return submission_of(validated(SubmitBody, await read_json(request), needed="query"), settings)


def submission_of(parsed: SubmitBody, settings: Settings) -> Submission:
    """Raises Invalid for what this service does not have, or cannot do."""
    least = settings.least_unwatched_seconds
    if parsed.cancel_if_unwatched is not None and parsed.cancel_if_unwatched < least:
        refuse(
            "cancel_if_unwatched",
            f"At least {least:g} seconds: a reader that is only reconnecting must have the time to come back.",
        )
    return Submission(
        query=parsed.query,
        agent=known_agent(parsed.agent, settings),
        session_id=parsed.session_id,
        parameters=parsed.parameters,
        metadata=parsed.metadata,
        cancel_if_unwatched=parsed.cancel_if_unwatched,
    )


def validated(model: type[Body], body: Any, *, needed: str) -> Body:
    """`needed` is a field that every such body has. Raises Invalid."""
    if not isinstance(body, dict):
        raise Invalid(f"The body must be a JSON object with at least a `{needed}`.")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        fields = _fields(error)
        text = "; ".join(f"{field['field']}: {field['message']}" for field in fields)
        raise Invalid(text, errors=fields) from None


def known_agent(name: str | None, settings: Settings) -> str:
    """The agent of that name, or the default one. Raises Invalid."""
    if name is not None and name not in settings.agent_names:
        refuse("agent", f"Unknown agent; this service has: {', '.join(settings.agent_names)}.")
    return name if name is not None else settings.default_agent


def refuse(field: str, message: str) -> NoReturn:
    """Raises Invalid for a field of the body."""
    raise Invalid(f"{field}: {message}", errors=[{"field": field, "message": message}])


async def read_json(request: Request, *, limit: int = MAX_BODY, also: str = "") -> Any:
    """The body, of at most `limit` bytes; `also` is another media type under which JSON is taken.

    Raises BadRequest, TooLarge, UnsupportedMediaType.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("application/json", also) or not media_type:
        raise UnsupportedMediaType("Send the body as JSON, with the header 'Content-Type: application/json'.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise TooLarge(f"The body is larger than {limit} bytes.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise TooLarge(f"The body is larger than {limit} bytes.")
    return _parsed(bytes(body), "The body")


def query_json(request: Request, name: str) -> Any:
    """A parameter of the query string whose value is JSON; None where it is not sent. Raises BadRequest."""
    text = request.query_params.get(name)
    return None if text is None else _parsed(text.encode("utf-8"), f"`{name}`")


def _parsed(text: bytes, what: str) -> Any:
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise BadRequest(f"{what} is not UTF-8.") from None
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRequest(f"{what} is not JSON{where}.") from None
    if _deeper_than(MAX_DEPTH, value):
        raise BadRequest(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    return value


def _deeper_than(depth: int, value: Any) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            item
            for part in level
            if isinstance(part, (dict, list))
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """1e999 is JSON, but no number that we could pass on."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def _fields(error: ValidationError) -> list[dict[str, str]]:
    return [
        {
            "field": ".".join(str(part) for part in item["loc"])[:100],
            "message": item["msg"],
        }
        for item in error.errors(include_url=False, include_input=False, include_context=False)[:MAX_FIELD_ERRORS]
    ]


def cursor(request: Request) -> Cursor | None:
    """Raises BadCursor."""
    text = cursor_text(request)
    return Cursor.parse(text) if text else None


def cursor_text(request: Request) -> str:
    """`Last-Event-ID`, else `?last_event_id=`, else `?lastEventId=`; empty is none."""
    text = request.headers.get("last-event-id")
    if text is None:
        text = request.query_params.get("last_event_id") or request.query_params.get("lastEventId")
    return text or ""


def run_cursor(request: Request, request_id: str) -> Cursor | None:
    """On a run's own route, where the long form must name that run."""
    found = cursor(request)
    if found and found.request_id not in (None, request_id):
        raise BadCursor("This cursor belongs to another run.")
    return found


def submit_cursor(request: Request) -> Cursor | None:
    """On a route that submits, where only the long form says which run is meant."""
    found = cursor(request)
    if found and found.request_id is None:
        raise BadCursor("On this route a cursor is '<request_id>/<event id>', as the stream's ids are.")
    return found


def idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise BadRequest("An Idempotency-Key has 1 to 255 visible ASCII characters.")
    return key


def is_repeat(request: Request) -> bool:
    """Whether an OpenAI SDK says that it sends this request again."""
    return re.fullmatch(r"0*[1-9][0-9]{0,5}", request.headers.get("x-stainless-retry-count", "0")) is not None


def wait_seconds(request: Request) -> tuple[float, bool]:
    """(How long a poll may be held, whether `Prefer` asked for it): `?wait=` wins over `Prefer: wait=`."""
    text = request.query_params.get("wait")
    if text is not None:
        if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", text, re.ASCII):
            raise BadRequest("`wait` is a number of seconds.")
        return min(float(text), MAX_WAIT_SECONDS), False
    preference = _WAIT.search(request.headers.get("prefer", ""))
    return (min(float(preference[1]), MAX_WAIT_SECONDS), True) if preference else (0.0, False)


def status(request: Request) -> str | None:
    """Raises BadRequest."""
    text = request.query_params.get("status")
    if text is not None and text not in STATUSES:
        raise BadRequest(f"`status` is one of {', '.join(STATUSES)}.")
    return text


def limit(request: Request) -> int:
    text = request.query_params.get("limit", "50")
    if not re.fullmatch(r"[1-9]\d{0,2}", text, re.ASCII) or int(text) > 500:
        raise BadRequest("`limit` is a number from 1 to 500.")
    return int(text)


def list_cursor(request: Request) -> str | None:
    return request.query_params.get("cursor") or None
