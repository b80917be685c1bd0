"""What deploy/ would start, as processes: the same commands and variables, each on a loopback address of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.kit import deploy, nginx
from tests.kit.needs import needs
from tests.kit.processes import Process, wait_for
from tests.kit.redis_server import redis_binary


def program(name: str) -> list[str]:
    """The command of a program of one of the images, here."""
    if name == "broker":
        return [sys.executable, "-m", "broker"]
    if name == "python":
        return [sys.executable]
    if name == "redis-server":
        return [redis_binary()]
    if name == "nginx":
        found = nginx.find()
        assert found is not None
        return [found]
    return [needs(name)]


class Container(Process):
    """A container's process. Its environment is what is given, without any other setting of ours."""

    def __init__(self, command: list[str], env: Mapping[str, str], log: Path, *, cwd: Path | None = None) -> None:
        self.log_path = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                [*program(command[0]), *command[1:]], env={**inherited(), **env}, stdout=file, stderr=file, cwd=cwd
            )

    @property
    def running(self) -> bool:
        return self.popen.poll() is None


def inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "OPENAI_"))}


class Composed:
    """compose.yaml. A service with replicas is several containers: worker-1, worker-2, …"""

    def __init__(self, folder: Path, secret: str, **settings: object) -> None:
        """`settings` are added to those of every container of ours; keywords are BROKER_… names in lower case."""
        self.services: dict[str, Any] = deploy.compose({"BROKER_JWT_SECRET": secret})["services"]
        self.network = deploy.Network()
        self.containers: dict[str, Container] = {}
        self._folder = folder
        self._settings = {f"BROKER_{name.upper()}": str(value) for name, value in settings.items()}
        for name in self.services:
            self.network.address(name)

    def up(self) -> None:
        """Starts what does not run, each when what it depends on is healthy, and waits until all are."""
        waiting = {name for name in self.services if not all(self._runs(each) for each in self.replicas(name))}
        while waiting:
            ready = {name for name in waiting if not waiting & self.services[name].get("depends_on", {}).keys()}
            for name in ready:
                self.start(name)
            for name in ready:
                self.until_healthy(name)
            waiting -= ready

    def replicas(self, name: str) -> list[str]:
        count = self.services[name].get("deploy", {}).get("replicas")
        return [name] if count is None else [f"{name}-{n}" for n in range(1, count + 1)]

    def start(self, name: str) -> None:
        service = self.services[name]
        for each in self.replicas(name):
            if not self._runs(each):
                self.containers[each] = self._container(each, name, service)

    def _runs(self, each: str) -> bool:
        return each in self.containers and self.containers[each].running

    def _container(self, each: str, name: str, service: dict[str, Any]) -> Container:
        log = self._folder / f"{each}.log"
        command = [self.network.here(argument, name) for argument in service["command"]]
        address = self.network.address(name)
        if name == "redis":
            data = self._folder / "redis"
            data.mkdir(exist_ok=True)
            return Container([*command, "--bind", address], {}, log, cwd=data)
        if name == "nginx":
            conf = self._folder / "nginx.conf"
            conf.write_text(deploy.nginx_conf(self._folder, address, lambda server: self.network.here(server, name)))
            return Container(nginx_command(command, conf), {}, log)
        volumes = [volume.split(":") for volume in service.get("volumes", [])]
        env = {key: self.network.here(value, name) for key, value in service["environment"].items()}
        for source, target, _ in volumes:
            env = {key: str(deploy.DEPLOY / source) if value == target else value for key, value in env.items()}
        return Container([*deploy.entrypoint(), *command], env | self._settings, log)

    def healthy(self, name: str) -> bool:
        """What the service's own health check says; without one, whether it runs."""
        assert self._runs(name), self.containers[name].log_text()
        kind, *command = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = [*program(command[0]), *(self.network.here(argument, name) for argument in command[1:])]
        limit = deploy.seconds(self.services[name]["healthcheck"]["timeout"])
        done = subprocess.run(command, env=inherited(), capture_output=True, timeout=limit, check=False)
        return done.returncode == 0

    def until_healthy(self, name: str) -> None:
        if self.services[name]["healthcheck"].get("disable"):
            for each in self.replicas(name):
                wait_for(lambda each=each: bool(self.containers[each].logged("worker started")), seconds=20)  # type: ignore[misc]
        else:
            wait_for(lambda: self.healthy(name), seconds=20, every=0.2)

    def stop(self, each: str) -> int:
        """As `docker compose stop` does, which kills when the grace period is over. Returns the exit code."""
        name = each if each in self.services else each.rpartition("-")[0]
        return self.containers[each].stop(deploy.seconds(self.services[name]["stop_grace_period"]))

    def url(self, name: str) -> str:
        """Of nginx or of a gateway, by the port in its container."""
        port = self.services[name]["ports"][0].split(":")[1] if name == "nginx" else "8000"
        return f"http://{self.network.address(name)}:{port}"

    def close(self) -> None:
        """Redis last, as Compose has it: the others need it to end."""
        redis = self.containers.pop("redis", None)
        for container in self.containers.values():
            container.ask()
        for container in self.containers.values():
            container.kill(after=5)
        if redis is not None:
            redis.kill()


