"""The settings: their page, their defaults, and one line for whoever gets one wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from broker import settings
from broker.errors import Misconfigured
from broker.settings import Settings, load, redact_url
from tests.kit import settings_table

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-of-exactly-thirty-two-b"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("BROKER_")]:
        monkeypatch.delenv(name)


def loaded(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(f"BROKER_{name.upper()}", value)
    return load()


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(Misconfigured) as caught:
        loaded(monkeypatch, **variables)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


# The page


def test_the_page_lists_exactly_the_settings_with_their_defaults() -> None:
    expected = [*settings_table.HEAD, *settings_table.rows()]
    assert settings_table.written() == expected, "write it anew: python -m tests.kit.settings_table"


def test_every_setting_says_what_it_means() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "…")), name
        assert "|" not in field.description


def test_every_variable_that_the_source_names_is_on_the_page() -> None:
    page = settings_table.PAGE.read_text("utf-8")
    named = {
        name
        for package in ("broker", "worker")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r"\bBROKER_[A-Z][A-Z_]*[A-Z]\b", path.read_text("utf-8"))
    }
    assert len(named) > 10
    for name in named:
        assert f"`{name}" in page, name


def test_every_variable_that_the_documentation_names_exists() -> None:
    known = {f"BROKER_{name.upper()}" for name in Settings.model_fields}
    known |= set(re.findall(r"`(BROKER_[A-Z_]+)", settings_table.PAGE.read_text("utf-8").rpartition("|")[2]))
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"\bBROKER_[A-Z][A-Z_]*[A-Z]\b", page.read_text("utf-8")):
            assert name in known, f"{page.name} names {name}"


# Reading


def test_the_defaults_are_those_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(monkeypatch)
    for name, field in Settings.model_fields.items():
        assert getattr(found, name) == field.get_default(), name


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = dict.fromkeys(Settings.model_fields, "")
    assert loaded(monkeypatch, **empty) == Settings()


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(
        monkeypatch,
        agents=" one=a.b:c , ,two=d:e,",
        cors_origins="https://a.example,http://localhost:3000",
        jwt_algorithms="HS256, RS256",
    )
    assert found.agents == ("one=a.b:c", "two=d:e")
    assert found.agent_targets == {"one": "a.b:c", "two": "d:e"}
    assert found.agent_names == ("research", "chat", "one", "two")
    assert found.cors_origins == ("https://a.example", "http://localhost:3000")
    assert found.jwt_algorithms == ("HS256", "RS256")


def test_a_built_in_agent_can_be_replaced_and_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(monkeypatch, agents="research=mine:research")
    assert found.agent_names == ("research", "chat")


def test_what_is_read_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded(monkeypatch).max_jobs = 1  # type: ignore[misc]


def test_the_queue_is_where_the_runs_are_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(monkeypatch, redis_url="redis://a:1").queue_url == "redis://a:1"
    assert loaded(monkeypatch, queue_redis_url="redis://b:2").queue_url == "redis://b:2"


def test_an_idempotency_key_is_kept_for_longer_than_any_run_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(monkeypatch, retention_seconds="10", max_run_seconds="20")
    assert found.key_life_ms == (10 + 20 + 3600) * 1000


# What is refused

NUMBERS = [
    name
    for name, field in Settings.model_fields.items()
    if any(kind in str(field.annotation) for kind in ("float", "int"))
]


def test_there_are_numbers_among_the_settings() -> None:
    assert {"lease_seconds", "max_jobs", "max_stream_seconds"} <= set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["x", "-1", "nan", "inf", "-inf", "1e999", "5s", "0x10", "1,5", "None"])
def test_a_number_that_is_none_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    assert refusal(monkeypatch, **{name: value}).startswith(f"BROKER_{name.upper()}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lease_seconds", "0"),
        ("lease_seconds", "0.5"),
        ("heartbeat_seconds", "0"),
        ("retention_seconds", "0"),
        ("max_attempts", "0"),
        ("max_attempts", "1.5"),
        ("max_jobs", "0"),
        ("max_run_seconds", "0"),
        ("max_stream_seconds", "0"),
        ("send_timeout_seconds", "0"),
        ("jwt_leeway_seconds", "301"),
        ("ticket_key", "x" * 31),
        ("ticket_key", "x" * 32 + ","),
        ("ticket_key", "x" * 31 + "," + "y" * 32),
        ("ticket_seconds", "0.5"),
        ("ticket_seconds", "86401"),
        ("auth", "jwt,none"),
        ("auth", "NONE"),
        ("auth", "basic"),
        ("redis_url", "localhost:6379"),
        ("redis_url", "http://localhost"),
        ("redis_url", "redis://localhost:port"),
        ("redis_url", "redis://localhost:99999"),
        ("redis_url", "redis://[::1"),
        ("queue_redis_url", "amqp://localhost"),
        ("queue_redis_url", "redis://localhost:port"),
        ("agents", "echo"),
        ("agents", "echo="),
        ("agents", "echo=module"),
        ("agents", "=module:function"),
        ("agents", "Echo=module:function"),
        ("agents", "echo=module:function,two"),
        ("agents", "echo=module:function:more"),
        ("agents", "echo=a b:c"),
        ("cors_origins", "*"),
        ("cors_origins", "app.example.com"),
        ("cors_origins", "https://app.example.com/"),
        ("cors_origins", "https://app.example.com/path"),
        ("cors_origins", "ftp://app.example.com"),
        ("cors_origins", "https://[::1"),
        ("cors_origins", "null"),
        ("default_agent", "nobody"),
        ("default_agent", "RESEARCH"),
    ],
)
def test_a_value_that_is_not_acceptable_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert refusal(monkeypatch, **{name: value}).startswith(f"BROKER_{name.upper()}")


def test_all_wrong_values_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, lease_seconds="x", max_jobs="0", auth="open")
    for name in ("BROKER_LEASE_SECONDS", "BROKER_MAX_JOBS", "BROKER_AUTH"):
        assert message.count(name) == 1


def test_no_refusal_shows_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("redis://user:pelican@host:port", "http://user:pelican@host", "redis://:pelican@[::1"):
        assert "pelican" not in refusal(monkeypatch, redis_url=url)
        assert "pelican" not in refusal(monkeypatch, redis_url=url, queue_redis_url=url, jwt_secret="pelican")


# Unsafe combinations


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "example.com", "", "localhost.example.com"])
def test_without_authentication_only_loopback_is_served(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with pytest.raises(Misconfigured, match="BROKER_AUTH=none"):
        loaded(monkeypatch, auth="none").check_serving(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_without_authentication_loopback_is_served(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    loaded(monkeypatch, auth="none").check_serving(host)


def test_authentication_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misconfigured, match="BROKER_JWT_SECRET or BROKER_JWT_JWKS_URL"):
        loaded(monkeypatch).check_serving("127.0.0.1")
    loaded(monkeypatch, jwt_jwks_url="https://issuer.example/jwks.json").check_serving("0.0.0.0")


@pytest.mark.parametrize(
    ("algorithms", "secret", "accepted"),
    [
        ("", SECRET, True),
        ("", SECRET[:-1], False),
        ("HS256", SECRET, True),
        ("HS384", SECRET, False),
        ("HS384", SECRET + "x" * 16, True),
        ("HS512", SECRET + "x" * 16, False),
        ("HS512", SECRET * 2, True),
        ("HS256,HS512", SECRET, False),
        ("", "\u00fc" * 16, True),
        ("HS256", "", False),
    ],
)
def test_a_secret_is_as_long_as_its_hash(
    monkeypatch: pytest.MonkeyPatch, algorithms: str, secret: str, accepted: bool
) -> None:
    found = loaded(monkeypatch, jwt_algorithms=algorithms, jwt_secret=secret, jwt_jwks_url="https://a.example/jwks")
    if accepted:
        found.check_serving("0.0.0.0")
    else:
        with pytest.raises(Misconfigured, match="BROKER_JWT_SECRET must have at least") as caught:
            found.check_serving("0.0.0.0")
        assert not secret or secret not in str(caught.value)


# Printing


def test_settings_are_printed_without_what_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(
        monkeypatch,
        redis_url="redis://bob:pelican@redis.example:6379/2?password=pelican",
        queue_redis_url="rediss://:pelican@queue.example",
        jwt_secret="pelican" * 5,
        ticket_key="pelican" * 5 + ", " + "pelican" * 6,
        jwt_jwks_url="https://u:pelican@issuer.example/jwks?token=pelican",
        docs="/srv/docs",
        agents="echo=a:b",
    )
    text = json.dumps(found.redacted())
    assert "pelican" not in text
    assert "pelican" not in repr(found.jwt_secret)
    printed = json.loads(text)
    assert set(printed) == set(Settings.model_fields)
    assert printed["redis_url"] == "redis://bob:***@redis.example:6379/2"
    assert printed["queue_redis_url"] == "rediss://:***@queue.example"
    assert printed["jwt_jwks_url"] == "https://u:***@issuer.example/jwks"
    assert printed["agents"] == ["echo=a:b"]
    assert (printed["docs"], printed["lease_seconds"], printed["max_stream_seconds"]) == ("/srv/docs", 15, None)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host", "redis://host"),
        ("redis://host:1/0", "redis://host:1/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("unix://bob:x@/run/redis.sock?db=1", "unix://bob:***@/run/redis.sock"),
        ("redis://:p%40ss@host", "redis://:***@host"),
        ("redis://bob@host", "redis://bob@host"),
        ("redis://a:b:c@d@host:1", "redis://a:***@host:1"),
    ],
)
def test_a_url_is_printed_without_its_password(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_the_module_reads_nothing_when_it_is_imported() -> None:
    assert not [value for value in vars(settings).values() if isinstance(value, Settings)]
