"""Agents for the tests; the worker gets them by BROKER_AGENTS."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import stat
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from broker.events import AGENT
from worker import (
    Checkpoint,
    Data,
    Error,
    Event,
    Final,
    Message,
    Progress,
    Reasoning,
    Run,
    Sources,
    Token,
    ToolCall,
    ToolResult,
)

Events = AsyncIterator[Event | Checkpoint]


async def echo(run: Run) -> Events:
    """The query's words; `pause` seconds after each."""
    for word in run.query.split():
        yield Token(text=word + " ")
        if run.parameters.get("pause"):
            await asyncio.sleep(run.parameters["pause"])
    yield Final(answer=run.query)


async def tokens(run: Run) -> Events:
    """`count` tokens, `pause` seconds after each `every`."""
    every = run.parameters.get("every", 1)
    for n in range(run.parameters["count"]):
        yield Token(text=f"{n} ")
        if run.parameters.get("pause") and n % every == every - 1:
            await asyncio.sleep(run.parameters["pause"])


PLAYED: dict[str, type[Event]] = {event.type: event for event in AGENT}


async def plays(run: Run) -> Events:
    """The `script`, a list of [type, data]; ["pause", seconds] and ["until", path of a file] wait. What is between two
    ["checkpoint", None] is not played again.
    """
    done = (run.restored or {"done": 0})["done"]
    for number, (kind, value) in enumerate(run.parameters["script"]):
        if number < done:
            continue
        if kind == "pause":
            await asyncio.sleep(value)
        elif kind == "until":
            while not Path(value).exists():
                await asyncio.sleep(0.02)
        elif kind == "checkpoint":
            yield Checkpoint(state={"done": number + 1})
        else:
            yield PLAYED[kind].model_validate(value)


async def slow(run: Run) -> Events:
    """A token, then `seconds` of silence; its `finally` leaves a file `mark`, where one is named."""
    try:
        yield Token(text="begun ")
        await asyncio.sleep(run.parameters.get("seconds", 60))
        yield Token(text="done")
    finally:
        if run.parameters.get("mark"):
            Path(run.parameters["mark"]).write_text("closed")


async def sleeper(run: Run) -> Events:
    """`seconds` of silence, nothing else."""
    await asyncio.sleep(run.parameters.get("seconds", 60))
    yield Final(answer="awake")


async def raises(run: Run) -> Events:
    yield Token(text="so far ")
    raise RuntimeError("a secret detail of the agent")


async def hangs(run: Run) -> Events:
    yield Token(text="waiting ")
    await asyncio.Event().wait()


async def stubborn(run: Run) -> Events:
    """Does not end when it is cancelled, and tries to go on writing."""
    yield Token(text="I ")
    for _ in range(200):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)
    yield Token(text="will not stop")


async def yields_junk(run: Run) -> Any:
    yield Token(text="before ")
    yield {"type": "token", "text": "not an event"}


async def no_final(run: Run) -> Events:
    yield Token(text="only ")
    yield Token(text="tokens")


async def burst(run: Run) -> Events:
    """`count` tokens of `size` characters, without a pause unless there is a `pause`."""
    for _ in range(run.parameters["count"]):
        yield Token(text="x" * run.parameters.get("size", 10))
        if run.parameters.get("pause"):
            await asyncio.sleep(run.parameters["pause"])


async def speaks(run: Run) -> Events:
    """Every type of event for each of `texts`, with the text in every field that takes one; the last one ends the run,
    as an answer, or as an error where `error` says so.
    """
    texts = run.parameters.get("texts") or [run.parameters.get("text", run.query)]
    for text in texts:
        item = {"title": text, "path": text, text: text}
        yield Message(text=text)
        yield Progress(percent=50, message=text)
        yield Sources(stage="discovered", count=1, items=[item])
        yield Reasoning(text=text)
        yield ToolCall(id=text, tool=text, args={text: [text]})
        yield ToolResult(id=text, tool=text, result=text)
        yield Data(name=text, value={text: text})
        yield Token(text=text)
    if run.parameters.get("error"):
        yield Error(code=text, message=text)
    yield Final(answer=text, citations=[item], usage={text: text})


VARIETY = (
    "plain",
    "é ü ß",
    "日本語",
    "😀👩‍👩‍👧",
    'a "quoted" \\ word',
    "two\nlines\r\n",
    "\u2028\u0085",
    "data: x\n\nid: 9-9",
    "\ud800",
)


