"""A certificate authority of the tests' own, and redis-servers that speak TLS."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.kit.redis_server import RedisServer, redis_binary


@dataclass(frozen=True)
class Certificates:
    """Files: the authority's certificate, and a server's certificate and key, which serve as a client's too."""

    ca: Path
    cert: Path
    key: Path

    @property
    def server(self) -> tuple[str, ...]:
        """Options of a redis-server; it asks its clients for no certificate."""
        files = ("--tls-ca-cert-file", str(self.ca), "--tls-cert-file", str(self.cert), "--tls-key-file", str(self.key))
        return (*files, "--tls-auth-clients", "no")

    @property
    def query(self) -> str:
        """Of a URL that trusts the authority."""
        return f"ssl_ca_certs={quote(str(self.ca))}"


def make_certificates(folder: Path, *names: str) -> Certificates:
    """Of a server that is `names`: 127.0.0.1 by default. The test is skipped where redis-server has no TLS."""
    if not _speaks_tls():
        pytest.skip("redis-server is built without TLS")
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("the tests' authority", ca_key, "the tests' authority", ca_key, ())
    cert = _certificate("redis", key, "the tests' authority", ca_key, names or ("127.0.0.1",))
    made = Certificates(folder / "ca.pem", folder / "redis.pem", folder / "redis.key")
    made.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    made.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return made


def _speaks_tls() -> bool:
    """It is asked to listen nowhere, and says so, or that it does not know the option."""
    command = [redis_binary(), "--port", "0", "--tls-port", "0"]
    done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    return b"Bad directive" not in done.stdout + done.stderr


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    names: tuple[str, ...],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
        key.public_key(),
        x509.random_serial_number(),
        now - day,
        now + day,
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class TlsServer(RedisServer):
    """A redis-server that speaks nothing but TLS. A context manager, too."""

    def __init__(self, folder: Path, certificates: Certificates, *options: str) -> None:
        super().__init__(folder, *options)
        self._options = ("--port", "0", "--tls-port", str(self.port), *certificates.server, *self._options)
        self.url = f"rediss://127.0.0.1:{self.port}?{certificates.query}"
        self._certificates = certificates

    @property
    def client_url(self) -> str:
        """With a client's certificate, for a server that asks for one."""
        return f"{self.url}&ssl_certfile={self._certificates.cert}&ssl_keyfile={self._certificates.key}"

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.client_url)

    def __enter__(self) -> TlsServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
