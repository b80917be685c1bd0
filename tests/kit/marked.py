"""A tool's body that can be watched from outside: a file says what has happened to it."""

from __future__ import annotations

import asyncio
from pathlib import Path


async def waits_at(mark: str) -> str:
    """Notes each call in the file `mark`, and whether it was closed; waits until `mark` + ".go" is there."""
    with Path(mark).open("a") as file:
        file.write("called ")
    try:
        while not Path(f"{mark}.go").exists():
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        with Path(mark).open("a") as file:
            file.write("closed ")
        raise
    return "waited"