async def varied(run: Run) -> Events:
    """`count` events of many types, their texts from VARIETY; `pause` seconds after each `every`."""
    every = run.parameters.get("every", 10)
    for n in range(run.parameters["count"]):
        text = f"{n} {VARIETY[n % len(VARIETY)]}"
        yield (
            Token(text=text),
            Message(text=text),
            Data(name=text, value=[n, text, None, 0.5, {text: True}]),
            Reasoning(text=text),
        )[n % 4]
        if run.parameters.get("pause") and n % every == every - 1:
            await asyncio.sleep(run.parameters["pause"])
    yield Final(answer=VARIETY[2], usage={"events": run.parameters["count"]})


async def quiet(run: Run) -> Events:
    """`count` tokens, `pause` seconds of silence before each and before the end."""
    for n in range(run.parameters.get("count", 2)):
        await asyncio.sleep(run.parameters["pause"])
        yield Token(text=f"{n} ")
    await asyncio.sleep(run.parameters["pause"])


async def together(run: Run) -> Events:
    """Ends when `count` calls block at once, each in a thread."""
    count = run.parameters["count"]
    meeting = threading.Barrier(count)
    await asyncio.gather(*(asyncio.to_thread(meeting.wait, 10) for _ in range(count)))
    yield Final(answer=f"{count} at once")


async def about(run: Run) -> Events:
    """Everything that the agent knows of its run."""
    yield Data(name="run", value={name: value for name, value in vars(run).items() if name != "recall"})


async def recalls(run: Run) -> Events:
    """The earlier runs of its session, within `tokens`."""
    for turn in await run.history(**{k: v for k, v in run.parameters.items() if k == "tokens"}):
        yield Data(name="turn", value={**vars(turn)})
    yield Final(answer=run.query)


async def _exits() -> None:
    raise SystemExit("a secret detail of the agent")


async def misbehaves(run: Run) -> Events:
    """Does `what`, after a token."""
    yield Token(text="before ")
    what = run.parameters["what"]
    if what == "nan":
        yield Data(name="cost", value=float("nan"))
    elif what == "too_large":
        yield Token(text="x" * 70_000)
    elif what == "full":
        for _ in range(100_000):
            yield Token(text="")
    elif what == "exits":
        raise SystemExit("a secret detail of the agent")
    elif what == "task exits":
        await asyncio.create_task(_exits())
    elif what == "cancels":
        raise asyncio.CancelledError("a secret detail of the agent")
    elif what == "error":
        yield Error(code="no_quota", message="Come back tomorrow.")
    yield Token(text="after")


async def coroutine(run: Run) -> None:
    """Not an async generator function."""


async def checkpoints(run: Run) -> Events:
    """`count` tokens with a checkpoint after each; goes on after the last one that survived. `pause` after each."""
    for n in range((run.restored or {"done": 0})["done"], run.parameters["count"]):
        yield Token(text=f"{n} ")
        yield Checkpoint(state={"done": n + 1})
        await asyncio.sleep(run.parameters.get("pause", 0))


async def steps(run: Run) -> Events:
    """`count` tokens, each with the attempt that wrote it: "2:17 " is the second attempt's; `pause` after each.

    Says first what it was restored to. With `every` it yields a checkpoint after so many tokens, and goes on after the
    last one that survived. Its `finally` leaves a file `mark`.<attempt>, where one is named. With `until` there is more
    until there is that file.
    """
    yield Data(name="restored", value=run.restored)
    n, every = (run.restored or {"done": 0})["done"], run.parameters.get("every")
    try:
        while _unfinished(run, n):
            yield Token(text=f"{run.attempt}:{n} ")
            n += 1
            if every and n % every == 0:
                yield Checkpoint(state={"done": n})
            await asyncio.sleep(run.parameters.get("pause", 0))
    finally:
        if run.parameters.get("mark"):
            Path(f"{run.parameters['mark']}.{run.attempt}").write_text("closed")


async def kills(run: Run) -> Events:
    """Kills its worker, as an agent that takes all memory does."""
    yield Token(text=f"{run.attempt} ")
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def _unfinished(run: Run, n: int) -> bool:
    """Whether more than `n` are to come: `count`, and more until there is a file `until`, where one is named."""
    until = run.parameters.get("until")
    return n < run.parameters["count"] or bool(until and not Path(until).exists())


def numbered(run: str, n: int) -> str:
    """The n-th token of a run: what is lost, doubled or another run's is seen in the text."""
    return f"{run[:8]}:{n} "


async def chatter(run: Run) -> Events:
    """`count` numbered tokens, `pause` seconds after each, and more until there is a file `until`, where one is named.

    A later attempt begins again. The usage says how many they were.
    """
    n = 0
    while _unfinished(run, n):
        yield Token(text=numbered(run.request_id, n))
        n += 1
        await asyncio.sleep(run.parameters.get("pause", 0))
    yield Final(usage={"tokens": n})


