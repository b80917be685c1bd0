"""The URLs of a Redis: one server, a primary that Sentinels watch, or a Cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, unquote

Address = tuple[str, int]
"""Host and port."""
Kind = Literal["server", "sentinel", "cluster"]

_SCHEME = re.compile(r"(redis|rediss)(?:\+(sentinel|cluster))?")
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:@,\s]+))?(?::([0-9]{1,5}))?")
_KINDS: dict[str | None, Kind] = {None: "server", "sentinel": "sentinel", "cluster": "cluster"}
_DEFAULT_PORT: dict[Kind, int] = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_NOT_ENCODED = "special characters in a password must be percent-encoded"
_BOOLEANS = ("true", "false", "yes", "no", "1", "0")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_OPTIONS = (
    *("db", "username", "password", "socket_timeout", "socket_connect_timeout"),
    *("ssl_ca_certs", "ssl_ca_data", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"),
    *("ssl_ciphers", *_SENTINEL_OPTIONS),
)


@dataclass(frozen=True, kw_only=True)
class RedisUrl:
    kind: Kind
    plain: str = field(repr=False)
    """For redis-py: a URL of one server, with everything that all servers have in common."""
    nodes: tuple[Address, ...]
    """The server (none of a socket), the Sentinels, or the nodes that are asked for the others of a Cluster."""
    master: str = ""
    """The name by which the Sentinels know the primary."""
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)


def parse(url: str) -> RedisUrl:
    """Raises ValueError, whose text shows nothing of the URL that may be a password."""
    if url.startswith("fakeredis://"):
        return RedisUrl(kind="server", plain=url, nodes=())
    rest, _, query = url.partition("?")
    scheme, _, rest = rest.partition("://")
    if scheme == "unix":
        _check_options(query, ("db", "username", "password", "socket_timeout", "socket_connect_timeout"))
        return RedisUrl(kind="server", plain=url, nodes=())
    known = _SCHEME.fullmatch(scheme)
    if known is None or "://" not in url:
        raise ValueError(
            "use redis://, rediss:// or unix://; redis+sentinel:// or redis+cluster:// (with TLS: rediss+…)"
        )
    if "#" in url:
        raise ValueError(_NOT_ENCODED)
    plain = known[1]
    kind = _KINDS[known[2]]
    _check_options(query, [name for name in _OPTIONS if _is_option_of(name, plain, kind)])
    location, _, path = rest.partition("/")
    userinfo, at, hosts = location.rpartition("@")
    nodes = tuple(_address(host, _DEFAULT_PORT[kind]) for host in hosts.split(","))
    if kind == "server" and len(nodes) > 1:
        raise ValueError("several servers: use redis+sentinel:// or redis+cluster://")
    master, database = _path(kind, path)
    options = "&".join(part for part in query.split("&") if part.partition("=")[0] not in _SENTINEL_OPTIONS)
    own = dict(parse_qsl(query))
    return RedisUrl(
        kind=kind,
        plain=f"{plain}://{userinfo}{at}{_text(nodes[0])}/{database}{'?' if options else ''}{options}",
        nodes=nodes,
        master=master,
        sentinel_username=own.get("sentinel_username"),
        sentinel_password=own.get("sentinel_password"),
    )


def _address(text: str, default_port: int) -> Address:
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3] or default_port) < 65536:
        raise ValueError("this is no URL of a Redis, such as redis://127.0.0.1:6379")
    return match[1] or match[2] or "localhost", int(match[3] or default_port)


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _path(kind: Kind, path: str) -> tuple[str, str]:
    """The primary's name and the database's number."""
    master, database = "", path.rstrip("/")
    if kind == "sentinel":
        master, _, database = database.partition("/")
        if not master:
            raise ValueError("the name of the primary is missing: redis+sentinel://host:26379,host:26379/name")
    if database and not re.fullmatch("[0-9]{1,5}", database):
        raise ValueError("the database after the host is not a number")
    if kind == "cluster" and database.strip("0"):
        raise ValueError("a Cluster has only the database 0")
    return unquote(master), database


def _is_option_of(name: str, scheme: str, kind: Kind) -> bool:
    if name.startswith("ssl_"):
        return scheme == "rediss"
    if name.startswith("sentinel_"):
        return kind == "sentinel"
    return name != "db" or kind != "cluster"


def _check_options(query: str, known: list[str] | tuple[str, ...]) -> None:
    for name, value in parse_qsl(query, keep_blank_values=True):
        if "@" in query:  # a password with a raw "?" in it ends here
            raise ValueError(_NOT_ENCODED)
        if name not in known:
            raise ValueError(f"the option {name!r} is not one of {', '.join(known)}")
        if not _acceptable(name, value):
            raise ValueError(f"the option {name!r} has no acceptable value")


def _acceptable(name: str, value: str) -> bool:
    if name == "db":
        return re.fullmatch("[0-9]{1,5}", value) is not None
    if name in ("socket_timeout", "socket_connect_timeout"):
        return re.fullmatch(r"[0-9]{1,4}(\.[0-9]+)?", value) is not None and float(value) > 0
    if name == "ssl_cert_reqs":
        return value in ("none", "optional", "required")
    if name == "ssl_check_hostname":
        return value.lower() in _BOOLEANS
    return value != ""
