"""URLs of one server, of Sentinels, of a Cluster: what they mean, and what is refused without showing a password."""

from __future__ import annotations

import pytest
from redis.asyncio.connection import SSLConnection, parse_url

from broker.redis_url import parse
from broker.settings import Settings, redact_url
from tests.kit.command import check_one_line, here


@pytest.mark.parametrize(
    ("url", "nodes", "plain"),
    [
        ("redis://", [("localhost", 6379)], "redis://localhost:6379/"),
        ("redis://host", [("host", 6379)], "redis://host:6379/"),
        ("redis://bob:x@host:1/2", [("host", 1)], "redis://bob:x@host:1/2"),
        ("redis://:a:b@c@host", [("host", 6379)], "redis://:a:b@c@host:6379/"),
        ("rediss://[::1]:7?db=3", [("::1", 7)], "rediss://[::1]:7/?db=3"),
        ("unix:///run/redis.sock?db=1", [], "unix:///run/redis.sock?db=1"),
        ("unix://bob:x@/run/redis.sock", [], "unix://bob:x@/run/redis.sock"),
        ("fakeredis://demo", [], "fakeredis://demo"),
    ],
)
def test_one_server_is_what_redis_py_takes(url: str, nodes: list[tuple[str, int]], plain: str) -> None:
    found = parse(url)
    assert (found.kind, list(found.nodes), found.plain, found.master) == ("server", nodes, plain, "")


def test_sentinels_share_the_name_of_the_primary_its_login_and_its_database() -> None:
    found = parse("redis+sentinel://bob:p%40ss@one,two:5,[::1]:7/my%20primary/3?socket_timeout=2")
    assert found.kind == "sentinel"
    assert found.nodes == (("one", 26379), ("two", 5), ("::1", 7))
    assert found.master == "my primary"
    options = parse_url(found.plain)
    assert (options["username"], options["password"], options["db"]) == ("bob", "p@ss", 3)
    assert options["socket_timeout"] == 2  # type: ignore[typeddict-item]


def test_sentinels_have_a_login_of_their_own() -> None:
    found = parse("redis+sentinel://one/main?sentinel_username=bob&socket_timeout=2&sentinel_password=p%40ss")
    assert (found.sentinel_username, found.sentinel_password) == ("bob", "p@ss")
    assert found.plain == "redis://one:26379/?socket_timeout=2"
    nobody = parse("redis+sentinel://:secret@one/main")
    assert (nobody.sentinel_username, nobody.sentinel_password) == (None, None)


@pytest.mark.parametrize("path", ["", "/", "/0"])
def test_a_cluster_is_a_list_of_nodes(path: str) -> None:
    found = parse(f"redis+cluster://bob:x@one,two:5{path}")
    assert (found.kind, found.nodes) == ("cluster", (("one", 6379), ("two", 5)))
    assert parse_url(found.plain)["password"] == "x"


@pytest.mark.parametrize("kind", ["", "+sentinel", "+cluster"])
def test_tls_is_the_plain_scheme_with_an_s(kind: str) -> None:
    path = "/main" if kind == "+sentinel" else ""
    options = parse_url(parse(f"rediss{kind}://host{path}?ssl_ca_certs=/ca.pem&ssl_check_hostname=false").plain)
    assert options["connection_class"] is SSLConnection
    assert options["ssl_ca_certs"] == "/ca.pem"  # type: ignore[typeddict-item]
    assert options["ssl_check_hostname"] is False  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "use redis://"),
        ("host:6379", "use redis://"),
        ("redis:host", "use redis://"),
        ("http://host", "use redis://"),
        ("redis+other://host", "use redis://"),
        ("unix+cluster:///socket", "use redis://"),
        ("redis://host:port", "no URL of a Redis"),
        ("redis://host:0", "no URL of a Redis"),
        ("redis://host:65536", "no URL of a Redis"),
        ("redis://[::1", "no URL of a Redis"),
        ("redis://::1", "no URL of a Redis"),
        ("redis+cluster://one,,two:x", "no URL of a Redis"),
        ("redis+sentinel://one two/main", "no URL of a Redis"),
        ("redis://one,two", "several servers"),
        ("redis://host/main", "not a number"),
        ("redis+sentinel://host", "name of the primary is missing"),
        ("redis+sentinel://host/", "name of the primary is missing"),
        ("redis+sentinel://host/main/x", "not a number"),
        ("redis+sentinel://host/main/0/1", "not a number"),
        ("redis+cluster://host/1", "only the database 0"),
        ("redis+cluster://host?db=0", "the option 'db' is not one of"),
        ("redis://host?max_connections=99", "the option 'max_connections' is not one of db, username"),
        ("redis://host?retry_on_timeout=true", "the option 'retry_on_timeout' is not one of"),
        ("redis://host?ssl_ca_certs=/ca.pem", "the option 'ssl_ca_certs' is not one of"),
        ("redis://host?sentinel_password=x", "the option 'sentinel_password' is not one of"),
        ("unix:///socket?ssl_ca_certs=/ca.pem", "the option 'ssl_ca_certs' is not one of"),
        ("redis://host?db=x", "the option 'db' has no acceptable value"),
        ("redis://host?socket_timeout=0", "the option 'socket_timeout' has no acceptable value"),
        ("redis://host?socket_timeout=soon", "the option 'socket_timeout' has no acceptable value"),
        ("rediss://host?ssl_cert_reqs=never", "the option 'ssl_cert_reqs' has no acceptable value"),
        ("rediss://host?ssl_check_hostname=off", "the option 'ssl_check_hostname' has no acceptable value"),
        ("rediss://host?ssl_ca_certs=", "the option 'ssl_ca_certs' has no acceptable value"),
    ],
)
def test_what_is_no_url_of_a_redis_is_refused_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(url)


