"""Tools for the tests; the worker gets them by BROKER_TOOLS."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from worker import Run, tool


@tool
def weather(city: str, days: int = 1) -> dict[str, object]:
    """The weather in a city."""
    return {"city": city, "days": days, "sky": "clear"}


@tool
def note(path: str, line: str, seconds: float = 0) -> str:
    """Adds a line to a file; takes its time where it is new there."""
    known = Path(path).exists() and line in Path(path).read_text().splitlines()
    with Path(path).open("a") as file:
        file.write(line + "\n")
    time.sleep(0 if known else seconds)
    return f"noted {line}"


@tool(timeout=20)
async def meet(folder: str, name: str, others: list[str]) -> str:
    """Comes back when the others are there too."""
    (Path(folder) / name).touch()
    while not all((Path(folder) / other).exists() for other in others):
        await asyncio.sleep(0.01)
    return f"{name} has met {len(others)}"


@tool
async def who(run: Run) -> str:
    """Who asks."""
    return f"{run.subject} of {run.tenant}"


@tool
def repeat(text: str, times: int = 1) -> str:
    """The text, so many times."""
    return text * times


@tool
def fails(path: str = "") -> None:
    """Cannot be done."""
    raise RuntimeError("this city has no weather")


@tool(timeout=0.3)
async def dawdles() -> None:
    """Takes longer than it may."""
    await asyncio.sleep(60)


@tool(timeout=60)
async def lingers(mark: str) -> None:
    """Takes long; leaves a file when it is cancelled."""
    try:
        Path(mark + ".begun").touch()
        await asyncio.sleep(50)
    finally:
        Path(mark).write_text("closed")
