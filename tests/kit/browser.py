"""A real Chromium without a window, driven by the DevTools protocol over a pipe: no driver, no library."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
Message = dict[str, Any]


class Browser:
    """One process group. Pages do not share cookies or storage."""

    def __init__(self, program: str, folder: Path) -> None:
        command = [program, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        to_read, self._commands = _pipe()
        self._answers, to_write = _pipe()
        out = os.open(folder / "chromium.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        # The protocol's pipe is at the descriptors 3 and 4, which subprocess cannot promise. The log first: it may have
        # one of these numbers itself.
        places = {out: 2, to_read: 3, to_write: 4}
        actions = [(os.POSIX_SPAWN_DUP2, mine, place) for mine, place in places.items()]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=actions, setpgroup=0)
        for mine in places:
            os.close(mine)
        self._last_id = 0
        self._unread = b""
        self._pages: dict[str, Page] = {}

    def page(self, url: str) -> Page:
        """A page at `url`, loaded, in a profile of its own."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, context)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.open(url)
        return page

    def post(self, method: str, *, session: str | None = None, **parameters: Any) -> int:
        """Sends a command, and does not wait for its result."""
        self._last_id += 1
        command = {"id": self._last_id, "method": method, "params": parameters}
        if session is not None:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        return self._last_id

    def send(self, method: str, *, session: str | None = None, **parameters: Any) -> Message:
        """A command's result. Events that come before it go to their pages."""
        command_id = self.post(method, session=session, **parameters)
        deadline = time.monotonic() + 30
        while True:
            message = self._read(deadline)
            assert message is not None, f"Chromium did not answer {method}"
            if message.get("id") == command_id:
                assert "error" not in message, f"{method}: {message['error']}"
                result: Message = message["result"]
                return result

    def read_events(self, seconds: float) -> None:
        """Takes what Chromium tells of itself."""
        deadline = time.monotonic() + seconds
        while self._read(deadline) is not None:
            pass

    def _read(self, deadline: float) -> Message | None:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._answers, 1 << 20)
            assert data, "Chromium has ended"
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        message: Message = json.loads(text)
        page = self._pages.get(message.get("sessionId", ""))
        if page is not None and "method" in message:
            page.on_event(message["method"], message["params"])
        return message

    def close_page(self, page: Page) -> None:
        del self._pages[page.session]
        self.send("Target.disposeBrowserContext", browserContextId=page.context)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._commands)
        os.close(self._answers)


class Page:
    """A page, as a user sees and handles it. A context manager, which closes it."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self.browser = browser
        self.session = session
        self.context = context
        self.requests: list[Message] = []
        """{url, method, headers}, in order, with `status` once it is answered."""
        self.dialogs: list[str] = []
        """What the page asked; the answer is yes."""
        self.complaints: list[str] = []
        """Exceptions that nobody caught, and what the console says, refusals by CSP among it; not failed requests."""
        self._by_id: dict[str, Message] = {}
        self._loads = 0

    def send(self, method: str, **parameters: Any) -> Message:
        return self.browser.send(method, session=self.session, **parameters)

    def on_event(self, method: str, event: Message) -> None:
        match method:
            case "Page.loadEventFired":
                self._loads += 1
            case "Network.requestWillBeSent":
                request = self._by_id[event["requestId"]] = {"headers": {}, **self._by_id.get(event["requestId"], {})}
                sent = event["request"]
                request |= {
                    "url": sent["url"],
                    "method": sent["method"],
                    "headers": sent["headers"] | request["headers"],
                }
                self.requests.append(request)
            case "Network.requestWillBeSentExtraInfo":  # before or after the other; has what the browser itself adds
                request = self._by_id.setdefault(event["requestId"], {"headers": {}})
                request["headers"] |= event["headers"]
            case "Network.responseReceived":
                self._by_id[event["requestId"]]["status"] = event["response"]["status"]
            case "Page.javascriptDialogOpening":
                self.dialogs.append(event["message"])
                self.browser.post("Page.handleJavaScriptDialog", session=self.session, accept=True)
            case "Runtime.exceptionThrown":
                details = event["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(" ".join(str(arg.get("value")) for arg in event["args"]))
            case "Log.entryAdded" if event["entry"]["source"] != "network":
                self.complaints.append(event["entry"]["text"])

    # -- what a user does ------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self._loading("Page.navigate", url=url)

    def reload(self) -> None:
        self._loading("Page.reload")

    def _loading(self, method: str, **parameters: Any) -> None:
        loads = self._loads
        answer = self.send(method, **parameters)
        assert not answer.get("errorText"), answer
        deadline = time.monotonic() + 20
        while self._loads == loads:
            assert time.monotonic() < deadline, "the page does not load"
            self.browser.read_events(0.05)

    def click(self, selector: str) -> None:
        """With the mouse, on what lies at the element's middle."""
        box = self.evaluate(
            f"""(element => {{
              element.scrollIntoView({{ block: "center" }});
              const {{ x, y, width, height }} = element.getBoundingClientRect();
              return {{ x: x + width / 2, y: y + height / 2 }};
            }})(document.querySelector({json.dumps(selector)}))"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def write(self, selector: str, text: str) -> None:
        """Into a field, in place of what it holds; the field is left afterwards."""
        self.evaluate(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.send("Input.insertText", text=text)
        self.evaluate("document.activeElement.blur()")

    def press(self, key: Literal["Tab", "Enter"], *, control: bool = False) -> None:
        """A key, with the focus where it is."""
        event = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": {"Tab": 9, "Enter": 13}[key],
            "modifiers": 2 * control,
        }
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def look(self, *, width: int, height: int = 800, dark: bool = False) -> None:
        """As on a screen of this size (CSS pixels), in light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    # -- what a user sees ------------------------------------------------------------------------------------

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        failure = answer.get("exceptionDetails")
        assert failure is None, (failure or {}).get("exception", {}).get("description") or failure
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """The visible text of the first such element, '' where none is visible."""
        value: str = self.evaluate(
            f"(e => e && e.checkVisibility() ? e.innerText : '')(document.querySelector({json.dumps(selector)}))"
        )
        return value

    def until(self, expression: str, seconds: float = 20) -> Any:
        """The expression's value as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} is not true; the page says {self.text('body')!r}"
            self.browser.read_events(0.03)
        return value

    def screenshot(self, path: Path) -> None:
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.browser.close_page(self)


def _pipe() -> tuple[int, int]:
    """Above the numbers that the child's ends get, so that none is overwritten on its way there."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10) for number in low)
    for number in low:
        os.close(number)
    return high[0], high[1]
