"""Web pages with clients of npm, built as bundlers do and served from an origin of their own."""

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

HTML = """<!doctype html><meta charset="utf-8"><title>{name}</title><link rel="icon" href="data:,">
<body><script type="module" src="{name}.js"></script>
"""
SHOWN = "[...document.querySelectorAll('section.assistant:last-of-type > p.text')].map(p => p.textContent)"
STATUS = "document.querySelector('main')?.dataset.status"


class Pages:
    """A context manager, which serves them at the origin `url`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        handler = functools.partial(_Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], name="pages")
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def chat(self, browser: Browser, major: int, *, chat: str, gateway: str, token: str, **body: Any) -> Chat:
        """By useChat of this major version of ai; `body` goes with each message."""
        page = {"chat": chat, "api": f"{gateway}/ai/chat", "token": token, "body": body}
        return Chat(self.page(browser, "chat.jsx", page, hook=f"react-ai{major}", transport=f"ai{major}"))

    def page(self, browser: Browser, script: str, given: dict[str, Any], **aliases: str) -> Page:
        """`script` of tests/clients/js, with packages by other names, in a page that is given something."""
        name = "-".join([Path(script).stem, *aliases.values()])
        if not (self._folder / f"{name}.html").exists():
            _build(script, self._folder / f"{name}.js", aliases)
            (self._folder / f"{name}.html").write_text(HTML.format(name=name), "utf-8")
        return browser.page(f"{self.url}/{name}.html?page={quote(json.dumps(given))}")

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
    """A page that chats, as its user sees it. A context manager, which closes it."""

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

    @property
    def last_id(self) -> str:
        """Of the last message."""
        found: str = self.page.evaluate("document.querySelector('section:last-of-type').id")
        return found

    def until_text(self, length: int) -> str:
        """Until the last text has so many characters."""
        shown: str = self.page.until(f"(t => t?.length >= {length} && t)({SHOWN}.at(-1))")
        return shown

    def until_says(self, text: str) -> None:
        """Until it is in the last text."""
        self.page.until(f"{SHOWN}.at(-1)?.includes({json.dumps(text)})")

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


def _build(script: str, bundle: Path, aliases: dict[str, str]) -> None:
    esbuild = JAVASCRIPT / "node_modules" / "esbuild" / "bin" / "esbuild"
    command = [needs_javascript(), str(esbuild), script, "--bundle", "--format=esm", "--jsx=automatic"]
    command += ["--log-level=error", '--define:process.env.NODE_ENV="production"', f"--outfile={bundle}"]
    command += [f"--alias:{name}={package}" for name, package in aliases.items()]
    subprocess.run(command, cwd=JAVASCRIPT, check=True, timeout=60)
