"""What is the same for each library: text in events that a log has room for, values that JSON carries, the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from pydantic_core import to_jsonable_python

from broker.events import Event, Final, Reasoning, Token
from worker.agent import MAX_EVENT_BYTES, Checkpoint
from worker.agents.feed import Feed
from worker.agents.joiner import MAX_CHARS, Joiner
from worker.tools.result import BadResult, cut, make_result

Events = AsyncGenerator[Event | Checkpoint, None]
BETWEEN_ANSWERS = "\n\n"


async def joined(events: Events, attempt: int, closing: Callable[[], None] = lambda: None) -> Events:
    """The same events, as they come; text for which there is no room in a log waits for more. `closing` is called
    before `events` is closed or cancelled.
    """
    now = asyncio.get_running_loop().time
    joiner = Joiner(attempt)
    failure: Exception | None = None
    async with Feed(events) as feed:
        try:
            while not feed.ended:
                for event in await feed.take(joiner.wait(now())):
                    if isinstance(event, (Token, Reasoning)):
                        joiner.add(type(event), event.text, now())
                        continue
                    for text in joiner.take(now(), everything=True):
                        yield text
                    yield event
                for text in joiner.take(now()):
                    yield text
        except Exception as error:
            failure = error
        finally:
            closing()
    for text in joiner.take(now(), everything=True):
        yield text
    if failure is not None:
        raise failure


def shown(value: object) -> Any:
    """A value for the log: JSON, cut to what an event can carry; what JSON cannot carry as the text of it."""
    try:
        return make_result(value).value
    except BadResult:
        return cut(str(value))


def answer_of(output: object) -> str:
    """A text as it is, anything else as JSON."""
    if output is None or isinstance(output, str):
        return output or ""
    return json.dumps(to_jsonable_python(output, fallback=str, inf_nan_mode="null"), ensure_ascii=False)


def ending(answer: str | None, usage: dict[str, Any], *, told: bool) -> Iterator[Token | Final]:
    """The end. Without an answer the tokens are it. One that no event can hold is left to them, and told as tokens
    where there were none.
    """
    final = Final(answer=answer, usage=usage)
    if answer is not None and len(final.json_data()) > MAX_EVENT_BYTES:
        final = Final(usage=usage)
        if not told:
            for at in range(0, len(answer), MAX_CHARS):
                yield Token(text=answer[at : at + MAX_CHARS])
    yield final
