"""The settings: `BROKER_…` variables, read once, typed and checked. docs/settings.md is their table."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from broker.errors import Misconfigured
from broker.redis_url import parse as parse_redis_url

MIN_SECRET_BYTES = 32
YEAR = 365 * 86400.0
LONGEST_RETRY_SECONDS = 3.0
"""The longest pause that `retry:` asks of a client."""
_AGENT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_AGENT_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_DIALECT = re.compile(r"[a-z][a-z_]*(=(/[A-Za-z0-9._~-]+)+)?")
BUILT_IN_AGENTS = ("research", "chat")

CommaSeparated = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Every setting with its default. Seconds are floats; `None` and empty mean off."""

    model_config = SettingsConfigDict(
        env_prefix="BROKER_", extra="ignore", frozen=True, env_ignore_empty=True, allow_inf_nan=False
    )

    redis_url: str = Field("redis://127.0.0.1:6379", description="The Redis that holds the runs.")
    queue_redis_url: str | None = Field(None, description="The Redis that holds the queue; the same by default.")

    durability: Literal["fast", "replicated"] = Field(
        "fast", description="`replicated`: what was accepted or ended is on a replica before it is answered."
    )

    auth: Literal["jwt", "none"] = Field(
        "jwt", description="`jwt` needs a key; `none` is for loopback only, and everyone is one owner."
    )
    jwt_secret: SecretStr | None = Field(
        None, description=f"Key for HS256, HS384 and HS512; at least {MIN_SECRET_BYTES} bytes."
    )
    jwt_jwks_url: str | None = Field(None, description="Where the public keys for RS…, PS…, ES… and EdDSA are.")
    jwt_algorithms: CommaSeparated = Field(
        (), description="Accepted algorithms. Default: HS256 with a secret, RS256 and ES256 with a JWKS."
    )
    jwt_audience: str = Field("stream-broker", description="The `aud` that a token must have.")
    jwt_issuer: str = Field("stream-broker", description="The `iss` that a token must have, exactly.")
    jwt_tenant_claim: str = Field("tenant", description="The claim with the tenant; without it, `sub` is the tenant.")
    jwt_leeway_seconds: float = Field(10, ge=0, le=300, description="Tolerance for `exp`, `nbf` and `iat`.")
    ticket_key: SecretStr | None = Field(
        None,
        description="Signs tickets, the same for all gateways; by default made from BROKER_JWT_SECRET. At least "
        f"{MIN_SECRET_BYTES} bytes; several are separated by commas, and the first one signs.",
    )
    ticket_seconds: float = Field(
        600, ge=1, le=86400, description="How long a ticket for a run's stream is valid, and the stream with it."
    )

    heartbeat_seconds: float = Field(15, ge=0.1, description="An idle stream gets bytes at least this often.")
    lease_seconds: float = Field(15, ge=1, description="How long a worker's claim holds without renewal.")
    retention_seconds: float = Field(86400, ge=1, le=10 * YEAR, description="How long a finished run can be read.")
    max_attempts: int = Field(3, ge=1, description="Attempts a run may lose before it fails.")
    max_run_seconds: float = Field(
        3600, gt=0, le=YEAR, description="Limit of a run, from its first claim, over all attempts."
    )
    max_jobs: int = Field(100, ge=1, description="Runs at once in one worker.")
    send_timeout_seconds: float = Field(30, gt=0, description="A client that reads nothing for this long is cut.")
    max_stream_seconds: float | None = Field(None, gt=0, description="Streams are cut after this time; off by default.")
    drain_delay_seconds: float = Field(1, ge=0, description="On SIGTERM: unready, but still accepting, for this long.")
    grace_seconds: float = Field(30, ge=0, description="On SIGTERM a worker lets its runs end within this time.")

    agents: CommaSeparated = Field((), description="Agents beside the built-in ones: `name=module:agent`, …")
    default_agent: str = Field("research", description="The agent of a submit that names none.")
    docs: Path | None = Field(None, description="The folder that `research` searches, and `chat`.")

    model: str | None = Field(None, description="The model that `chat` and `research` ask; OPENAI_BASE_URL is where.")
    models: CommaSeparated = Field((), description="Models that a run may choose instead; `*` is any. None by default.")
    model_api: Literal["auto", "completions", "responses"] = Field(
        "auto", description="`auto`: Responses where the server has it, else Chat Completions."
    )
    model_stall_seconds: float = Field(120, gt=0, description="A model that sends nothing for this long has failed.")
    model_retry_seconds: float = Field(
        120, ge=0, description="How long a model that fails before its first token is asked again."
    )
    system_prompt: str | None = Field(None, description="What `chat` tells the model first.")
    tools: CommaSeparated = Field((), description="Modules with tools for `chat`: `module`, …")
    tool_seconds: float = Field(30, gt=0, description="How long a tool may take that names no limit of its own.")
    max_rounds: int = Field(10, ge=1, description="How often a run may ask the model, tool calls between.")
    history_tokens: int = Field(
        8000, ge=0, description="The most of a session's earlier runs that `chat` tells the model."
    )
    agent_processes: int = Field(0, ge=0, le=64, description="Processes that agents run in; 0: in the worker itself.")

    dialects: CommaSeparated = Field(
        (), description="The dialects that are served, all by default: `name` or `name=/path`, …"
    )
    query_token: bool = Field(
        False, description="Whether the dialect `prompt` takes a token as `?access_token=`, which proxies may log."
    )
    aisdk_reset_step: bool = Field(
        False, description="`aisdk` takes text back with `reset-step`, which only ai 7.0.70 and later know."
    )
    cors_origins: CommaSeparated = Field((), description="Origins of web pages that may call; none by default.")

    @field_validator("jwt_algorithms", "agents", "models", "tools", "dialects", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("agents")
    @classmethod
    def _agents_are_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            name, _, target = item.partition("=")
            if not _AGENT_NAME.fullmatch(name) or not _AGENT_TARGET.fullmatch(target):
                raise ValueError(f"{item!r} is not of the form name=module:agent (names: a-z, 0-9, _, -)")
        return value

    @field_validator("dialects")
    @classmethod
    def _dialects_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            if not _DIALECT.fullmatch(item):
                raise ValueError(f"{item!r} is not of the form name or name=/path (no slash at the end)")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
                raise ValueError(f"{origin!r} is not an origin such as https://app.example.com")
        return value

    @field_validator("redis_url", "queue_redis_url")
    @classmethod
    def _redis_urls_are_ours(cls, value: str | None) -> str | None:
        if value is not None:
            parse_redis_url(value)
        return value

    @model_validator(mode="after")
    def _queue_is_not_on_a_cluster(self) -> Settings:
        if parse_redis_url(self.queue_url).kind == "cluster":
            raise ValueError(
                "BROKER_QUEUE_REDIS_URL must be set to a Redis of its own, redis://… or redis+sentinel://…: "
                "the queue cannot be on a Cluster."
            )
        return self

    @model_validator(mode="after")
    def _default_agent_exists(self) -> Settings:
        if self.default_agent not in self.agent_names:
            raise ValueError(f"BROKER_DEFAULT_AGENT={self.default_agent!r} is not one of {', '.join(self.agent_names)}")
        return self

    @field_validator("ticket_key")
    @classmethod
    def _ticket_keys_are_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and any(len(key.encode()) < MIN_SECRET_BYTES for key in _parts(value)):
            raise ValueError(f"each key must have at least {MIN_SECRET_BYTES} bytes")
        return value

    @property
    def ticket_keys(self) -> tuple[str, ...]:
        """Under the first one tickets are signed; all are accepted."""
        return _parts(self.ticket_key) if self.ticket_key else ()

    @property
    def agent_targets(self) -> dict[str, str]:
        """The agents that the user registered: name -> `module:agent`."""
        return dict(item.split("=", 1) for item in self.agents)

    @property
    def agent_names(self) -> tuple[str, ...]:
        return (*BUILT_IN_AGENTS, *(name for name in self.agent_targets if name not in BUILT_IN_AGENTS))

    @property
    def key_life_ms(self) -> int:
        """How long an idempotency key is kept from a run's claim on: an hour longer than its record."""
        return int((self.retention_seconds + self.max_run_seconds + 3600) * 1000)

    @property
    def least_unwatched_seconds(self) -> float:
        """The least that a submit may ask for with `cancel_if_unwatched`: the longest pause before a client comes back,
        and the time in which its gateway says that it is there."""
        return LONGEST_RETRY_SECONDS + max(self.lease_seconds, self.heartbeat_seconds)

    @property
    def queue_url(self) -> str:
        return self.queue_redis_url or self.redis_url

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The accepted JWT algorithms, the default resolved."""
        if self.jwt_algorithms:
            return self.jwt_algorithms
        return (("HS256",) if self.jwt_secret else ()) + (("RS256", "ES256") if self.jwt_jwks_url else ())

    def check_serving(self, host: str) -> None:
        """Refuses to start a gateway that would be open or could accept no token. Raises Misconfigured."""
        if self.auth == "none":
            if not is_loopback(host):
                raise Misconfigured(
                    f"BROKER_AUTH=none serves loopback only, not {host!r}. Use --host 127.0.0.1, or BROKER_AUTH=jwt."
                )
            return
        if self.jwt_secret is None and self.jwt_jwks_url is None:
            raise Misconfigured(
                "BROKER_AUTH=jwt needs a key: set BROKER_JWT_SECRET or BROKER_JWT_JWKS_URL "
                "(or BROKER_AUTH=none, on loopback only)."
            )
        self.check_secret()

    def check_secret(self) -> None:
        """Raises Misconfigured where the HMAC key is shorter than its hash."""
        hmac = [name for name in self.algorithms if name.startswith("HS")]
        needed = max((int(name[2:]) // 8 for name in hmac), default=0)
        if hmac and (self.jwt_secret is None or len(self.jwt_secret.get_secret_value().encode()) < needed):
            raise Misconfigured(
                f"BROKER_JWT_SECRET must have at least {needed} bytes for {', '.join(hmac)}. "
                "Make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(48))'"
            )

    def redacted(self) -> dict[str, Any]:
        """All settings as they may be printed: no secret, no password of a URL."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        for name in ("redis_url", "queue_redis_url", "jwt_jwks_url"):
            values[name] = redact_url(values[name]) if values[name] else None
        return {name: str(v) if isinstance(v, (Path, SecretStr)) else v for name, v in values.items()}


def _parts(secret: SecretStr) -> tuple[str, ...]:
    return tuple(part.strip() for part in secret.get_secret_value().split(","))


def load() -> Settings:
    """Reads the environment. Raises Misconfigured, which names the variable and what is wrong with it."""
    try:
        return Settings()
    except ValidationError as error:
        lines = []
        for item in error.errors(include_input=False, include_url=False):
            variable = "BROKER_" + str(item["loc"][0]).upper() + ": " if item["loc"] else ""
            lines.append(variable + item["msg"].removeprefix("Value error, "))
        raise Misconfigured("; ".join(lines)) from None


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, without a port) is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def redact_url(url: str) -> str:
    parts = urlsplit(url)
    if not parts.password and not parts.username and not parts.query:
        return url
    host = parts.netloc.rpartition("@")[2]
    user = parts.username or ""
    secret = ":***" if parts.password else ""
    return urlunsplit(parts._replace(netloc=f"{user}{secret}@{host}" if user or secret else host, query=""))
