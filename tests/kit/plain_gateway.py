"""The gateway's application under uvicorn's own protocol classes: `python -m tests.kit.plain_gateway serve --port N`.

They do not offer their connections, so every stream goes through ASGI's `send`, the fall-back. PLAIN_HTTP says which
class: `httptools` or `h11`. Signals are the service's own: uvicorn alone waits for ever for open streams.
"""

from __future__ import annotations

import os
import sys

import uvicorn

from broker import logs, settings
from broker.gateway.app import make_app
from broker.gateway.server import SHUTDOWN_SECONDS, Server


def main(port: int) -> None:
    loaded = settings.load()
    logs.configure()
    app = make_app(loaded)
    gateway = app.state.gateway

    def drain() -> None:
        gateway.unready = True

    config = uvicorn.Config(
        app,
        port=port,
        http="h11" if os.environ.get("PLAIN_HTTP") == "h11" else "httptools",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    Server(config, drain_delay=loaded.drain_delay_seconds, on_drain=drain, on_cut=gateway.hub.drain).run()


if __name__ == "__main__":
    main(int(sys.argv[-1]))