def nginx_command(command: list[str], conf: Path) -> list[str]:
    """`command` (nginx -g …) with another configuration; as root its workers stay root, to reach the files of tests."""
    name, option, directives = command
    assert option == "-g"
    user = " user root;" if os.getuid() == 0 else ""
    return [name, "-e", "stderr", "-c", str(conf), option, directives + user]


class Pod:
    """A pod of one of the Deployments, and of its kubelet what it does to a pod."""

    def __init__(
        self,
        deployment: deploy.Manifest,
        name: str,
        network: deploy.Network,
        folder: Path,
        secrets: Mapping[str, Mapping[str, str]],
        overlay: Mapping[str, str] | None = None,
    ) -> None:
        """`secrets`: name -> key -> value, of those that the cluster has. `overlay` is added to the ConfigMap."""
        self.name, self._network = name, network
        self._spec = deployment["spec"]["template"]["spec"]
        self._container = deploy.container(deployment)
        self._overlay = overlay or {}
        command = [*deploy.entrypoint(), *self._container["args"]]
        command = [network.here(argument, name) for argument in command]
        self.process = Container(command, self._environment(secrets), folder / f"{name}.log")

    def _environment(self, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        env: dict[str, str] = {}
        for source in self._container["envFrom"]:
            env |= deploy.manifest("ConfigMap", source["configMapRef"]["name"])["data"] | self._overlay
        for variable in self._container["env"]:
            wanted = variable["valueFrom"]["secretKeyRef"]
            held = secrets[wanted["name"]]
            if wanted["key"] in held or not wanted.get("optional"):
                env[variable["name"]] = held[wanted["key"]]
        return env

    @property
    def url(self) -> str:
        [port] = self._container["ports"]
        return f"http://{self._network.address(self.name)}:{port['containerPort']}"

    def probe(self, kind: str) -> bool:
        """`kind` is livenessProbe or readinessProbe."""
        probe = self._container[kind]
        [port] = [port for port in self._container["ports"] if port["name"] == probe["httpGet"]["port"]]
        url = f"http://{self._network.address(self.name)}:{port['containerPort']}{probe['httpGet']['path']}"
        try:
            return 200 <= httpx.get(url, timeout=probe["timeoutSeconds"], verify=False).status_code < 400
        except httpx.TransportError:
            return False

    def terminate(self, *, less: float = 0) -> int:
        """preStop, then SIGTERM. The grace period, which counts from preStop on, may be `less`; a pod that needs longer
        would be killed, which is an error here. Returns the exit code.
        """
        began = time.monotonic()
        grace = self._spec["terminationGracePeriodSeconds"] - less
        hook = self._container.get("lifecycle", {}).get("preStop")
        if hook is not None:
            command = hook["exec"]["command"]
            subprocess.run([*program(command[0]), *command[1:]], timeout=grace, check=True)
        return self.process.stop(grace - (time.monotonic() - began))
