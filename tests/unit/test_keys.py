"""Names in Redis."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.crc import key_slot

from broker.ids import Owner, new_request_id
from broker.runs import keys
from broker.runs.scripts import Scripts
from tests.kit.redis_server import RedisServer
from tests.kit.runs import FINAL, RETENTION_MS, append, cancel, claim, queued, running, words

TEXT = st.text(max_size=20)


def test_all_that_a_run_has_is_in_one_slot() -> None:
    slots = set()
    for _ in range(50):
        request_id = new_request_id()
        names = [make(request_id).encode() for make in (keys.run, keys.log, keys.channel, keys.control)]
        assert len(set(names)) == 4
        assert len({key_slot(name) for name in names}) == 1
        slots.add(key_slot(names[0]))
    assert len(slots) > 40, "runs are spread over the slots"


def test_a_channel_and_a_control_channel_name_their_run() -> None:
    request_id = new_request_id()
    assert keys.request_id_of(keys.channel(request_id)) == request_id
    assert keys.request_id_of(keys.control(request_id)) == request_id


@given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["key", "query"]), TEXT), min_size=2, max_size=2, unique=True))
def test_no_owner_and_no_key_can_be_written_so_that_it_is_anothers(parts: list[tuple[str, str, str, str]]) -> None:
    one, two = (keys.idempotency(Owner(tenant, subject), kind, value) for tenant, subject, kind, value in parts)
    assert one != two


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=2, max_size=2, unique=True))
def test_no_session_can_be_written_so_that_it_is_anothers(parts: list[tuple[str, str, str]]) -> None:
    one, two = (keys.session_of(Owner(tenant, subject), session) for tenant, subject, session in parts)
    assert one != two
    owners = {Owner(tenant, subject) for tenant, subject, _ in parts}
    assert len({keys.runs_of(owner) for owner in owners}) == len(owners)


def test_names_hold_nothing_of_what_they_stand_for() -> None:
    """What a user typed can be long, or hold braces, which would choose the slot."""
    owner = Owner("tenant{x}", "subject{y}")
    long = "secret {z} " * 1000 + "\udc00"
    for name in (keys.idempotency(owner, "key", long), keys.session_of(owner, long), keys.runs_of(owner)):
        assert len(name) < 200
        assert name.isascii()
        assert "{" not in name
        assert "secret" not in name


async def test_no_script_touches_a_key_that_it_does_not_declare(redis: Redis, redis_server: RedisServer) -> None:
    """PROTOCOL 1.1: on a Cluster each of them is atomic only within the run's slot."""
    scripts = Scripts(redis)
    with redis_server.client() as client, client.monitor() as monitor:
        lease = await running(scripts)
        await append(scripts, lease, 2, *words("a"), checkpoint=(lease.resume_from, 1))
        await append(scripts, lease, 3)
        await append(scripts, lease, 3, FINAL)
        cancelled = await queued(scripts)
        await cancel(scripts, cancelled)
        erased = await claim(scripts, await queued(scripts))
        await scripts.erase(erased.request_id, tombstone_ms=RETENTION_MS)
        await redis.ping()
        seen = list[str]()
        while (command := monitor.next_command())["command"] != "PING":
            if command["client_type"] == "lua":
                seen.append(command["command"])
    request_ids = (lease.request_id, cancelled, erased.request_id)
    names = {make(request_id) for make in (keys.run, keys.log) for request_id in request_ids}
    touched = {command.split(" ")[1] for command in seen if not command.startswith(("PUBLISH ", "TIME"))}
    assert touched == names
    channels = {command.split(" ")[1] for command in seen if command.startswith("PUBLISH ")}
    assert channels <= {make(request_id) for make in (keys.channel, keys.control) for request_id in request_ids}
    assert len(seen) > 30