async def stepper(run: Run) -> Events:
    """The same with a checkpoint after each `every`, from the last of which a later attempt goes on."""
    n, every = (run.restored or {"done": 0})["done"], run.parameters.get("every", 5)
    while _unfinished(run, n):
        yield Token(text=numbered(run.request_id, n))
        n += 1
        if n % every == 0:
            yield Checkpoint(state={"done": n})
        await asyncio.sleep(run.parameters.get("pause", 0))
    yield Final(usage={"tokens": n})


async def bulky(run: Run) -> Events:
    """As `chatter`, with `size` characters of ballast beside each token: more than a worker keeps for a repair."""
    for n in range(run.parameters["count"]):
        yield Token(text=numbered(run.request_id, n))
        yield Data(name="ballast", value="x" * run.parameters.get("size", 60_000))
        await asyncio.sleep(run.parameters.get("pause", 0))


async def clock(run: Run) -> Events:
    """`count` tokens, each the machine's time at which the agent made it; `pause` after each."""
    for _ in range(run.parameters["count"]):
        yield Token(text=f"{time.monotonic():.3f} ")
        await asyncio.sleep(run.parameters.get("pause", 0))


async def blocks(run: Run) -> Events:
    """A token; once there is a file `until`, its first attempt blocks the event loop for `seconds`, or until there is a
    file `release`; another token. With `task` it blocks in a task of its own, as a tool would.
    """
    yield Token(text="begun ")
    while not Path(run.parameters["until"]).exists():
        await asyncio.sleep(0.02)
    if run.attempt == 1 and run.parameters.get("task"):
        await asyncio.create_task(_block(**run.parameters))
    elif run.attempt == 1:
        await _block(**run.parameters)
    yield Token(text="over")


async def _block(*, seconds: float = 60, release: str = "", **_: Any) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (release and Path(release).exists()):
        time.sleep(0.02)


async def computes(run: Run) -> Events:
    """The machine's time, `seconds` of computing without an `await`, and the time again."""
    yield Token(text=f"{time.monotonic():.3f} ")
    end = time.monotonic() + run.parameters["seconds"]
    while time.monotonic() < end:
        sum(range(10_000))
    yield Token(text=f"{time.monotonic():.3f}")


async def dies(run: Run) -> Events:
    """A token and a checkpoint; its first attempt then ends its process in the way that `how` names; another token.

    A second one goes on from the checkpoint.
    """
    if run.restored is None:
        yield Token(text="saved ")
        yield Checkpoint(state="saved")
    if run.attempt == 1:
        if run.parameters["how"] == "exit":
            os._exit(7)
        elif run.parameters["how"] == "fork":  # what it leaves behind, until `release`, has all that it had open
            if os.fork() == 0:
                await _block(**run.parameters)
            os._exit(7)
        elif run.parameters["how"] == "stop":
            asyncio.get_running_loop().stop()
            await asyncio.Event().wait()
        else:
            ctypes.string_at(0)
    yield Token(text=f"restored {run.restored}")


async def counts(run: Run) -> Events:
    """`count` tokens without a pause; a file `mark` says how many it has got rid of."""
    for n in range(run.parameters["count"]):
        Path(run.parameters["mark"]).write_text(str(n))
        yield Token(text=f"{n} ")


async def clutters(run: Run) -> Any:
    """Yields what cannot be pickled, or only in its own process."""
    yield Token(text="before ")
    what = run.parameters["what"]
    if what == "lambda":
        yield lambda: None
    elif what == "in data":
        yield Data(name="x", value={"f": lambda: None})
    else:
        yield Checkpoint(state={"when": Thing()})


class Thing:
    """Nothing that JSON has."""


async def where(run: Run) -> Events:
    """Leaves the number of its process in a file `mark`; `seconds` of silence."""
    Path(run.parameters["mark"]).write_text(str(os.getpid()))
    await asyncio.sleep(run.parameters["seconds"])
    yield Final(answer="")


async def babbles(run: Run) -> Events:
    """Writes to its worker what is no message."""
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(fd, b"\0\0\0\1?") if stat.S_ISSOCK(os.fstat(fd).st_mode) else None
    yield Token(text="?")


async def marks(run: Run) -> Events:
    """Leaves a word in a file `mark` for each time that it begins; waits."""
    with Path(run.parameters["mark"]).open("a") as file:
        file.write("begun")
    yield Token(text="begun")
    await asyncio.Event().wait()