@pytest.mark.parametrize(
    "url",
    [
        "pelican://bob:pelican@host",
        "redis://bob:pelican@host:port",
        "redis://bob:pel/pelican@host",
        "redis://bob:pel?pelican@host",
        "redis://bob:pel?pelican=pelican@host",
        "redis://bob:pel#pelican@host",
        "redis://bob:pelican@[::1",
        "redis://pelican,pelican@host:x",
        "redis+sentinel://bob:pelican@one,two",
        "redis+sentinel://bob:pelican@one,two/main?sentinel_password=pelican&db=pelican",
        "redis+cluster://bob:pelican@one,two/pelican",
    ],
)
def test_no_refusal_shows_a_password(url: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        parse(url)
    assert "pelican" not in str(caught.value)


def test_what_was_parsed_is_printed_without_passwords() -> None:
    found = parse("redis+sentinel://bob:pelican@one/main?sentinel_password=pelican")
    assert "pelican" not in repr(found)
    assert "pelican" in found.plain


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis+sentinel://:x@one:1,two/main?sentinel_password=x", "redis+sentinel://:***@one:1,two/main"),
        ("rediss+cluster://bob:x@one:1,[::1]:2?ssl_ca_certs=/ca", "rediss+cluster://bob:***@one:1,[::1]:2"),
        ("redis+cluster://one:1,two:2", "redis+cluster://one:1,two:2"),
    ],
)
def test_urls_of_several_servers_are_printed_without_passwords(url: str, shown: str) -> None:
    assert redact_url(url) == shown


# At the start of a process


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(
    "urls",
    [
        {"redis_url": "redis+cluster://one,two"},
        {"redis_url": "redis://one", "queue_redis_url": "rediss+cluster://:pelican@one"},
    ],
)
def test_a_queue_on_a_cluster_is_refused_at_start(command: str, urls: dict[str, str]) -> None:
    """Also where it is one only because nobody said otherwise."""
    line = check_one_line(here(command, **urls))
    assert "BROKER_QUEUE_REDIS_URL must be set to a Redis of its own" in line
    assert "the queue cannot be on a Cluster" in line
    assert "pelican" not in line


@pytest.mark.parametrize("name", ["redis_url", "queue_redis_url"])
def test_a_url_that_is_refused_is_named_by_its_variable(name: str) -> None:
    line = check_one_line(here("serve", **{name: "redis+sentinel://:pelican@one"}))
    assert f"BROKER_{name.upper()}: the name of the primary is missing" in line
    assert "pelican" not in line


def test_logs_on_a_cluster_with_a_queue_elsewhere_are_accepted() -> None:
    for queue in ("redis://queue", "redis+sentinel://one,two/queue", "unix:///queue.sock"):
        assert Settings(redis_url="redis+cluster://one,two", queue_redis_url=queue).queue_url == queue


def test_certificates_that_are_missing_refuse_to_start() -> None:
    line = check_one_line(here("serve", redis_url="rediss://:pelican@host?ssl_ca_certs=/nowhere.pem", auth="none"))
    assert "the certificates of the Redis URL cannot be used" in line
    assert "pelican" not in line
