"""Messages as bytes: each is a pickle behind its length.

A pickle runs code when it is read. These go between a worker and the processes that it has started, over a socket that
has no name and that nobody else can open. And a worker reads less than a process may write: of classes nothing but the
messages that come from there, so that an agent's own objects, and the modules they are from, never get into it.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any, NamedTuple

from worker.processes import messages

_LENGTH = struct.Struct("!I")
_UPWARD = {kind.__name__: kind for kind in messages.UPWARD}


def encode(message: NamedTuple) -> bytes:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class Decoder:
    """Takes bytes as they come. `upward`: they come from an agent process."""

    def __init__(self, *, upward: bool) -> None:
        self._upward = upward
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are whole now. Raises pickle.UnpicklingError for what is not allowed."""
        self._bytes += data
        found = []
        at = 0
        while len(self._bytes) - at >= _LENGTH.size:
            [length] = _LENGTH.unpack_from(self._bytes, at)
            end = at + _LENGTH.size + length
            if len(self._bytes) < end:
                break
            found.append(self._load(bytes(self._bytes[at + _LENGTH.size : end])))
            at = end
        del self._bytes[:at]
        return found

    def _load(self, data: bytes) -> Any:
        return _Upward(io.BytesIO(data)).load() if self._upward else pickle.loads(data)


class _Upward(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == messages.__name__ and name in _UPWARD:
            return _UPWARD[name]
        raise pickle.UnpicklingError(f"{module}.{name} does not come from an agent process")
