"""A real nginx in front of gateways, as a deployment would have it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.kit.processes import wait_for
from tests.kit.redis_server import free_port

# HTTP/1.1 to the gateways, nothing buffered, and a gateway that is gone or says 503 is passed over: submits can be
# repeated (P1), so POSTs too. max_fails=0, because each 503 that it passes over counts as a failure of the server, and
# one that failed is left out for ten seconds: while Redis is away, or in a rolling update, that would be all of them.
_CONFIG = """
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream gateways {{
        {servers}
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://gateways;
            proxy_http_version {http_version};
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffering {buffering};
            proxy_connect_timeout 2s;
            proxy_read_timeout {read_timeout};
            proxy_next_upstream error timeout http_503 non_idempotent;
            {extra}
        }}
    }}
}}
"""


def find() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def readiness(url: str) -> int:
    """The status with which a proxy passes on that a gateway is ready; 0 where it does not listen yet."""
    try:
        return httpx.get(url + "/readyz", verify=False).status_code
    except httpx.TransportError:
        return 0


class Nginx:
    def __init__(
        self,
        folder: Path,
        ports: Sequence[int],
        *,
        buffering: str = "off",
        http_version: str = "1.1",
        read_timeout: str = "60s",
        extra: str = "",
    ) -> None:
        """`extra` are more directives of the location."""
        binary = find()
        assert binary is not None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        servers = "\n        ".join(f"server 127.0.0.1:{port} max_fails=0;" for port in ports)
        user = "user root;" if os.getuid() == 0 else ""
        self._folder = folder
        folder.mkdir(exist_ok=True)
        config = _CONFIG.format(
            folder=folder,
            port=self.port,
            servers=servers,
            user=user,
            buffering=buffering,
            http_version=http_version,
            read_timeout=read_timeout,
            extra=extra,
        )
        (folder / "nginx.conf").write_text(config)
        command = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        self._process = subprocess.Popen(command)

    def until_ready(self) -> Nginx:
        wait_for(lambda: self.answer() == 200)
        return self

    def answer(self) -> int:
        assert self._process.poll() is None, self.errors()
        return readiness(self.url)

    def errors(self) -> str:
        return (self._folder / "error.log").read_text("utf-8")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
