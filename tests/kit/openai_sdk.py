"""The `openai` package of Python as a client, in one of its major versions: a process that a test drives. A User is of
this one, or of Node's (tests/clients/js/openai.mjs)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.kit.needs import needs_openai
from tests.kit.node import Call, Driven

DRIVER = Path(__file__).parents[1] / "clients" / "py" / "drive_openai.py"


class Sdk(Driven):
    """`major` is "3" or "2"."""

    def __init__(self, folder: Path, major: str) -> None:
        log = folder / f"openai-{major}.log"
        super().__init__(log, [sys.executable, str(DRIVER)], folder=folder, env=needs_openai(major))


class User:
    """Somebody's client of one gateway."""

    def __init__(self, sdk: Driven, url: str, token: str) -> None:
        self._sdk = sdk
        self.url = url
        self._token = token

    def start(self, name: str, **arguments: Any) -> Call:
        return self._sdk.start(name, url=self.url, token=self._token, **arguments)

    def call(self, name: str, **arguments: Any) -> Any:
        return self.start(name, **arguments).result(60)

    def at(self, url: str, token: str = "") -> User:
        """The same at another gateway, or with another token."""
        return User(self._sdk, url, token or self._token)

    def seen(self, name: str, **arguments: Any) -> tuple[list[Any], Any]:
        """All that a call has told on its way, and what it returned."""
        call = self.start(name, **arguments)
        value = call.result(60)
        return call.seen, value


def is_delta(event: Any) -> bool:
    return isinstance(event, dict) and event["type"] == "response.output_text.delta"
