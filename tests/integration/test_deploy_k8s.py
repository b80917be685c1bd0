"""deploy/k8s: what the Deployments would start, started as processes, probed and ended as a kubelet does it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import Launcher
from tests.kit import deploy
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.containers import Pod
from tests.kit.eventsource import EventSource
from tests.kit.http import Client, token
from tests.kit.processes import SECRET, environment, wait_for
from tests.kit.redis_server import RedisServer

ALICE = {"Authorization": f"Bearer {token('alice', ttl=7200)}"}
AGENTS = environment("")["BROKER_AGENTS"]
"""The agents of the tests, as an overlay's ConfigMap would add them."""


class Cluster:
    """As many pods of each Deployment as its HorizontalPodAutoscaler has at least."""

    def __init__(self, launch: Launcher, **overlay: object) -> None:
        """`overlay` is added to the ConfigMap; keywords are BROKER_… names in lower case."""
        self.redis: RedisServer = launch.redis()
        self.pods: dict[str, Pod] = {}
        self._network = deploy.Network()
        self._folder = launch.folder
        self._secrets = {"stream-broker": {"redis-url": self.redis.url, "jwt-secret": SECRET}}
        self._overlay = {f"BROKER_{name.upper()}": str(value) for name, value in {"agents": AGENTS, **overlay}.items()}

    def up(self) -> None:
        """Starts the pods that are missing, and waits until all are ready."""
        for role in ("gateway", "worker"):
            deployment = deploy.manifest("Deployment", f"stream-broker-{role}")
            scaler = deploy.manifest("HorizontalPodAutoscaler", f"stream-broker-{role}")
            for name in (f"{role}-{n}" for n in range(scaler["spec"]["minReplicas"])):
                if name not in self.pods or not self.pods[name].process.running:
                    self.pods[name] = Pod(deployment, name, self._network, self._folder, self._secrets, self._overlay)
        for gateway in self.of("gateway"):
            wait_for(lambda gateway=gateway: gateway.probe("readinessProbe"), seconds=20)  # type: ignore[misc]
        for worker in self.of("worker"):
            wait_for(lambda worker=worker: bool(worker.process.logged("worker started")), seconds=20)  # type: ignore[misc]

    def of(self, role: str) -> list[Pod]:
        return [pod for name, pod in self.pods.items() if name.startswith(role)]

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        for pod in self.pods.values():
            pod.process.ask()
        for pod in self.pods.values():
            pod.process.kill(after=3)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    launch = Launcher(tmp_path_factory.mktemp("cluster"))
    try:
        with Cluster(launch) as cluster:
            yield cluster
    finally:
        launch.close()


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """All of its pods are ready: what a test ended is started again."""
    started.up()
    return started


async def test_a_pod_that_is_deleted_goes_on_until_the_proxies_know_and_its_streams_move_on(cluster: Cluster) -> None:
    going, staying = cluster.of("gateway")
    for gateway in (going, staying):
        assert gateway.probe("livenessProbe")
        assert gateway.probe("readinessProbe")
    with Client(going.url, "alice") as client:
        request_id = client.submit("long", agent="tokens", parameters={"count": 400, "pause": 0.02})
        source = EventSource(going.url, f"/api/v1/runs/{request_id}/stream", ALICE, hurry=5)
        reading = asyncio.create_task(source.run())
        deleted = asyncio.create_task(asyncio.to_thread(going.terminate))
        async with asyncio.timeout(4):
            while len(source.events) < 20:
                await asyncio.sleep(0.02)
        assert going.probe("readinessProbe")
        assert client.post("/api/v1/query", json={"query": "still taken", "agent": "echo"}).status_code == 202
        assert len(source.streams) == 1
        source.url = staying.url
        assert await source.streams[0].ended() == "cut"
        assert await deleted == 0
        assert not going.probe("livenessProbe")
    async with asyncio.timeout(30):
        await reading
    assert source.closed == "204"
    with Client(staying.url, "alice") as client:
        log = client.log(request_id)
        check_log(log)
        check_reader(entries_of(source.events), log)


def test_workers_whose_agents_do_not_stop_end_within_their_grace(launch: Launcher) -> None:
    """`stubborn` goes on for 20 s, whatever it is told. With a shorter BROKER_GRACE_SECONDS there is less time."""
    grace = 1.0
    with Cluster(launch, grace_seconds=grace) as cluster, Client(cluster.of("gateway")[0].url) as client:
        for n in range(6):
            client.submit(f"{n}", agent="stubborn")
        for worker in cluster.of("worker"):
            wait_for(lambda worker=worker: bool(worker.process.logged("run started")))  # type: ignore[misc]
        less = float(deploy.manifest("ConfigMap", "stream-broker")["data"]["BROKER_GRACE_SECONDS"]) - grace
        began = time.monotonic()
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(lambda worker: worker.terminate(less=less), cluster.of("worker"))) == [0, 0]
        print(f"ended {time.monotonic() - began - grace:.1f} s after the grace period")


def test_while_redis_is_away_gateways_live_but_are_not_ready(cluster: Cluster) -> None:
    cluster.redis.kill()
    for gateway in cluster.of("gateway"):
        wait_for(lambda gateway=gateway: not gateway.probe("readinessProbe"))  # type: ignore[misc]
        assert gateway.probe("livenessProbe")
    cluster.redis.start()
    for gateway in cluster.of("gateway"):
        wait_for(lambda gateway=gateway: gateway.probe("readinessProbe"), seconds=20)  # type: ignore[misc]


def test_a_pod_without_its_secret_does_not_start(launch: Launcher) -> None:
    """The key may be missing where there is a JWKS; without either the gateway says so, and ends."""
    deployment = deploy.manifest("Deployment", "stream-broker-gateway")
    secrets = {"stream-broker": {"redis-url": "redis://127.0.0.1:1"}}
    pod = Pod(deployment, "gateway", deploy.Network(), launch.folder, secrets)
    assert pod.process.wait() == 1
    assert "set BROKER_JWT_SECRET or BROKER_JWT_JWKS_URL" in pod.process.log_text()
    with pytest.raises(KeyError):
        Pod(deployment, "gateway", deploy.Network(), launch.folder, {"stream-broker": {}})
