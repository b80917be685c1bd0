"""What deploy/ says, read as Docker Compose, kustomize and nginx would read it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "k8s"

Manifest = dict[str, Any]


class Refused(Exception):
    """What `docker compose` would say instead of starting anything."""


def documents(path: Path) -> list[Any]:
    """A file's YAML documents. A key that comes twice is an error."""
    return list(YAML(typ="safe", pure=True).load_all(path.read_text("utf-8")))


# Compose


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml with its ${variables}. Raises Refused, as Compose would, where one that it needs is not set."""
    [file] = documents(DEPLOY / "compose.yaml")
    interpolated: dict[str, Any] = _interpolated(file, variables)
    return interpolated


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, variables) for item in value]
    return _VARIABLE.sub(lambda found: _value(found, variables), value) if isinstance(value, str) else value


_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<text>[^}]*))?\})")


def _value(found: re.Match[str], variables: Mapping[str, str]) -> str:
    if found["dollar"]:
        return "$"
    value = variables.get(found["name"], "")
    if not value and found["kind"] == "?":
        raise Refused(f"required variable {found['name']} is missing a value: {found['text']}")
    return value or (found["text"] if found["kind"] == "-" else "")


def seconds(text: str) -> float:
    """Of a duration such as `1m30s`, as Compose, Docker and nginx write it."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", text)
    assert "".join(number + unit for number, unit in parts) == text, text
    return sum(int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)


# Dockerfile


def image() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, those of the build stage too: [(instruction, its arguments)]."""
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / "Dockerfile").read_text("utf-8")).replace("\\\n", "")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in lines]


def instruction(name: str) -> str:
    """The arguments of the last one of this name, which is the one that counts."""
    return [arguments for found, arguments in image() if found == name][-1]


def entrypoint() -> list[str]:
    command: list[str] = json.loads(instruction("ENTRYPOINT"))
    return command


# Kubernetes


def manifests() -> list[Manifest]:
    """What `kustomize build deploy/k8s` gives, but for the hash in the ConfigMap's name."""
    [kustomization] = documents(BASE / "kustomization.yaml")
    found = [manifest for name in kustomization["resources"] for manifest in documents(BASE / name)]
    for generated in kustomization["configMapGenerator"]:
        data = dict(pair for name in generated["envs"] for pair in _pairs(BASE / name))
        metadata = {"name": generated["name"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    return found


def _pairs(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def manifest(kind: str, name: str) -> Manifest:
    [found] = [m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def container(deployment: Manifest) -> dict[str, Any]:
    """The only one of a Deployment's pods."""
    [found] = deployment["spec"]["template"]["spec"]["containers"]
    container: dict[str, Any] = found
    return container


# nginx


def directive(name: str) -> list[str]:
    """The arguments of each directive of this name in nginx.conf, as they stand there."""
    text = re.sub(r"(?m)#.*$", "", (DEPLOY / "nginx.conf").read_text("utf-8"))
    return re.findall(rf"(?m)^\s*{name}\s+([^;{{]+);", text)


def nginx_conf(folder: Path, listen: str, server: Callable[[str], str]) -> str:
    """nginx.conf for this machine: it listens on the address `listen`, writes below `folder`, and finds the gateways
    where `server` says, which translates each `host:port`. `resolve` is left out: there is no DNS, and older versions
    do not know it.
    """
    text = (DEPLOY / "nginx.conf").read_text("utf-8")
    text = re.sub(r"(?m)^(\s*)server (\S+) resolve", lambda m: f"{m[1]}server {server(m[2])}", text)
    text = re.sub(r"(?m)^(\s*)listen (\d+)", lambda m: f"{m[1]}listen {listen}:{m[2]}", text)
    return text.replace(" /tmp/", f" {folder}/")


class Network:
    """A loopback address for each name, so that what runs there can have the port that it would have in a container."""

    def __init__(self) -> None:
        self._prefix = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
        self._addresses: dict[str, str] = {}

    def address(self, name: str) -> str:
        return self._addresses.setdefault(name, f"{self._prefix}.{len(self._addresses) + 1}")

    def here(self, text: str, name: str) -> str:
        """`text` as it must read outside of the container `name`: names before a port are addresses, and what is this
        machine there is its own address.
        """
        for other, address in self._addresses.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(other)}(?=:\d)", address, text)
        return re.sub(r"\b(0\.0\.0\.0|127\.0\.0\.1)\b", self.address(name), text)
