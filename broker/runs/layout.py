"""Which primary of a Cluster has which slot, and which slot a command needs. No I/O happens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.crc import key_slot
from redis.exceptions import ClusterDownError

from broker.redis_url import Address

SLOTS = 16384

_WITHOUT_KEY = {"PING", "TIME", "WAIT", "SCRIPT LOAD"}
_SCRIPTS = {"EVAL", "EVALSHA"}


def slot_of_key(key: str) -> int:
    slot: int = key_slot(key.encode("utf-8", "surrogateescape"))
    return slot


def slot_of(command: Sequence[Any]) -> int | None:
    """Of the key that it names first; None where it names none."""
    name = command[0]
    if name in _WITHOUT_KEY:
        return None
    key = command[3] if name in _SCRIPTS else command[1]
    return slot_of_key(key if isinstance(key, str) else key.decode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Layout:
    owners: Sequence[Address | None]
    """The primary of each slot; None where it has none."""
    names: dict[Address, str]
    """The shards' names, by their primaries."""
    replicas: tuple[Address, ...]

    def owner(self, slot: int) -> Address:
        owner = self.owners[slot]
        if owner is None:
            raise ClusterDownError(f"no node has the slot {slot}")  # type: ignore[no-untyped-call]
        return owner

    @property
    def covered(self) -> int:
        """How many slots have a primary."""
        return SLOTS - self.owners.count(None)


NOTHING = Layout([None] * SLOTS, {}, ())


def parse(rows: Sequence[Sequence[Any]], asked: Address, before: Layout = NOTHING) -> Layout:
    """The reply to CLUSTER SLOTS of the node `asked`: [first, last, [host, port, …], replicas…], …

    A shard is named after the first primary that it is seen with, and keeps its name when another one takes over.
    """
    owners: list[Address | None] = [None] * SLOTS
    replicas: dict[Address, None] = {}
    for first, last, primary, *others in rows:
        owners[first : last + 1] = [_address(primary, asked)] * (last + 1 - first)
        replicas.update(dict.fromkeys(_address(other, asked) for other in others))
    return Layout(owners, _names(owners, before), tuple(replicas))


def _address(node: Sequence[Any], asked: Address) -> Address:
    """A node that does not know its own address, or may not tell, is where it was asked."""
    host = node[0].decode() if node[0] else ""
    return (asked[0] if host in ("", "?") else host), int(node[1])


def _names(owners: Sequence[Address | None], before: Layout) -> dict[Address, str]:
    primaries = [owner for owner in dict.fromkeys(owners) if owner is not None]
    names = {primary: before.names[primary] for primary in primaries if primary in before.names}
    if len(names) == len(primaries):
        return names
    heirs: dict[Address, Address] = {}
    for heir, old in zip(owners, before.owners, strict=True):
        if heir is not None and heir not in names and old is not None and old not in primaries:
            heirs.setdefault(heir, old)
    for primary in primaries:
        if primary not in names:
            heritage = before.names.get(heirs.get(primary, primary))
            name = heritage or f"{primary[0]}:{primary[1]}"
            while name in names.values():
                name += "'"
            names[primary] = name
    return names
