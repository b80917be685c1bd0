"""`broker doctor` on real servers, good and bad ones: what is wrong is found, and what is fine is left alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from broker.doctor.finding import Finding, Severity
from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.cluster import Cluster
from tests.kit.command import broker, here
from tests.kit.doctor import diagnosis, the, worst
from tests.kit.http import Client
from tests.kit.processes import SECRET, environment, wait_for
from tests.kit.redis_server import RedisServer, free_port, redis_6_2
from tests.kit.sentinel import Sentinels
from tests.kit.terminal import Terminal
from tests.security.issuer import RSA_KEY, Issuer, jwk

OK, NOTE, WARNING, ERROR = Severity
LIMIT = ("--maxmemory", "512mb")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """As a production server should be, but alone."""
    server = RedisServer(tmp_path_factory.mktemp("redis"), *LIMIT)
    try:
        yield server.start()
    finally:
        server.close()


def doctor(redis_url: str, **settings: Any) -> list[Finding]:
    return diagnosis(here("doctor", "--json", **{"redis_url": redis_url, **settings}))


def complaints(findings: list[Finding]) -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in findings if finding.severity > NOTE}


def with_user(server: RedisServer, *rights: str) -> str:
    """The URL of a user that has them."""
    name = f"user{len(server.ask('ACL', 'USERS'))}"
    server.ask("ACL", "SETUSER", name, "on", ">a-long-password", *rights)
    return server.url.replace("redis://", f"redis://{name}:a-long-password@")


# -- a sound deployment ----------------------------------------------------------------------------------------------


def test_a_sound_deployment_is_left_alone(launch: Launcher, sound: RedisServer) -> None:
    sound.ask("FLUSHALL")
    launch.worker(sound.url)
    wait_for(lambda: the(doctor(sound.url), "workers").severity is OK)
    done = here("doctor", redis_url=sound.url)
    assert done.returncode == 0, done.stdout
    assert complaints(doctor(sound.url)) == {}
    assert "1 note" in done.stdout  # it has no replica
    assert "[redis_replicas]" in done.stdout


def test_it_leaves_nothing_behind_in_redis(sound: RedisServer) -> None:
    sound.ask("FLUSHALL")
    doctor(sound.url)
    assert sound.ask("KEYS", "*") == []


def test_it_never_prints_a_secret(launch: Launcher) -> None:
    server = launch.redis()
    server.ask("CONFIG", "SET", "requirepass", "pelican-and-heron")
    server.url = server.url.replace("://", "://:pelican-and-heron@")
    for url in (server.url, server.url.replace("pelican", "ostrich")):
        for options in ((), ("--json",)):
            done = here("doctor", *options, redis_url=url)
            for secret in ("pelican", "ostrich", SECRET):
                assert secret not in done.stdout + done.stderr
    assert done.returncode == 2


def test_the_oldest_redis_that_we_promise_is_fine(launch: Launcher) -> None:
    binary = redis_6_2()
    if binary is None:
        pytest.skip("no redis-server 6.2")
    findings = doctor(launch.redis(*LIMIT, binary=binary).url)
    assert complaints(findings) == {"workers": WARNING}
    assert "6.2" in the(findings, "redis_version").title


@pytest.mark.parametrize(("columns", "no_color"), [(80, False), (80, True), (30, False)])
def test_on_a_terminal_marks_have_colors_and_lines_keep_to_its_width(columns: int, no_color: bool) -> None:
    env = environment(f"redis://127.0.0.1:{free_port()}", auth="none")
    env = {name: value for name, value in env.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    command = [sys.executable, "-m", "broker", "doctor"]
    terminal = Terminal(command, env | ({"NO_COLOR": "1"} if no_color else {}), columns=columns)
    try:
        assert terminal.wait() == 2
        assert (b"\x1b[" in terminal.raw) is not no_color
        plain = click.unstyle(terminal.raw.decode())
    finally:
        terminal.close()
    assert "warning  BROKER_AUTH=none" in plain
    assert "1 error, 1 warning, 1 note" in plain
    assert [line for line in plain.splitlines() if len(line) > max(columns, 40)] == []


# -- Redis -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        ((*LIMIT, "--maxmemory-policy", "allkeys-lru"), "redis_eviction", ERROR),
        (("--maxmemory", "1mb"), "redis_memory", ERROR),
        ((*LIMIT, "--appendonly", "no"), "redis_persistence", ERROR),
        ((*LIMIT, "--appendonly", "no", "--save", "3600 1"), "redis_persistence", WARNING),
        ((*LIMIT, "--appendfsync", "no"), "redis_persistence", WARNING),
        ((*LIMIT, "--client-output-buffer-limit", "pubsub 1mb 1mb 60"), "redis_pubsub_buffer", WARNING),
        ((*LIMIT, "--min-replicas-to-write", "1"), "redis_refuses_writes", ERROR),
        ((*LIMIT, "--rename-command", "WAIT", "nowait"), "redis_permissions", ERROR),
    ],
)
def test_a_server_that_is_set_up_badly_is_found(
    launch: Launcher, options: tuple[str, ...], code: str, expected: Severity
) -> None:
    findings = doctor(launch.redis(*options).url)
    assert the(findings, code).severity is expected
    assert {name for name in complaints(findings) if name not in ("workers", "redis_refuses_writes")} <= {code}


def test_a_redis_that_is_down_is_one_error_and_what_depends_on_it_is_skipped() -> None:
    findings = doctor(f"redis://127.0.0.1:{free_port()}")
    assert complaints(findings) == {"redis_unreachable": ERROR}
    assert "not checked" in the(findings, "queue").title


def test_a_queue_that_is_down_does_not_hide_the_runs(sound: RedisServer) -> None:
    findings = doctor(sound.url, queue_redis_url=f"redis://127.0.0.1:{free_port()}")
    assert complaints(findings) == {"redis_unreachable": ERROR}
    assert the(findings, "redis_persistence").severity is OK


def test_a_replica_is_looked_at_and_min_replicas_asked_for(launch: Launcher) -> None:
    primary, replica = launch.redis(*LIMIT), launch.redis(*LIMIT)
    replica.replicate(primary.port)
    wait_for(lambda: replica.synchronised)
    wait_for(lambda: the(doctor(primary.url), "redis_replicas").severity is OK)
    assert the(doctor(primary.url), "redis_split_brain").severity is WARNING
    primary.ask("CONFIG", "SET", "min-replicas-to-write", 1)
    assert complaints(doctor(primary.url, durability="replicated")) == {"workers": WARNING}
    replica.pause()
    try:
        assert the(doctor(primary.url, durability="replicated"), "redis_replicas").severity is ERROR
    finally:
        replica.resume()
    assert the(doctor(replica.url), "redis_role").severity is ERROR


def test_replicated_without_a_replica_is_an_error(sound: RedisServer) -> None:
    assert the(doctor(sound.url, durability="replicated"), "redis_replicas").severity is ERROR


def test_a_user_without_info_is_told_what_that_costs(sound: RedisServer) -> None:
    url = with_user(sound, "~sb:*", "~arq:*", "&sb:*", "+@all", "-info")
    findings = doctor(url)
    assert complaints(findings) == {"redis_permissions": WARNING, "workers": WARNING}
    assert "INFO" in the(findings, "redis_permissions").title


@pytest.mark.parametrize(
    ("rights", "named"),
    [
        (("~sb:*", "~arq:*", "&sb:*", "+@all", "-publish", "-wait"), ["PUBLISH sb:{*}", "WAIT"]),
        (("~sb:*", "&sb:*", "+@all"), ["SET arq:job:*", "DEL arq:job:*", "WATCH, MULTI, EXEC"]),
        (("~*", "&other:*", "+@all"), ["PUBLISH sb:{*}", "SUBSCRIBE sb:{*}"]),
        (("~*", "&*", "+@all", "-@scripting"), ["SCRIPT LOAD", "EVALSHA"]),
    ],
)
def test_a_user_that_lacks_rights_is_told_which(sound: RedisServer, rights: tuple[str, ...], named: list[str]) -> None:
    finding = the(doctor(with_user(sound, *rights)), "redis_permissions")
    assert finding.severity is ERROR
    for command in named:
        assert command in finding.title, finding.title


def test_a_user_with_just_our_rights_lacks_nothing(sound: RedisServer) -> None:
    url = with_user(sound, "~sb:*", "~arq:*", "&sb:*", "+@all", "-@dangerous", "+info", "+config|get")
    assert complaints(doctor(url)) == {"workers": WARNING}


def test_a_user_that_may_not_connect_as_we_do_is_told_what_it_lacks(sound: RedisServer) -> None:
    finding = the(doctor(with_user(sound, "~*", "&*", "+@all", "-client|setname")), "redis_unreachable")
    assert "client|setname" in finding.title and "+client|setname" in finding.advice


def test_a_server_that_stands_still_is_one_error(launch: Launcher) -> None:
    server = launch.redis(*LIMIT)
    server.pause()
    findings = doctor(f"{server.url}?socket_timeout=1&socket_connect_timeout=1")
    assert complaints(findings) == {"redis_unreachable": ERROR}


async def test_a_sentinel_that_is_away_is_found(tmp_path: Path) -> None:
    async with Sentinels(tmp_path) as sentinels:
        url = sentinels.url
        findings = await asyncio.to_thread(lambda: diagnosis(broker("doctor", "--json", redis_url=url)))
        assert complaints(findings) == {"redis_split_brain": WARNING, "workers": WARNING}
        assert the(findings, "redis_sentinels").severity is OK
        sentinels.sentinels[2].kill()
        findings = await asyncio.to_thread(lambda: diagnosis(broker("doctor", "--json", redis_url=url)))
        finding = the(findings, "redis_sentinels")
        assert finding.severity is WARNING and str(sentinels.sentinels[2].port) in finding.title


async def test_every_primary_of_a_cluster_is_looked_at(tmp_path: Path, sound: RedisServer) -> None:
    async with Cluster(tmp_path, replicas=0) as cluster:

        def look() -> list[Finding]:
            return diagnosis(broker("doctor", "--json", redis_url=cluster.url, queue_redis_url=sound.url))

        findings = await asyncio.to_thread(look)
        assert the(findings, "redis_slots").severity is OK
        assert len([finding for finding in findings if finding.code == "redis_version"]) == 4
        assert complaints(findings) == {"redis_replicas": WARNING, "workers": WARNING}


# -- the queue and its workers ---------------------------------------------------------------------------------------


def test_runs_that_nobody_takes_are_found(launch: Launcher) -> None:
    server = launch.redis(*LIMIT)
    gateway = launch.gateway(server.url)
    with Client(gateway.url) as client:
        client.submit("one")
    findings = doctor(server.url)
    assert the(findings, "workers").severity is ERROR
    assert the(findings, "queue").title.startswith("1 run in the queue")


def test_runs_whose_worker_died_are_found_by_their_names(launch: Launcher) -> None:
    server = launch.redis(*LIMIT)
    gateway = launch.gateway(server.url, lease_seconds=1)
    worker = launch.worker(server.url, lease_seconds=1)
    with Client(gateway.url) as client:
        request_id = client.submit("one", agent="hangs")
        wait_for(lambda: client.run(request_id)["status"] == "running")
    worker.kill()

    def abandoned() -> bool:
        finding = the(doctor(server.url, lease_seconds=1), "runs_without_worker")
        return finding.severity is ERROR and request_id in finding.title

    wait_for(abandoned, seconds=20, every=0.5)


def test_a_worker_with_other_agents_is_found(launch: Launcher, sound: RedisServer) -> None:
    sound.ask("FLUSHALL")
    launch.worker(sound.url)
    wait_for(lambda: sound.ask("ZCARD", keys.WORKERS) == 1)
    finding = the(doctor(sound.url, agents="another=tests.kit.agents:echo", default_agent="another"), "worker_agents")
    assert finding.severity is WARNING and "another" in finding.title


# -- tokens and settings ---------------------------------------------------------------------------------------------


def test_settings_that_are_refused_are_a_finding() -> None:
    done = here("doctor", lease_seconds="nonsense")
    assert done.returncode == 2
    assert "BROKER_LEASE_SECONDS" in done.stdout


def test_a_redis_url_whose_certificates_cannot_be_used_is_a_finding() -> None:
    finding = the(doctor("rediss://127.0.0.1:1?ssl_ca_certs=/nowhere.pem"), "settings")
    assert finding.severity is ERROR and "certificates" in finding.title


def test_the_fake_redis_of_the_demo_is_told_to_be_out_of_sight() -> None:
    assert the(doctor("fakeredis://demo"), "settings").severity is WARNING


@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        ({"jwt_secret": "short"}, "auth", ERROR),
        ({"jwt_secret": None}, "auth", ERROR),
        ({"jwt_secret": "a" * 40}, "auth_secret", WARNING),
        ({"auth": "none"}, "auth", WARNING),
        ({"jwt_algorithms": "HS512,nonsense"}, "auth", ERROR),
    ],
)
def test_how_tokens_are_verified_is_looked_at(
    sound: RedisServer, settings: dict[str, Any], code: str, expected: Severity
) -> None:
    assert the(doctor(sound.url, **settings), code).severity is expected


def test_a_jwks_is_fetched(sound: RedisServer) -> None:
    with Issuer([jwk(RSA_KEY, "one")]) as issuer:
        rs = {"jwt_secret": None, "jwt_jwks_url": issuer.url}
        assert the(doctor(sound.url, **rs, jwt_algorithms="RS256"), "auth_jwks").severity is OK
        assert the(doctor(sound.url, **rs), "auth_jwks").severity is NOTE  # nothing for ES256
        assert the(doctor(sound.url, **rs, jwt_algorithms="ES384"), "auth_jwks").severity is ERROR
        issuer.status = 404
        assert "404" in the(doctor(sound.url, **rs), "auth_jwks").title
    finding = the(doctor(sound.url, **rs), "auth_jwks")
    assert finding.severity is ERROR
    assert worst([finding]) is ERROR
