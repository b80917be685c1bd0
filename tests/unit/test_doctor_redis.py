"""What `broker doctor` says of a Redis, from the facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.doctor.clock import judge_clocks, judge_gateway_clock
from broker.doctor.deployment import Opinion
from broker.doctor.examination import judge
from broker.doctor.finding import Finding, Severity
from broker.doctor.memory import judge_memory
from broker.doctor.persistence import judge_persistence
from broker.doctor.redis import judge_deployment, judge_server
from broker.doctor.replication import Durability, judge_cluster, judge_replication, judge_sentinels
from broker.settings import Settings
from tests.kit.doctor import deployment, replica, server, the, worst

OK, NOTE, WARNING, ERROR = Severity

SETTINGS = Settings()
FULL = {"maxmemory": 100 * 1024 * 1024, "used_memory": 99 * 1024 * 1024}


def persistence(*, holds_runs: bool = True, **facts: Any) -> list[Finding]:
    return judge_persistence(server(**facts), holds_runs=holds_runs)


def replication(durability: Durability = "fast", *, kind: str = "server", **facts: Any) -> list[Finding]:
    one = server(**facts)
    return judge_replication(one, deployment(one, kind=kind), durability)


def test_a_sound_server_has_nothing_worse_than_a_note_that_it_is_alone() -> None:
    one = server()
    found = [*judge(deployment(one), SETTINGS), *judge_clocks([one])]
    assert {finding.code for finding in found if finding.severity is not OK} == {"redis_replicas"}
    assert worst(found) is NOTE


def test_a_sound_server_with_a_replica_has_only_ok() -> None:
    one = server(info={**replica(), "min_slaves_good_slaves": 1}, config={"min-replicas-to-write": "1"}, confirmed=1)
    found = [*judge(deployment(one), Settings(durability="replicated")), *judge_clocks([one])]
    assert worst(found) is OK
    assert {"redis_version", "redis_eviction", "redis_memory", "redis_persistence", "redis_replicas"} <= {
        finding.code for finding in found
    }


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"redis_version": "6.0.20"}, ERROR),
        ({"redis_version": "5.0"}, ERROR),
        ({"redis_version": "6.2.0"}, OK),
        ({"redis_version": "10.1"}, OK),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.1"}, OK),
        ({"redis_version": "garbage"}, ERROR),
    ],
)
def test_a_server_older_than_6_2_is_an_error(info: dict[str, Any], expected: Severity) -> None:
    finding = the(judge_server(server(info=info)), "redis_version")
    assert finding.severity is expected
    assert finding.title.split()[2] == ("Valkey" if "valkey_version" in info else "Redis")


@pytest.mark.parametrize(
    ("pings", "expected"),
    [((4.9,), OK), ((5.1, 5.2, 0.1), NOTE), ((51.0,), WARNING), ((0.1, 0.1, 900.0), OK)],
)
def test_a_slow_round_trip_is_a_note_and_a_very_slow_one_a_warning(
    pings: tuple[float, ...], expected: Severity
) -> None:
    finding = the(judge_server(server(pings_ms=pings)), "redis_latency")
    assert finding.severity is expected
    assert f"{max(pings):.1f} ms" in finding.title


def test_a_user_without_INFO_is_a_warning_and_what_it_tells_is_left_out() -> None:
    found = judge(deployment(replace(server(), info=None)), SETTINGS)
    assert the(found, "redis_permissions").severity is WARNING
    assert not {finding.code for finding in found} & {"redis_version", "redis_memory", "redis_persistence"}


def test_commands_that_are_refused_are_named_in_an_error() -> None:
    finding = the(judge_server(server(refused=("WAIT", "PUBLISH sb:{*}"))), "redis_permissions")
    assert finding.severity is ERROR
    assert "WAIT" in finding.title and "PUBLISH sb:{*}" in finding.title


def test_a_server_that_refuses_writes_is_an_error_with_its_own_words() -> None:
    finding = the(judge_server(server(unwritable="MISCONF disk")), "redis_refuses_writes")
    assert finding.severity is ERROR
    assert "MISCONF disk" in finding.title


def test_a_hidden_configuration_is_a_note() -> None:
    assert the(judge_server(replace(server(), config=None)), "redis_limits").severity is NOTE


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("pubsub 0 0 0", None),
        ("pubsub 33554432 8388608 60", None),
        ("pubsub 1048576 0 0", WARNING),
        ("normal 0 0 0 pubsub 33554432 1024 60", WARNING),
        ("", None),
    ],
)
def test_a_small_buffer_for_subscribers_is_a_warning(limit: str, expected: Severity | None) -> None:
    found = judge_server(server(config={"client-output-buffer-limit": limit}))
    assert [finding.severity for finding in found if finding.code == "redis_pubsub_buffer"] == (
        [expected] if expected else []
    )


@pytest.mark.parametrize(("timeout", "told"), [("0", False), ("30", True), ("300", False)])
def test_a_short_idle_timeout_is_a_note(timeout: str, told: bool) -> None:
    found = [
        finding for finding in judge_server(server(config={"timeout": timeout})) if finding.code == "redis_timeout"
    ]
    assert [finding.severity for finding in found] == ([NOTE] if told else [])


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("Error 111 connecting to redis:6379. Connection refused.", "Check the URL"),
        ("invalid username-password pair or user is disabled.", "password"),
        ("this user has no permissions to run the 'client|setname' command", "client|setname"),
        ("certificate verify failed", "TLS"),
        ("Redis is loading the dataset in memory", "wait"),
    ],
)
def test_a_redis_that_is_away_is_one_error_with_what_to_do(failure: str, advice: str) -> None:
    [finding] = judge(deployment(failure=failure), SETTINGS)
    assert (finding.code, finding.severity) == ("redis_unreachable", ERROR)
    assert failure in finding.title and advice in finding.advice


def test_each_primary_of_a_cluster_that_is_away_is_an_error() -> None:
    found = judge_deployment(deployment(server(), kind="cluster", unreachable={"a:1": "refused", "b:2": "refused"}))
    assert [(finding.severity, finding.title[:3]) for finding in found] == [(ERROR, "a:1"), (ERROR, "b:2")]


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"maxmemory_policy": "noeviction"}, OK),
        ({"maxmemory_policy": "allkeys-lru"}, ERROR),
        ({"maxmemory_policy": "volatile-ttl", "maxmemory": 0}, WARNING),
    ],
)
def test_a_server_that_evicts_is_an_error(info: dict[str, Any], expected: Severity) -> None:
    assert the(judge_memory(server(info=info)), "redis_eviction").severity is expected


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"maxmemory": 0}, NOTE),
        ({"maxmemory": 1000 * 1024 * 1024, "used_memory": 810 * 1024 * 1024}, WARNING),
        (FULL, ERROR),
        ({"maxmemory": 1000 * 1024 * 1024, "used_memory": 790 * 1024 * 1024}, OK),
    ],
)
def test_memory_is_judged_by_its_limit(info: dict[str, Any], expected: Severity) -> None:
    assert the(judge_memory(server(info=info)), "redis_memory").severity is expected


@pytest.mark.parametrize(
    ("info", "config", "expected"),
    [
        ({}, {"appendfsync": "everysec"}, OK),
        ({}, {"appendfsync": "always"}, NOTE),
        ({}, {"appendfsync": "no"}, WARNING),
        ({"aof_enabled": 0}, {"save": "3600 1"}, WARNING),
        ({"aof_enabled": 0}, {"save": ""}, ERROR),
        ({"aof_enabled": 0, **replica()}, {"save": ""}, WARNING),
    ],
)
def test_what_outlives_a_crash_is_judged(info: dict[str, Any], config: dict[str, str], expected: Severity) -> None:
    assert the(persistence(info=info, config=config), "redis_persistence").severity is expected


def test_a_queue_without_persistence_is_only_a_note() -> None:
    assert the(persistence(holds_runs=False, info={"aof_enabled": 0}), "redis_persistence").severity is NOTE


@pytest.mark.parametrize(("seconds", "expected"), [(2, WARNING), (-1, ERROR)])
def test_where_the_configuration_is_hidden_a_snapshot_that_was_taken_tells(seconds: int, expected: Severity) -> None:
    info = {"aof_enabled": 0, "rdb_last_bgsave_time_sec": seconds}
    hidden = replace(server(info=info), config=None)
    assert the(judge_persistence(hidden, holds_runs=True), "redis_persistence").severity is expected


@pytest.mark.parametrize(
    ("info", "config", "expected"),
    [
        ({"aof_last_write_status": "err"}, {}, ERROR),
        ({"aof_last_bgrewrite_status": "err"}, {}, WARNING),
        ({"rdb_last_bgsave_status": "err"}, {"save": "3600 1"}, ERROR),
        ({"rdb_last_bgsave_status": "err"}, {"save": ""}, WARNING),
        ({"rdb_last_bgsave_status": "err"}, {"save": "3600 1", "stop-writes-on-bgsave-error": "no"}, WARNING),
    ],
)
def test_a_disk_that_fails_is_told(info: dict[str, Any], config: dict[str, str], expected: Severity) -> None:
    assert the(persistence(info=info, config=config), "redis_disk").severity is expected


def test_a_replica_in_the_place_of_the_primary_is_an_error() -> None:
    assert the(replication(info={"role": "slave"}), "redis_role").severity is ERROR


@pytest.mark.parametrize(
    ("durability", "kind", "expected"),
    [
        ("fast", "server", NOTE),
        ("fast", "sentinel", WARNING),
        ("fast", "cluster", WARNING),
        ("replicated", "server", ERROR),
    ],
)
def test_a_primary_without_a_replica(durability: Durability, kind: str, expected: Severity) -> None:
    assert the(replication(durability, kind=kind), "redis_replicas").severity is expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [({}, OK), ({"state": "wait_bgsave"}, WARNING), ({"lag": 11}, WARNING), ({"lag": 10}, OK)],
)
def test_a_replica_that_is_behind_is_a_warning(facts: dict[str, Any], expected: Severity) -> None:
    assert the(replication(info=replica(**facts)), "redis_replicas").severity is expected


@pytest.mark.parametrize(("needed", "good", "expected"), [("0", 1, WARNING), ("1", 1, OK), ("2", 1, ERROR)])
def test_a_primary_that_writes_on_without_replicas_is_a_warning(needed: str, good: int, expected: Severity) -> None:
    found = replication(info={**replica(), "min_slaves_good_slaves": good}, config={"min-replicas-to-write": needed})
    assert the(found, "redis_split_brain").severity is expected


def test_replicated_runs_need_a_replica_that_confirms() -> None:
    assert the(replication("replicated", info=replica(), confirmed=0), "redis_replicas").severity is ERROR
    assert the(replication("replicated", info=replica(), confirmed=1), "redis_replicas").severity is OK
    assert the(replication("fast", info=replica(), confirmed=0), "redis_replicas").severity is OK


def test_sentinels_that_are_silent_or_disagree_or_are_too_few_are_warnings() -> None:
    agreeing = dict.fromkeys(("s1", "s2", "s3"), Opinion("redis:6379"))
    assert worst(judge_sentinels(deployment(kind="sentinel", sentinels=agreeing))) is OK
    [silent] = judge_sentinels(deployment(kind="sentinel", sentinels={**agreeing, "s3": Opinion(failure="refused")}))
    assert silent.severity is WARNING and "s3" in silent.title and "refused" in silent.title
    [disagree] = judge_sentinels(deployment(kind="sentinel", sentinels={**agreeing, "s3": Opinion("other:6379")}))
    assert disagree.severity is WARNING and "other:6379" in disagree.title
    [few] = judge_sentinels(deployment(kind="sentinel", sentinels={"s1": Opinion("redis:6379")}))
    assert few.severity is WARNING
    assert judge_sentinels(deployment(server())) == []


def test_slots_without_a_primary_are_an_error() -> None:
    assert the(judge_cluster(deployment(server(), kind="cluster")), "redis_slots").severity is OK
    assert the(judge_cluster(deployment(server(), kind="cluster", uncovered_slots=3)), "redis_slots").severity is ERROR
    assert judge_cluster(deployment(kind="cluster", failure="away")) == judge_cluster(deployment(server())) == []


@pytest.mark.parametrize(
    ("clock_ms", "error_ms", "expected"),
    [(0, 0, OK), (-600, 0, NOTE), (2100, 0, ERROR), (-2100, 0, ERROR), (2100, 2000, OK)],
)
def test_a_clock_that_is_off_is_an_error_unless_the_way_explains_it(
    clock_ms: float, error_ms: float, expected: Severity
) -> None:
    assert worst(judge_clocks([server(clock_ms=clock_ms, clock_error_ms=error_ms)])) is expected


def test_servers_must_agree_with_each_other() -> None:
    found = judge_clocks([server(name="a", clock_ms=-1500), server(name="b", clock_ms=1500)])
    [apart] = [finding for finding in found if finding.severity is ERROR]
    assert "a and b" in apart.title


def test_servers_whose_distance_explains_their_clocks_are_fine() -> None:
    far: dict[str, Any] = {"clock_error_ms": 1500}
    assert worst(judge_clocks([server(name="a", clock_ms=-1500, **far), server(name="b", clock_ms=1500, **far)])) is OK


@given(st.lists(st.floats(-400, 400), min_size=1, max_size=5))
def test_clocks_that_are_close_to_ours_are_never_complained_of(offsets: list[float]) -> None:
    assert worst(judge_clocks([server(clock_ms=offset) for offset in offsets])) is OK


@pytest.mark.parametrize(("ahead", "expected"), [(0.4, OK), (-2.9, OK), (3.1, WARNING), (-60, WARNING)])
def test_the_gateway_s_clock_is_judged_by_its_date(ahead: float, expected: Severity) -> None:
    assert judge_gateway_clock(ahead).severity is expected
