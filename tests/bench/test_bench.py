"""The benchmark's smoke run: that it measures, never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.first_byte import Reading, parts_of
from tests.bench.scenarios import FULL, QUICK
from tests.bench.targets import TARGETS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the load tools need epoll, and the figures /proc"),
    pytest.mark.timeout(300),
]

COMMON = {"rss_mib", "server_busy", "redis_busy", "redis_commands", "redis_connections"}
TAIL = COMMON | {"delivered_per_s", "delivered_share", "server_us", "p50_ms", "p99_ms", "redis_us", "publisher_late_ms"}
LATENCIES = {"rest_p50_ms", "rest_p99_ms", "loaded_p50_ms", "loaded_p99_ms"}
FIGURES = {
    "fanout": TAIL,
    "fanout-fast": TAIL,
    "protocols": TAIL,
    "runs": TAIL,
    "runs-max": TAIL | {"runs_held"},
    "herd": COMMON | {"delivered_per_s", "delivered_share", "server_us", "all_s"},
    "herd-openai": COMMON | {"delivered_per_s", "delivered_share", "server_us", "all_s"},
    "idle": COMMON | {"kib_per_stream", "open_s", "heartbeats"},
    "first-byte": {"direct_p50_ms", "first_p50_ms", "first_p99_ms", "above_p50_ms", "later_p50_ms"},
    "submit": COMMON | LATENCIES | {"delivered_per_s", "server_ms", "worker_ms", "redis_us"},
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `--quick --json` writes."""
    path: Path = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "--quick", "--patience", "0", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return loaded


def medians(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(scenario, target, figures)"""
    return [
        (result["scenario"], target, figures)
        for result in document["results"]
        for target, figures in result["medians"].items()
    ]


def test_every_scenario_is_measured_on_every_target(document: dict[str, Any]) -> None:
    expected = [(scenario.name, target) for scenario in FULL.scenarios for target in TARGETS]
    assert [(scenario, target) for scenario, target, _ in medians(document)] == expected
    assert [scenario.name for scenario in QUICK.scenarios] == [scenario.name for scenario in FULL.scenarios]


def test_every_figure_is_there(document: dict[str, Any]) -> None:
    for scenario, target, figures in medians(document):
        missing = {name for name in FIGURES[scenario] if figures[name] is None}
        assert not missing, f"{scenario} of {target} lacks {missing}"


def test_every_client_gets_everything(document: dict[str, Any]) -> None:
    for scenario, target, figures in medians(document):
        assert figures["complete"], f"{scenario} of {target}"
        assert figures["delivered_share"] in (None, 1.0), f"{scenario} of {target}"


def test_two_protocols_are_compared_with_one(document: dict[str, Any]) -> None:
    [figures] = [each for name, target, each in medians(document) if (name, target) == ("protocols", "broker")]
    assert figures["mixed_us"] > 0
    assert figures["mixed_ratio"] == pytest.approx(figures["mixed_us"] / figures["server_us"])


def test_the_shares_of_a_first_token_s_way_are_told(document: dict[str, Any]) -> None:
    [figures] = [each for name, target, each in medians(document) if (name, target) == ("first-byte", "broker")]
    assert all(figures[name] > 0 for name in ("agent_ms", "buffered_ms", "append_ms", "gateway_ms"))


def test_the_shares_of_a_first_token_s_way_are_all_of_it() -> None:
    written = 10**15
    reading = Reading(
        came={written: written + 10_000_000, written + 50: written + 20_000_000},
        worker={str(written): [written + 1_000_000, written + 3_000_000, written + 9_000_000]},
    )
    shares = parts_of([reading], {written: written + 6_000_000})
    assert shares.pop("append_answer_ms") == 6.0
    assert list(shares.values()) == [1.0, 2.0, 3.0, 4.0]
    assert sum(shares.values()) == reading.first_ms


def test_idle_streams_get_heartbeats(document: dict[str, Any]) -> None:
    for scenario, target, figures in medians(document):
        if scenario == "idle":
            assert figures["heartbeats"] >= 1, target


def test_the_gateways_connections_to_redis_do_not_grow_with_its_clients(document: dict[str, Any]) -> None:
    for scenario, target, figures in medians(document):
        if target == "broker":
            assert figures["redis_connections"] <= 7, scenario


def test_the_machine_and_the_versions_are_told(document: dict[str, Any]) -> None:
    machine = document["machine"]
    assert machine["cpu"] and machine["core_count"] >= 1 and "redis-server" in machine["versions"]
