"""deploy/: every file is valid by its schema, and what one file says fits what the others and the code say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
from ruamel.yaml.constructor import DuplicateKeyError

from broker import settings
from broker.cli import cli, serving
from broker.errors import Misconfigured
from broker.gateway import server
from broker.gateway.dialects.aisdk import messages
from broker.gateway.dialects.openai import body
from broker.gateway.requests import MAX_BODY, MAX_WAIT_SECONDS
from broker.settings import Settings
from tests.kit import deploy
from tests.kit.processes import SECRET
from worker.main import END_SECONDS

MODELS = {"BROKER_MODEL": "qwen3", "BROKER_MODELS": "llama,phi"}
SERVER = {"OPENAI_BASE_URL": "http://models.example.com/v1", "OPENAI_API_KEY": "a key"}
COMPOSE = deploy.compose({"BROKER_JWT_SECRET": SECRET, **MODELS, **SERVER})["services"]
MANIFESTS = deploy.manifests()
DEPLOYMENTS = {role: deploy.manifest("Deployment", f"stream-broker-{role}") for role in ("gateway", "worker")}
SECRETS = {
    "redis-url": "redis://redis.example.com:6379",
    "jwt-secret": SECRET,
    "openai-api-key": SERVER["OPENAI_API_KEY"],
}
VARIABLES = {"OPENAI_BASE_URL", "OPENAI_API_KEY", *(f"BROKER_{name.upper()}" for name in Settings.model_fields)}
WORKERS = {"BROKER_DOCS", *SERVER}
"""What only workers are given; only gateways are given the key."""
VERSIONS = [f"1.{minor}" for minor in range(27, int(kubernetes_validate.latest_version().split(".")[1]) + 1)]

P17_SECONDS = 10
"""From SIGTERM to a gateway's exit, at most."""


def spec(role: str) -> dict[str, Any]:
    found: dict[str, Any] = DEPLOYMENTS[role]["spec"]["template"]["spec"]
    return found


def environments() -> dict[str, dict[str, str]]:
    """The variables of every container of ours."""
    found = {f"compose {name}": COMPOSE[name]["environment"] for name in ("gateway-1", "gateway-2", "worker")}
    data = deploy.manifest("ConfigMap", "stream-broker")["data"]
    for role, deployment in DEPLOYMENTS.items():
        container = deploy.container(deployment)
        secrets = {item["name"]: SECRETS[item["valueFrom"]["secretKeyRef"]["key"]] for item in container["env"]}
        found[f"kubernetes {role}"] = data | secrets
    return found


ENVIRONMENTS = environments()
COMMANDS = {
    "Dockerfile": json.loads(deploy.instruction("CMD")),
    **{f"compose {name}": COMPOSE[name]["command"] for name in ("gateway-1", "gateway-2", "worker")},
    **{f"kubernetes {role}": deploy.container(DEPLOYMENTS[role])["args"] for role in DEPLOYMENTS},
}


