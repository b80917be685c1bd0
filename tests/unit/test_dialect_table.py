"""BROKER_DIALECTS: which dialects a gateway serves, and where."""

from __future__ import annotations

import pytest

from broker.errors import Misconfigured
from broker.gateway.app import make_app
from broker.gateway.dialects.table import DIALECTS, mounted
from broker.gateway.front import Front
from broker.settings import Settings


def served(*dialects: str) -> set[tuple[str, str]]:
    gateway = make_app(Settings(auth="none", dialects=dialects)).state.gateway
    return {(route.method, route.path) for route in mounted(Front(gateway))}


async def test_all_dialects_are_served_by_default() -> None:
    assert served() == served(*DIALECTS)
    prefixes = [mount.prefix for mount in DIALECTS.values()]
    assert all(any(path.startswith(prefix) for _, path in served()) for prefix in prefixes)


async def test_the_native_dialect_is_always_served() -> None:
    native = served("native")
    assert ("GET", "/api/v1/runs/{request_id}/stream") in native
    for name in DIALECTS:
        assert native <= served(name)


@pytest.mark.parametrize("name", [name for name in DIALECTS if name != "native"])
async def test_a_dialect_is_mounted_elsewhere_with_all_its_routes(name: str) -> None:
    here, elsewhere = served(name) - served("native"), served(f"{name}=/else/where") - served("native")
    assert here
    assert {(method, path.replace(DIALECTS[name].prefix, "/else/where", 1)) for method, path in here} == elsewhere


@pytest.mark.parametrize(
    ("dialects", "complaint"),
    [
        (("telnet",), "there is no dialect 'telnet'; there are: native"),
        (("native=/v2",), "always below /api/v1"),
    ],
)
async def test_what_cannot_be_served_is_refused_at_the_start(dialects: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(Misconfigured, match=complaint):
        served(*dialects)


async def test_two_dialects_at_one_place_are_refused() -> None:
    with pytest.raises(Misconfigured, match="is there twice"):
        served("chat=/same", "session_chat=/same")


@pytest.mark.parametrize("item", ["openai=v1", "openai=/v1/", "openai=", "Open AI", "openai=/v1?x", "openai=//v1"])
def test_what_is_no_name_and_no_path_is_no_setting(item: str) -> None:
    with pytest.raises(ValueError, match="not of the form name or name=/path"):
        Settings(dialects=(item,))
