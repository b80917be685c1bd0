"""A command in a pseudo-terminal of its own, as in a terminal window: what it shows, and keys that are typed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Sequence

from tests.kit.display import Display
from tests.kit.processes import wait_for

CTRL_C = "\x03"


class Terminal:
    """Ctrl-C is a SIGINT from the terminal's line discipline to the group in its foreground, as it is for users."""

    def __init__(self, command: Sequence[str], env: dict[str, str], *, columns: int = 80, rows: int = 24) -> None:
        self._master, slave = os.openpty()
        self._lock = threading.Lock()
        self.display = Display(columns)
        self.raw = b""
        self.broken: BaseException | None = None
        self.resize(columns, rows)
        self.popen = subprocess.Popen(
            # The first terminal that the leader of a session opens becomes the session's own.
            ["/bin/sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave), *command],
            env={"TERM": "xterm-256color", **env},
            start_new_session=True,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, name="terminal", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: nobody has the terminal open, not yet or no more
                if self.popen.poll() is not None:
                    return
                time.sleep(0.01)
                continue
            if not data:
                return
            with self._lock:
                self.raw += data
                try:
                    self.display.feed(data)
                except BaseException as error:
                    self.broken = error
                    return

    def resize(self, columns: int, rows: int = 24) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    @property
    def text(self) -> str:
        """What stands on it now. Raises where it got something that is not fit for a terminal."""
        with self._lock:
            if self.broken is not None:
                raise self.broken
            return self.display.text

    @property
    def erased(self) -> list[str]:
        with self._lock:
            return list(self.display.erased)

    def shows(self, text: str, seconds: float = 20) -> None:
        """Waits until it does."""
        try:
            wait_for(lambda: text in self.text, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{text!r} is not on the terminal:\n{self.text}") from error

    def wait(self, seconds: float = 20) -> int:
        """The exit code, when everything that was written has been read."""
        code = self.popen.wait(seconds)
        self._reader.join(seconds)
        return code

    def close(self) -> None:
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.popen.send_signal(signal.SIGKILL)
            self.popen.wait()
        self._reader.join(5)
        os.close(self._master)
