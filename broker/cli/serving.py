"""The commands that run the service: serve, worker, token, demo.

They import what they need when they are called: completing a command must not load a web server.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1, 64), help="Gateways that share it.")
@click.option("--fd", type=click.IntRange(3), hidden=True, help="Serve on this inherited socket.")
def serve(host: str, port: int, processes: int, fd: int | None) -> None:
    """Run a gateway: the HTTP API and its event streams.

    It starts without a worker, and without Redis, but is ready only with Redis.
    """
    from broker import logs, settings
    from broker.gateway.main import serve as serve_gateway
    from broker.gateway.main import serve_many

    loaded = settings.load()
    loaded.check_serving(host)
    logs.configure()
    logs.print_settings(loaded, "gateway")
    if processes > 1:
        sys.exit(serve_many(loaded, host=host, port=port, processes=processes))
    sys.exit(serve_gateway(loaded, host=host, port=port, fd=fd))


@click.command()
def worker() -> None:
    """Run a worker: it takes runs off the queue and executes their agents."""
    from broker import logs, loop, settings
    from worker.main import serve as serve_worker

    loaded = settings.load()
    logs.configure()
    logs.print_settings(loaded, "worker")
    sys.exit(loop.run(serve_worker(loaded)))


@click.command()
@click.option("--sub", required=True, help="Whose runs the token opens: its `sub`.")
@click.option("--tenant", help="The tenant; the subject where there is none.")
@click.option("--ttl", default=3600, show_default=True, type=click.IntRange(1), help="Life in seconds.")
@click.option("--scope", multiple=True, help="A scope, such as broker:tenant; may be repeated.")
def token(sub: str, tenant: str | None, ttl: int, scope: tuple[str, ...]) -> None:
    """Print a bearer token, signed with BROKER_JWT_SECRET."""
    from broker import settings
    from broker.gateway.auth import mint

    loaded = settings.load()
    click.echo(mint(loaded, subject=sub, tenant=tenant, ttl=ttl, scopes=scope))


@click.command()
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--docs", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Documents to search.")
@click.option("--model-stub", is_flag=True, help="Try `chat` without a model: a stand-in answers.")
def demo(port: int, docs: Path | None, model_stub: bool) -> None:
    """Run everything on this machine: Redis, a gateway and a worker, until Ctrl-C.

    Its data and logs are in .demo/ below the current directory, or where BROKER_DEMO_DIR says, and outlive it.
    It starts a Redis of its own, unless BROKER_REDIS_URL is set. It asks for no token, unless BROKER_JWT_SECRET is
    set. Without --docs it searches this project's own documentation.
    """
    from broker.demo.run import run

    sys.exit(run(port=port, docs=docs, model_stub=model_stub))
