"""A run that is lost with its primary before its submit was answered (PROTOCOL 5.3)."""

from __future__ import annotations

from broker.events import Token
from tests.conftest import Launcher
from tests.kit import sse
from tests.kit.http import Client
from tests.kit.proxy import Command, Proxy

BODY = {"query": "one two", "agent": "echo"}


def test_a_submit_whose_run_was_lost_meanwhile_is_to_be_sent_again_and_then_starts_another(launch: Launcher) -> None:
    """A 404 would tell a client that submits that its run is not there, and most do not try again."""
    server = launch.redis()
    lost: list[bytes] = []

    def loses(command: Command) -> bool:
        """What is read next of a new run is not there: as where its primary was not the next one's."""
        if command[0].upper() == b"HMGET" and not lost:
            lost.append(command[1])
            server.ask("FLUSHALL")
        return False

    with Proxy(server.port) as proxy:
        gateway = launch.gateway(proxy.url)
        proxy.swallow(loses)
        with Client(gateway.url) as client:
            reply = client.post("/api/v1/query/stream", json=BODY)
            assert (reply.status_code, reply.json()["code"]) == (503, "unavailable")
            assert lost
            launch.worker(server.url)
            with client.stream("POST", "/api/v1/query/stream", json=BODY) as response:
                events = list(sse.read(response.iter_raw()))
    assert [event.type for event in events].count(Token.type) == 2
    assert events[-1].type == "final"
