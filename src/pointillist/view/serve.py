"""`pointillist view`: opens runs and serves their pages until it is stopped."""

import secrets
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click
import uvicorn

from pointillist.base.http_guard import uvicorn_config
from pointillist.base.logs import plain
from pointillist.base.net import LOOPBACK, http_url, key_from_environment
from pointillist.errors import ConfigError
from pointillist.view.index import cache_dir
from pointillist.view.run import ViewedRun
from pointillist.view.web.access import LIMITS_OF_REQUESTS
from pointillist.view.web.app import create_app


def serve(folders: Sequence[Path], host: str, port: int, api_key_var: str | None) -> None:
    """Serves the pages of some runs.

    Args:
        folders: The runs' output folders.
        host: Address to bind.
        port: Port to bind; 0 is a free one.
        api_key_var: Name of the environment variable with the token; without it one is made up unless `host` is
            loopback, where none is needed.

    Raises:
        ConfigError: The variable is not set, or the address cannot be bound.
        PointillistError: A folder holds no run.
    """
    token = _token(host, api_key_var)
    runs = open_runs(folders)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror})") from None
    app = create_app(runs, cache_dir() / "thumbnails", token)
    for run in runs:
        run.index.start()
    click.echo(f"viewing {plain(', '.join(run.name for run in runs))}: {_address(listener, token)}")
    try:
        config = uvicorn_config(app, LIMITS_OF_REQUESTS, host=host, port=port, lifespan="off")
        with suppress(KeyboardInterrupt):  # the way to end it
            uvicorn.Server(config).run([listener])
    finally:
        for run in runs:
            run.index.stop()


def open_runs(folders: Sequence[Path]) -> list[ViewedRun]:
    """The runs; where folders have the same name, the folder above is part of the run's name.

    Raises:
        PointillistError: A folder holds no run.
    """
    runs = [ViewedRun(folder, cache_dir()) for folder in folders]
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = f"{run.paths.output_dir.parent.name}/{run.name}"
    return runs


def _token(host: str, api_key_var: str | None) -> str | None:
    if api_key_var is None:
        return None if host in LOOPBACK else secrets.token_urlsafe(24)
    return key_from_environment(api_key_var, "the viewer's token")


def _address(listener: socket.socket, token: str | None) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - an address to listen on; people reach it by name
        host = socket.gethostname()
    url = f"{http_url(host, port)}/"
    return f"{url}?token={token}" if token is not None else url
