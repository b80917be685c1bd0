"""Which primary has which slot, by what a node of a Cluster says; and which slot a command needs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import ClusterDownError

from broker.ids import Owner
from broker.redis_url import Address
from broker.runs import keys
from broker.runs.layout import NOTHING, SLOTS, Layout, parse, slot_of, slot_of_key

HERE = ("10.0.0.9", 7000)
A, B, C, D = (("10.0.0.1", port) for port in (1, 2, 3, 4))


def row(first: int, last: int, *nodes: Address) -> list[Any]:
    return [first, last, *([host.encode(), port, b"id"] for host, port in nodes)]


def layout(*rows: list[Any], before: Layout = NOTHING) -> Layout:
    return parse(rows, HERE, before)


THREE = (row(0, 5460, A, D), row(5461, 10922, B), row(10923, 16383, C))


def test_every_slot_has_the_primary_that_is_first_in_its_row() -> None:
    found = layout(*THREE)
    assert [found.owner(slot) for slot in (0, 5460, 5461, 10922, 10923, 16383)] == [A, A, B, B, C, C]
    assert found.covered == SLOTS
    assert found.replicas == (D,)


def test_a_slot_without_a_primary_is_an_error_that_passes() -> None:
    found = layout(row(0, 99, A))
    assert found.covered == 100
    with pytest.raises(ClusterDownError):
        found.owner(100)
    with pytest.raises(ClusterDownError):
        NOTHING.owner(0)


@pytest.mark.parametrize("host", [b"", None, b"?"])
def test_a_node_that_does_not_tell_its_address_is_where_it_was_asked(host: bytes | None) -> None:
    assert layout([0, 1, [host, 5, b"id"]]).owner(0) == ("10.0.0.9", 5)


def test_a_shard_is_named_after_its_first_primary_and_keeps_its_name() -> None:
    first = layout(*THREE)
    assert first.names == {A: "10.0.0.1:1", B: "10.0.0.1:2", C: "10.0.0.1:3"}
    moved = layout(row(0, 100, B), row(101, 5460, A), *THREE[1:], before=first)
    assert moved.names == first.names
    failed_over = layout(row(0, 100, B), row(101, 5460, D), *THREE[1:], before=moved)
    assert failed_over.names == {D: "10.0.0.1:1", B: "10.0.0.1:2", C: "10.0.0.1:3"}
    back = layout(row(0, 100, B), row(101, 5460, A), *THREE[1:], before=failed_over)
    assert back.names == first.names


def test_no_two_shards_have_one_name() -> None:
    """The first primary of a shard comes back as the primary of another one."""
    failed_over = layout(row(0, 5460, D), *THREE[1:], before=layout(*THREE))
    found = layout(row(0, 100, A), row(101, 5460, D), *THREE[1:], before=failed_over)
    assert found.names[D] == "10.0.0.1:1"
    assert len(set(found.names.values())) == 4


def test_two_shards_that_become_one_have_one_name() -> None:
    found = layout(row(0, 10922, D), THREE[2], before=layout(*THREE))
    assert found.names == {D: "10.0.0.1:1", C: "10.0.0.1:3"}


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=8))
def test_names_are_unique_and_every_primary_has_one(history: list[list[int]]) -> None:
    found = NOTHING
    for owners in history:
        size = SLOTS // len(owners)
        rows = [row(n * size, n * size + size - 1, ("10.0.0.1", port)) for n, port in enumerate(owners)]
        before, found = found, layout(*rows, before=found)
        assert set(found.names) == {("10.0.0.1", port) for port in owners}
        assert len(set(found.names.values())) == len(found.names)
        for address, name in found.names.items():
            assert before.names.get(address, name) == name, "a primary that stays keeps its name"


RUN = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    "command",
    [
        ("HMGET", keys.run(RUN), "status"),
        ("XRANGE", keys.log(RUN).encode(), "-", "+"),
        ("EVALSHA", "sha", 2, keys.run(RUN), keys.log(RUN), "PUBLISH"),
        ("EVAL", "return 1", 1, keys.run(RUN)),
        ("SPUBLISH", keys.channel(RUN), "x"),
        ("SET", keys.control(RUN), "x"),
    ],
)
def test_all_that_belongs_to_a_run_is_in_one_slot(command: tuple[Any, ...]) -> None:
    assert slot_of(command) == slot_of_key(RUN)


@pytest.mark.parametrize("key", [keys.run(RUN), keys.log(RUN), keys.idempotency(Owner("a", "b"), "key", "x"), "k"])
def test_a_key_beside_another_is_in_its_slot(key: str) -> None:
    assert slot_of_key(keys.beside(key)) == slot_of_key(key)
    assert keys.beside(key) != key


def test_slots_are_those_of_redis() -> None:
    assert slot_of_key("foo") == 12182
    assert slot_of_key("a{foo}b") == 12182
    assert slot_of_key("\udcff") == slot_of(("GET", b"\xff"))


@pytest.mark.parametrize("command", [("PING",), ("TIME",), ("WAIT", 1, 100), ("SCRIPT LOAD", "return 1")])
def test_some_commands_have_no_key(command: tuple[Any, ...]) -> None:
    assert slot_of(command) is None
