"""A TCP proxy with the faults of a network: delays, silence, resets, replies that get lost, and another server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from broker.runs.scripts import source

T = TypeVar("T")
Command = list[bytes]
Fate = Literal["passes", "lost before", "lost after", "struck before", "struck after"]
"""Of a command: it passes, or its connection is reset before it reached Redis, or in place of its reply. A strike does
something else beside that.
"""


def script_sha(name: str) -> bytes:
    """By which EVALSHA calls the run's script of this name."""
    return hashlib.sha1(source(name).encode("utf-8")).hexdigest().encode("ascii")


def calls(name: str) -> Callable[[Command], bool]:
    """Matches the calls of one of the run's scripts."""
    sha = script_sha(name)
    return lambda command: command[0].upper() == b"EVALSHA" and command[1] == sha


class Proxy:
    """Commands pass one at a time for each connection, so that each reply is known by its command.

    A connection that subscribes is passed through as it is from then on; with `raw` every connection is, and so may be
    of any protocol: replication, HTTP. `listen` is the port, where it shall be a certain one. `enter` is called first
    in the thread that makes the connections to `port` (netns.Namespace.enter). All methods may be called from any
    thread.
    """

    def __init__(
        self, port: int, *, raw: bool = False, listen: int = 0, enter: Callable[[], None] | None = None
    ) -> None:
        self._upstream = port
        self._raw = raw
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=[enter], name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._delay = 0.0
        self._refusing = False
        self._matches: Callable[[Command], bool] | None = None
        self._every = 1
        self._before = False
        self._chance = random.Random(0)
        self._share = 0.0
        self.matched = 0
        """Commands that matched since `swallow`."""
        self.swallowed = 0
        """Replies of them that were lost."""
        self.torn = 0
        """Connections that were reset since `reset_at_random`."""
        self._strikes: Callable[[Command], bool] | None = None
        self._strike: Fate = "struck after"
        self._action: Callable[[], None] = lambda: None
        self._nth = 0
        listener = socket.create_server(("127.0.0.1", listen), backlog=1024)
        self.port: int = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self._thread.start()
        self._server = self._call(self._start(listener))

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, enter: Callable[[], None] | None) -> None:
        if enter is not None:
            enter()
        self._loop.run_forever()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self, listener: socket.socket) -> asyncio.Server:
        self._passing.set()
        return await asyncio.start_server(self._accepted, sock=listener)

    # -- faults ----------------------------------------------------------------------------------------------

    def delay(self, seconds: float) -> None:
        """Each reply is held for this long, and each first SUBSCRIBE. With `raw`: each piece that comes back."""
        self._delay = seconds

    def pause(self) -> None:
        """Nothing passes, either way; connections stay open, and new ones are accepted."""
        self._loop.call_soon_threadsafe(self._passing.clear)

    def resume(self) -> None:
        self._loop.call_soon_threadsafe(self._passing.set)

    def forget(self) -> None:
        """Connections that are open stay so, and silent for ever, as after a lost NAT entry; new ones pass."""

        async def forget() -> None:
            self._passing.clear()
            self._passing = asyncio.Event()
            self._passing.set()

        self._call(forget())

    def refuse(self) -> None:
        """Resets every connection, and every one to come."""
        self._refusing = True
        self.reset()

    def accept(self) -> None:
        self._refusing = False

    def point_to(self, port: int) -> None:
        """Resets every connection; new ones lead to `port`."""
        self._upstream = port
        self.reset()

    def reset(self) -> None:
        """Resets every connection."""

        async def reset() -> None:
            for writer in tuple(self._writers):
                _reset(writer)

        self._call(reset())

    def swallow(self, matches: Callable[[Command], bool], *, every: int = 1, before: bool = False) -> None:
        """Of each `every`-th command that matches, the reply is lost: the connection is reset instead.

        With `before` the command itself is lost, and Redis never sees it.
        """
        self.matched = self.swallowed = 0
        self._every, self._before = every, before
        self._matches = matches

    def strike(
        self, nth: int, action: Callable[[], None], *, matches: Callable[[Command], bool] = any, before: bool = False
    ) -> None:
        """Of the commands that match, the `nth` from now on is lost with its connection, and `action` is called, in the
        proxy's thread: in place of the reply, or with `before` in place of the command, which Redis never sees then.
        """
        self._nth, self._action = nth, action
        self._strike = "struck before" if before else "struck after"
        self._strikes = matches

    def reset_at_random(self, chance: random.Random, share: float) -> None:
        """Each command, and each piece of what passes through, is lost with this probability: its connection is reset.

        Of the commands that are lost, Redis has executed every second one, about.
        """
        self.torn = 0
        self._chance, self._share = chance, share

    def heal(self) -> None:
        """No fault any more."""
        self._matches, self._strikes, self._delay, self._refusing, self._share = None, None, 0.0, False, 0.0
        self.resume()

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for writer in tuple(self._writers):
                _reset(writer)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._call(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- connections -----------------------------------------------------------------------------------------

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if not self._refusing:
                await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing = self._passing
        await passing.wait()
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._upstream, limit=2**26)
        try:
            if not self._raw:
                await self._commands(passing, reader, writer, upstream_reader, upstream)
            await self._pass_through(passing, reader, writer, upstream_reader, upstream)
        except (OSError, asyncio.IncompleteReadError):
            await passing.wait()  # over a silent link nobody hears that the other end is gone
            raise
        finally:
            upstream.transport.abort()

    async def _commands(
        self,
        passing: asyncio.Event,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream_reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        """Until the connection subscribes. Raises ConnectionResetError where one is to be lost."""
        while True:
            command, raw = await _command(reader)
            await passing.wait()
            if command[0].upper() in (b"SUBSCRIBE", b"SSUBSCRIBE", b"PSUBSCRIBE", b"MONITOR"):
                if self._delay:
                    await asyncio.sleep(self._delay)
                upstream.write(raw)
                return
            fate = self._fate(command)
            if fate == "struck before":
                self._action()
            if fate in ("lost before", "struck before"):
                raise ConnectionResetError
            upstream.write(raw)
            reply = await _reply(upstream_reader)
            if fate == "struck after":
                self._action()
            if fate in ("lost after", "struck after"):
                raise ConnectionResetError
            if self._delay:
                await asyncio.sleep(self._delay)
            await passing.wait()
            writer.write(reply)
            await writer.drain()

    def _fate(self, command: Command) -> Fate:
        if self._matches is not None and self._matches(command):
            self.matched += 1
            if self.matched % self._every == 0:
                self.swallowed += 1
                return "lost before" if self._before else "lost after"
        if self._strikes is not None and self._strikes(command):
            self._nth -= 1
            if self._nth == 0:
                return self._strike
        if self._is_torn():
            return self._chance.choice(("lost before", "lost after"))
        return "passes"

    def _is_torn(self) -> bool:
        torn = self._share > 0 and self._chance.random() < self._share
        self.torn += torn
        return torn

    async def _pass_through(
        self,
        passing: asyncio.Event,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream_reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        """Until both ends have closed their halves. Raises OSError where either resets, or the proxy does."""
        ways = [
            asyncio.create_task(self._pipe(passing, reader, upstream, held=False)),
            asyncio.create_task(self._pipe(passing, upstream_reader, writer, held=self._raw)),
        ]
        try:
            await asyncio.gather(*ways)
            writer.close()
            await writer.wait_closed()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pipe(
        self, passing: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, held: bool
    ) -> None:
        """`held`: by the delay."""
        while data := await reader.read(2**16):
            if held and self._delay:
                await asyncio.sleep(self._delay)
            await passing.wait()
            if self._is_torn():
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        await passing.wait()
        writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST, not FIN: what a lost NAT entry or a killed load balancer sends."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.transport.is_closing():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _command(reader: asyncio.StreamReader) -> tuple[Command, bytes]:
    """The next command: an array of bulk strings, and the bytes that it came in."""
    head = await reader.readuntil(b"\r\n")
    assert head[:1] == b"*", head
    parts, raw = [], [head]
    for _ in range(int(head[1:])):
        length = await reader.readuntil(b"\r\n")
        body = await reader.readexactly(int(length[1:]) + 2)
        parts.append(body[:-2])
        raw += [length, body]
    return parts, b"".join(raw)


async def _reply(reader: asyncio.StreamReader) -> bytes:
    """The bytes of the next RESP2 reply."""
    head = await reader.readuntil(b"\r\n")
    kind, count = head[:1], head[1:-2]
    if kind == b"$" and count != b"-1":
        return head + await reader.readexactly(int(count) + 2)
    if kind == b"*" and count != b"-1":
        return head + b"".join([await _reply(reader) for _ in range(int(count))])
    return head
