"""The EventSource of npm on the native stream; a browser's own is in tests/browser."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from broker.events import Entry
from tests.clients.conftest import Deployment, NodeOf, kill
from tests.kit.http import Client
from tests.kit.node import Node, Seen

TYPES = ("start", "token", "data", "final", "cancelled", "gone")
COUNT = 60


@pytest.fixture
def node(node_of: NodeOf) -> Node:
    return node_of("eventsource.mjs")


def check_seen(seen: Sequence[Seen], log: Sequence[Entry]) -> None:
    assert [(one["id"], one["type"]) for one in seen] == [
        (str(entry.id), entry.type) for entry in log if entry.type in TYPES
    ]


def test_eventsource_of_npm_reads_a_run_to_its_end_and_stops(
    deployment: Deployment, node: Node, alice: Client, bearer: str
) -> None:
    request_id = alice.submit("count", agent="tokens", parameters={"count": COUNT, "pause": 0.01})
    path = f"/api/v1/runs/{request_id}/stream"
    call = node.start("watch", name=request_id, url=deployment.urls[0], token=bearer, path=path, types=TYPES)
    assert call.result() == 204
    check_seen(call.seen, alice.log(request_id))


def test_eventsource_of_npm_goes_on_at_another_gateway_when_its_own_is_killed(
    deployment: Deployment, node: Node, alice: Client, bearer: str
) -> None:
    request_id = alice.submit("count", agent="tokens", parameters={"count": COUNT, "pause": 0.05})
    path = f"/api/v1/runs/{request_id}/stream"
    call = node.start("watch", name=request_id, url=deployment.urls[0], token=bearer, path=path, types=TYPES)
    call.until(lambda seen: seen["type"] == "token")
    kill(deployment.gateways[0])
    node.call("move", name=request_id, url=deployment.urls[1])
    assert call.result() == 204
    check_seen(call.seen, alice.log(request_id))
