"""Redis over TLS: the whole path, and who is not believed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from broker.errors import Misconfigured
from broker.runs.connections import connect, is_away
from broker.runs.subscriber import Subscriber
from tests.conftest import Launcher
from tests.kit.http import Client
from tests.kit.tls import Certificates, TlsServer, make_certificates
from tests.kit.waiting import until
from tests.kit.whole_path import check_whole_path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def answers(url: str) -> bool:
    redis = connect(url, connections=1)
    try:
        return bool(await redis.ping())
    finally:
        await redis.aclose(close_connection_pool=True)


def test_the_whole_path_over_tls_with_a_clients_certificate(
    launch: Launcher, tmp_path: Path, certificates: Certificates
) -> None:
    """The connections of commands, of the queue and of pub/sub, in both kinds of process."""
    with TlsServer(tmp_path, certificates, "--tls-auth-clients", "yes") as server:
        gateways = [launch.gateway(server.client_url) for _ in range(2)]
        worker = launch.worker(server.client_url)
        with Client(gateways[0].url) as one, Client(gateways[1].url) as two:
            check_whole_path(one, two)
        for process in (*gateways, worker):
            assert not [line for line in process.log_lines() if line["level"] not in ("INFO", "DEBUG")]


async def test_a_server_is_known_by_its_authority_and_its_name(tmp_path: Path, certificates: Certificates) -> None:
    with TlsServer(tmp_path, certificates) as server:
        bare = f"rediss://127.0.0.1:{server.port}"
        assert await answers(server.url)
        assert await answers(f"{bare}?ssl_cert_reqs=none")
        other = server.url.replace("127.0.0.1", "localhost")  # a name that the certificate does not have
        assert await answers(f"{other}&ssl_check_hostname=false")
        for url in (bare, other, f"redis://127.0.0.1:{server.port}"):
            with pytest.raises(Exception, match=r".+") as caught:
                await answers(url)
            assert is_away(caught.value), url


async def test_a_server_that_asks_for_a_clients_certificate_refuses_who_has_none(
    tmp_path: Path, certificates: Certificates
) -> None:
    with TlsServer(tmp_path, certificates, "--tls-auth-clients", "yes") as server:
        assert await answers(server.client_url)
        with pytest.raises(Exception, match=r".+") as caught:
            await answers(server.url)
        assert is_away(caught.value)


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile"])
def test_certificates_that_cannot_be_used_refuse_to_start(
    tmp_path: Path, certificates: Certificates, option: str
) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for path in (nothing, tmp_path / "missing.pem"):
        with pytest.raises(Misconfigured, match="certificates of the Redis URL"):
            connect(f"rediss://127.0.0.1:1?{option}={path}&ssl_keyfile={certificates.key}", connections=1)


async def test_a_paused_server_does_not_hold_up_the_end(tmp_path: Path, certificates: Certificates) -> None:
    """TLS ends politely, by an answer of the other side: which may never come."""
    with TlsServer(tmp_path, certificates) as server:
        redis, subscriptions = connect(server.url, connections=2), connect(server.url, connections=1)
        resets: list[None] = []
        subscriber = Subscriber(subscriptions, on_message=lambda *_: None, on_reset=lambda *_: resets.append(None))
        subscriber.start()
        await until(lambda: bool(resets))
        await redis.ping()
        server.pause()
        async with asyncio.timeout(3):
            await subscriber.close()
            for client in (redis, subscriptions):
                await client.aclose(close_connection_pool=True)
        server.resume()
