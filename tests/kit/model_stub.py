"""The stand-in provider as a process, and what it was asked."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import TracebackType
from typing import Any

import httpx

from tests.kit.processes import wait_for


class ModelStub:
    """`python -m broker.model_stub` on a free port. `url` is for OPENAI_BASE_URL."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "broker.model_stub", *options]
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._popen.stdout is not None
        self.url = self._popen.stdout.readline().strip()
        assert self.url, "the stub did not start"
        self._http = httpx.Client(base_url=self.url.removesuffix("/v1"), verify=False, trust_env=False)

    def __enter__(self) -> ModelStub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a worker needs to ask it, beside BROKER_MODEL."""
        return {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": "a-key-of-the-tests"}

    def journal(self, containing: str = "") -> list[dict[str, Any]]:
        """The requests whose messages contain the text, the oldest first."""
        entries: list[dict[str, Any]] = self._http.get("/journal").raise_for_status().json()
        return [entry for entry in entries if any(containing in str(m.get("content")) for m in entry["messages"])]

    def until_ended(self, how: str, containing: str = "", *, seconds: float = 10) -> None:
        """Until the last such request has ended: `complete`, `refused`, `broken` or `disconnected`."""

        def ended() -> bool:
            entries = self.journal(containing)
            return bool(entries) and entries[-1]["ended"] == how

        wait_for(ended, seconds=seconds)

    def close(self) -> None:
        """What it streams is cut. Afterwards its port refuses connections."""
        self._http.close()
        with contextlib.suppress(ProcessLookupError):
            self._popen.terminate()
        try:
            self._popen.wait(10)
        finally:
            self._popen.kill()
            self._popen.wait()
            if self._popen.stdout is not None:
                self._popen.stdout.close()
