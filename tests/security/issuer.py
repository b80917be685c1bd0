"""A token issuer on loopback: keys, tokens, and a real HTTP server for its JWKS that can be slow, broken or down."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms
from starlette.types import Scope

from broker.settings import Settings

SECRET = "a-secret-of-more-than-sixty-four-bytes-" * 2
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
P384_KEY = ec.generate_private_key(ec.SECP384R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def settings(**values: Any) -> Settings:
    return Settings(**({"jwt_leeway_seconds": 10} | values))


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims with some changed; a None takes the claim away."""
    now = int(time.time())
    good = {"iss": "stream-broker", "aud": "stream-broker", "sub": "ada", "iat": now, "exp": now + 60}
    return {name: value for name, value in (good | changes).items() if value is not None}


def sign(payload: Mapping[str, Any], key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(dict(payload), key, algorithm=algorithm, headers=header or None)


def sign_bytes(header: Any, payload: bytes, key: Any = SECRET, algorithm: str = "HS256") -> str:
    """A correct signature over what `jwt.encode` would refuse to write."""
    signed = ".".join(jwt.utils.base64url_encode(part).decode() for part in (json.dumps(header).encode(), payload))
    handler = get_default_algorithms()[algorithm]
    signature = handler.sign(signed.encode(), handler.prepare_key(key))
    return f"{signed}.{jwt.utils.base64url_encode(signature).decode()}"


def request(*headers: tuple[str, str], method: str = "GET") -> Scope:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "method": method, "path": "/runs", "query_string": b"", "headers": raw}


def bearer(token: str) -> Scope:
    return request(("Authorization", f"Bearer {token}"))


def pem(key: PrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def jwk(key: PrivateKey, kid: str | None = None, **members: Any) -> dict[str, Any]:
    name = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256", ed25519.Ed25519PrivateKey: "EdDSA"}
    algorithm = next(name for kind, name in name.items() if isinstance(key, kind))
    public = get_default_algorithms()[algorithm].to_jwk(key.public_key(), as_dict=True)
    public.pop("key_ops", None)
    return public | ({} if kid is None else {"kid": kid}) | members


class Issuer:
    """Serves `keys` at `url`. A context manager; `stop` and `start` may follow each other, on the same port."""

    def __init__(self, keys: Iterable[Any] = ()) -> None:
        self.keys = list(keys)
        self.fetches = 0
        self.paths: list[str] = []
        self.delay = 0.0
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None
        self.trickle = 0.0
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/jwks.json"

    def start(self) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.fetches += 1
        self.paths.append(handler.path)
        time.sleep(self.delay)
        body = json.dumps({"keys": self.keys}).encode() if self.body is None else self.body
        try:
            handler.send_response(self.status)
            for name, value in self.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            for byte in body if self.trickle else ():
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(self.trickle)
            if not self.trickle:
                handler.wfile.write(body)
        except ConnectionError:
            pass

    def __enter__(self) -> Issuer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
