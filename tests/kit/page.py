"""A web page that chats by AI SDK's useChat, built from the packages of npm and served from an origin of its own."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from tests.kit.browser import Browser, Page
from tests.kit.needs import JAVASCRIPT, needs_javascript

HTML = '<!doctype html><meta charset="utf-8"><title>Chat</title><link rel="icon" href="data:,">'
SHOWN = "[...document.querySelectorAll('section.assistant:last-of-type > p.text')].map(p => p.textContent)"
STATUS = "document.querySelector('main')?.dataset.status"


class Pages:
    """A page for each major version of ai. A context manager, which serves them at the origin `url`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], name="pages")
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def open(self, browser: Browser, major: int, *, chat: str, gateway: str, token: str, **body: Any) -> Chat:
        """`body` goes with each message."""
        if not (self._folder / f"ai{major}.html").exists():
            _build(major, self._folder)
        page = {"chat": chat, "api": f"{gateway}/ai/chat", "token": token, "body": body}
        return Chat(browser.page(f"{self.url}/ai{major}.html?page={quote(json.dumps(page))}"))

    def __enter__(self) -> Pages:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Chat:
    """The page, as its user sees it. A context manager, which closes it."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def send(self, text: str) -> None:
        self.page.write("#text", text)
        self.page.click("#send")

    @property
    def texts(self) -> list[str]:
        """The texts of the last answer; a run that began again in the middle has more than one, the last is right."""
        found: list[str] = self.page.evaluate(SHOWN)
        return found

    @property
    def roles(self) -> list[str]:
        found: list[str] = self.page.evaluate("[...document.querySelectorAll('section')].map(e => e.className)")
        return found

    def until_text(self, length: int) -> str:
        """Until the last text has so many characters."""
        shown: str = self.page.until(f"(t => t?.length >= {length} && t)({SHOWN}.at(-1))")
        return shown

    def until_status(self, status: str, seconds: float = 20) -> None:
        self.page.until(f"{STATUS} === {json.dumps(status)}", seconds)

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.page.__exit__(kind, error, trace)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def _build(major: int, folder: Path) -> None:
    """The page as bundlers make it for production."""
    esbuild = JAVASCRIPT / "node_modules" / "esbuild" / "bin" / "esbuild"
    command = [needs_javascript(), str(esbuild), "page.jsx", "--bundle", "--format=esm", "--jsx=automatic"]
    command += ["--log-level=error", '--define:process.env.NODE_ENV="production"', f"--outfile={folder}/ai{major}.js"]
    command += [f"--alias:hook=react-ai{major}", f"--alias:transport=ai{major}"]
    subprocess.run(command, cwd=JAVASCRIPT, check=True, timeout=60)
    script = f'<body><script type="module" src="ai{major}.js"></script>'
    (folder / f"ai{major}.html").write_text(HTML + script, "utf-8")