def loaded(monkeypatch: pytest.MonkeyPatch, where: str) -> Settings:
    """The settings of a container as its process would have them."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENTS[where].items():
        monkeypatch.setenv(name, value)
    return settings.load()


# -- schemas -------------------------------------------------------------------------------------------------


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_compose_file_is_valid_by_the_compose_specification() -> None:
    done = check_compose(deploy.DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("stop_grace_period:", "stop_grace:"),
        ("condition: service_healthy", "condition: healthy"),
        ("replicas: 2", "replicas: [2]"),
        ("services:", "service:"),
    ],
)
def test_the_schema_of_compose_files_refuses_a_mistake(tmp_path: Path, right: str, wrong: str) -> None:
    text = (deploy.DEPLOY / "compose.yaml").read_text("utf-8")
    assert right in text
    (tmp_path / "compose.yaml").write_text(text.replace(right, wrong, 1), "utf-8")
    assert check_compose(tmp_path / "compose.yaml").returncode == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_valid_in_every_version_of_kubernetes_from_1_27_on(version: str) -> None:
    for manifest in MANIFESTS:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("gateway", "terminationGracePeriodSeconds:", "terminationGracePeriod:"),
        ("gateway", "averageUtilization: 60", "averageUtilization: 60%"),
        ("worker", "maxSkew: 1", "maxSkew: one"),
        ("ingress", "pathType: Prefix", "pathtype: Prefix"),
    ],
)
def test_the_schemas_of_manifests_refuse_a_mistake(tmp_path: Path, name: str, right: str, wrong: str) -> None:
    text = (deploy.BASE / f"{name}.yaml").read_text("utf-8")
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong), "utf-8")
    with pytest.raises(kubernetes_validate.ValidationError):
        for manifest in deploy.documents(tmp_path / "wrong.yaml"):
            kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("kind: Service\nkind: Ingress\n")
    with pytest.raises(DuplicateKeyError):
        deploy.documents(tmp_path / "twice.yaml")


def test_the_kustomization_lists_every_manifest() -> None:
    [kustomization] = deploy.documents(deploy.BASE / "kustomization.yaml")
    files = {path.name for path in deploy.BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert sorted(kustomization["resources"]) == sorted(files)
    [image] = kustomization["images"]
    assert {deploy.container(deployment)["image"] for deployment in DEPLOYMENTS.values()} == {image["name"]}


def test_every_kind_that_a_service_of_two_roles_needs_is_there_once_and_in_no_namespace() -> None:
    found = sorted((manifest["kind"], manifest["metadata"]["name"]) for manifest in MANIFESTS)
    assert found == [
        ("ConfigMap", "stream-broker"),
        ("Deployment", "stream-broker-gateway"),
        ("Deployment", "stream-broker-worker"),
        ("HorizontalPodAutoscaler", "stream-broker-gateway"),
        ("HorizontalPodAutoscaler", "stream-broker-worker"),
        ("Ingress", "stream-broker"),
        ("PodDisruptionBudget", "stream-broker-gateway"),
        ("PodDisruptionBudget", "stream-broker-worker"),
        ("Service", "stream-broker"),
    ]
    assert not any("namespace" in manifest["metadata"] for manifest in MANIFESTS)


# -- commands and settings -----------------------------------------------------------------------------------


def test_the_image_runs_the_projects_own_command() -> None:
    [name] = deploy.entrypoint()
    assert f'{name} = "broker.cli:main"' in (deploy.ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("where", COMMANDS)
def test_every_command_is_one_that_the_broker_takes(where: str) -> None:
    name, *arguments = COMMANDS[where]
    command = cli.commands[name]
    command.make_context(name, list(arguments))
    with pytest.raises(click.UsageError):
        command.make_context(name, [*arguments, "--no-such-option"])


@pytest.mark.parametrize("where", ENVIRONMENTS)
def test_every_variable_is_a_setting_and_every_value_is_acceptable(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENVIRONMENTS[where].keys() <= VARIABLES
    found = loaded(monkeypatch, where)
    if COMMANDS[where][0] == "serve":
        context = serving.serve.make_context("serve", COMMANDS[where][1:])
        found.check_serving(context.params["host"])


def test_every_variable_that_deploy_and_its_page_name_is_a_setting() -> None:
    for path in [deploy.ROOT / "docs" / "deploy.md", *(path for path in deploy.DEPLOY.rglob("*") if path.is_file())]:
        named = set(re.findall(r"(?:BROKER|OPENAI)_[A-Z_]*[A-Z]", path.read_text("utf-8")))
        assert named <= VARIABLES, path


def test_gateways_and_workers_have_the_same_settings() -> None:
    """But for the key, which only gateways need, and the documents and the model server, which only workers do."""
    for deployed in ("compose", "kubernetes"):
        of_one = [
            {name: value for name, value in env.items() if name not in {"BROKER_JWT_SECRET", *WORKERS}}
            for where, env in ENVIRONMENTS.items()
            if where.startswith(deployed)
        ]
        assert all(other == of_one[0] for other in of_one[1:])


# -- the model -----------------------------------------------------------------------------------------------


def test_workers_get_the_model_server_and_nobody_else_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (MODELS | SERVER).items() <= ENVIRONMENTS["compose worker"].items()
    assert loaded(monkeypatch, "compose worker").model == MODELS["BROKER_MODEL"]
    assert ENVIRONMENTS["kubernetes worker"]["OPENAI_API_KEY"] == SERVER["OPENAI_API_KEY"]
    for where, environment in ENVIRONMENTS.items():
        assert ("OPENAI_API_KEY" in environment) == ("worker" in where), where


@pytest.mark.parametrize("name", ["gateway-1", "gateway-2"])
def test_a_request_for_a_response_may_name_each_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_gateway = loaded(monkeypatch, f"compose {name}")
    for model in ("qwen3", "llama", "phi"):
        asked = body.read({"model": model, "input": "q"}, of_gateway)
        assert (asked.agent, asked.parameters["model"]) == ("chat", model)


def test_a_worker_starts_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = deploy.compose({"BROKER_JWT_SECRET": SECRET})["services"]["worker"]["environment"]
    monkeypatch.setitem(ENVIRONMENTS, "compose worker", environment)
    found = loaded(monkeypatch, "compose worker")
    assert (found.model, found.models) == (None, ())
    [key] = [item for item in deploy.container(DEPLOYMENTS["worker"])["env"] if item["name"] == "OPENAI_API_KEY"]
    assert key["valueFrom"]["secretKeyRef"]["optional"] is True


# -- secrets -------------------------------------------------------------------------------------------------


def test_compose_starts_nothing_without_a_key_and_says_which_variable_is_missing() -> None:
    for variables in ({}, {"BROKER_JWT_SECRET": ""}):
        with pytest.raises(deploy.Refused, match="BROKER_JWT_SECRET"):
            deploy.compose(variables)


def test_a_key_that_is_too_short_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENTS["compose gateway-1"], "BROKER_JWT_SECRET", "short")
    with pytest.raises(Misconfigured, match="BROKER_JWT_SECRET"):
        loaded(monkeypatch, "compose gateway-1").check_serving("0.0.0.0")


def test_no_file_holds_a_secret_and_only_gateways_get_the_key() -> None:
    for where, environment in ENVIRONMENTS.items():
        assert ("BROKER_JWT_SECRET" in environment) == ("gateway" in where), where
    for path in (path for path in deploy.DEPLOY.rglob("*") if path.is_file()):
        assert not re.search(r"(?i)(secret|password|token)\w*\s*[=:]\s*[\"']?[\w-]{20,}", path.read_text("utf-8")), path
    assert not any(manifest["kind"] == "Secret" for manifest in MANIFESTS)
    assert "jwt" not in (deploy.BASE / "settings.env").read_text("utf-8").lower()
    assert not any("SECRET" in arguments for name, arguments in deploy.image() if name in ("ENV", "ARG"))


def test_what_comes_from_the_secret_is_what_the_page_says_it_must_hold() -> None:
    page = (deploy.ROOT / "docs" / "deploy.md").read_text("utf-8")
    wanted = set()
    for deployment in DEPLOYMENTS.values():
        for variable in deploy.container(deployment)["env"]:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert f"create secret generic {reference['name']}" in page
            wanted.add(reference["key"])
    assert set(re.findall(r"--from-literal=([\w-]+)=", page)) == wanted


# -- times ---------------------------------------------------------------------------------------------------


def prestop_seconds(role: str) -> float:
    """Of `sleep <seconds>`, which is all that a preStop here does."""
    hook = deploy.container(DEPLOYMENTS[role]).get("lifecycle", {}).get("preStop")
    if hook is None:
        return 0
    name, seconds = hook["exec"]["command"]
    assert name == "sleep"
    return float(seconds)


def graces() -> dict[str, float]:
    """Seconds between SIGTERM and SIGKILL."""
    found = {f"compose {name}": deploy.seconds(COMPOSE[name]["stop_grace_period"]) for name in COMPOSE}
    for role in DEPLOYMENTS:
        found[f"kubernetes {role}"] = spec(role)["terminationGracePeriodSeconds"] - prestop_seconds(role)
    return found


@pytest.mark.parametrize("where", ["compose gateway-1", "compose gateway-2", "kubernetes gateway"])
def test_a_gateway_has_the_time_to_drain(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(monkeypatch, where)
    drain = found.drain_delay_seconds + server.END_SECONDS
    assert drain <= P17_SECONDS
    assert graces()[where] >= P17_SECONDS


@pytest.mark.parametrize("where", ["compose worker", "kubernetes worker"])
def test_a_worker_has_the_time_to_let_its_runs_end(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(monkeypatch, where)
    assert graces()[where] >= found.grace_seconds + END_SECONDS


def test_the_page_says_how_long_an_end_takes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text("utf-8")
    assert f"`BROKER_DRAIN_DELAY_SECONDS` + {server.END_SECONDS}," in page
    assert f"`BROKER_GRACE_SECONDS` + {END_SECONDS:g}," in page


def test_a_gateway_still_accepts_while_the_proxies_hear_that_it_ends() -> None:
    """Endpoints are taken off while preStop runs, and that takes a moment everywhere; a worker has no endpoint."""
    assert prestop_seconds("gateway") >= 5
    assert prestop_seconds("worker") == 0


def test_redis_outlives_those_who_write_to_it() -> None:
    """Compose stops in the reverse order of depends_on."""
    for name in ("gateway-1", "gateway-2", "worker"):
        assert COMPOSE[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    for name in ("gateway-1", "gateway-2"):
        assert COMPOSE["nginx"]["depends_on"][name] == {"condition": "service_healthy"}


def read_timeouts() -> dict[str, float]:
    annotations = deploy.manifest("Ingress", "stream-broker")["metadata"]["annotations"]
    [nginx] = deploy.directive("proxy_read_timeout")
    return {
        "nginx.conf": deploy.seconds(nginx),
        "ingress-nginx": float(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]),
        "F5": deploy.seconds(annotations["nginx.org/proxy-read-timeout"]),
    }


@pytest.mark.parametrize("where", read_timeouts())
def test_a_proxy_waits_longer_than_a_heartbeat_and_than_a_poll_is_held(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gateway in ("compose gateway-1", "kubernetes gateway"):
        assert read_timeouts()[where] >= 2 * loaded(monkeypatch, gateway).heartbeat_seconds
        assert read_timeouts()[where] >= MAX_WAIT_SECONDS + 10


def test_a_proxy_drops_idle_connections_before_the_gateway_does() -> None:
    """Else a POST may be sent on a connection that is just being closed, and is then lost: it is not sent again."""
    [theirs] = [deploy.seconds(value) for value in deploy.directive("keepalive_timeout")]
    assert theirs + 10 <= server.configure(lambda *_: None, send_timeout=30).timeout_keep_alive  # type: ignore[arg-type]


def test_a_probe_is_answered_within_its_time_and_an_outage_of_redis_sends_no_gateway_away() -> None:
    container = deploy.container(DEPLOYMENTS["gateway"])
    for kind in ("livenessProbe", "readinessProbe"):
        assert container[kind]["timeoutSeconds"] <= container[kind]["periodSeconds"]
    ready, live = container["readinessProbe"], container["livenessProbe"]
    assert (live["httpGet"]["path"], ready["httpGet"]["path"]) == ("/healthz", "/readyz")
    assert ready["periodSeconds"] * ready["failureThreshold"] >= 60
    worker = deploy.container(DEPLOYMENTS["worker"])
    assert not {"livenessProbe", "readinessProbe", "startupProbe"} & worker.keys()
    assert DEPLOYMENTS["worker"]["spec"]["minReadySeconds"] >= 10


# -- sizes, ports, names -------------------------------------------------------------------------------------


def test_proxies_let_bodies_through_that_the_gateway_refuses_itself() -> None:
    annotations = deploy.manifest("Ingress", "stream-broker")["metadata"]["annotations"]
    sizes = [
        *deploy.directive("client_max_body_size"),
        annotations["nginx.ingress.kubernetes.io/proxy-body-size"],
        annotations["nginx.org/client-max-body-size"],
    ]
    assert all(int(size.removesuffix("m")) * 1024 * 1024 > max(MAX_BODY, messages.MAX_BODY) for size in sizes)
    assert f"larger than {MAX_BODY} bytes" in (deploy.DEPLOY / "nginx.conf").read_text("utf-8")


def test_no_proxy_sends_a_post_twice() -> None:
    annotations = deploy.manifest("Ingress", "stream-broker")["metadata"]["annotations"]
    for value in [
        *deploy.directive("proxy_next_upstream"),
        annotations["nginx.ingress.kubernetes.io/proxy-next-upstream"],
    ]:
        assert "non_idempotent" not in value


def port_of(command: list[str]) -> int:
    port: int = serving.serve.make_context("serve", command[1:]).params["port"]
    return port


def test_ports_agree() -> None:
    port = int(deploy.instruction("EXPOSE"))
    assert {port_of(command) for command in COMMANDS.values() if command[0] == "serve"} == {port}
    assert f"127.0.0.1:{port}" in deploy.instruction("HEALTHCHECK")
    for name in ("gateway-1", "gateway-2"):
        assert any(f"127.0.0.1:{port}" in part for part in COMPOSE[name]["healthcheck"]["test"])
    servers = {value.split()[0] for value in deploy.directive("server")}
    assert servers == {f"{name}:{port}" for name in COMPOSE if name.startswith("gateway")}
    listen = deploy.directive("listen")[0].split()[0]
    assert [mapping.split(":")[1] for mapping in COMPOSE["nginx"]["ports"]] == [listen]
    assert all("ports" not in service for name, service in COMPOSE.items() if name != "nginx")

    container = deploy.container(DEPLOYMENTS["gateway"])
    [named] = container["ports"]
    assert named["containerPort"] == port
    for kind in ("livenessProbe", "readinessProbe"):
        assert container[kind]["httpGet"]["port"] == named["name"]
    [exposed] = deploy.manifest("Service", "stream-broker")["spec"]["ports"]
    assert exposed["targetPort"] == named["name"]
    for rule in deploy.manifest("Ingress", "stream-broker")["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            assert path["backend"]["service"] == {"name": "stream-broker", "port": {"name": exposed["name"]}}


def test_labels_and_selectors_agree() -> None:
    for role, deployment in DEPLOYMENTS.items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == role
        assert deployment["spec"]["selector"]["matchLabels"] == labels
        budget = deploy.manifest("PodDisruptionBudget", f"stream-broker-{role}")["spec"]
        assert budget["selector"]["matchLabels"] == labels
        scaler = deploy.manifest("HorizontalPodAutoscaler", f"stream-broker-{role}")["spec"]
        assert scaler["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": deployment["metadata"]["name"],
        }
        assert "replicas" not in deployment["spec"]
        assert scaler["minReplicas"] > budget["maxUnavailable"], "an eviction leaves one"
        for constraint in spec(role)["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"] == labels
    assert (
        deploy.manifest("Service", "stream-broker")["spec"]["selector"]
        == (DEPLOYMENTS["gateway"]["spec"]["template"]["metadata"]["labels"])
    )


# -- what containers may do ----------------------------------------------------------------------------------


def test_nothing_of_ours_runs_as_root_or_can_become_it_or_writes_to_its_image() -> None:
    user, group = (int(part) for part in deploy.instruction("USER").split(":"))
    assert user > 0
    assert group > 0
    for role in DEPLOYMENTS:
        pod = spec(role)["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"], pod["runAsGroup"]) == (True, user, group)
        assert deploy.container(DEPLOYMENTS[role])["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for name in ("gateway-1", "gateway-2", "worker", "nginx"):
        service = COMPOSE[name]
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("user", "root" if name == "nginx" else "") != "root"


def test_redis_keeps_every_run_and_is_reached_by_nobody_outside() -> None:
    options = dict(zip(COMPOSE["redis"]["command"][1::2], COMPOSE["redis"]["command"][2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--maxmemory-policy"] == "noeviction"
    assert COMPOSE["redis"]["volumes"] == ["redis:/data"]
    assert "ports" not in COMPOSE["redis"]


def test_everything_in_compose_comes_back_after_a_crash() -> None:
    assert {service["restart"] for service in COMPOSE.values()} == {"unless-stopped"}
