"""The metrics of a machine's processes at one address, for Prometheus: `GET /metrics`, and `GET /health` for people.

- `pointillist_<component>_<name>`: the newest record of each component's per-step metrics, on the run's head;
- `pointillist_process_up`, `_restarts_total`, `_resident_bytes` of each process;
- the metrics of the inference servers, with a label `process`.
"""

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final

import httpx
import psutil
import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pointillist.base.http_guard import Guard, HttpLimits, check_address, check_bearer, uvicorn_config
from pointillist.base.jsonl import is_number, read_jsonl
from pointillist.base.net import http_url, key_from_environment
from pointillist.config.shared import ServerConfig
from pointillist.launch.supervisor import Supervisor
from pointillist.runs.paths import RunPaths

_ANSWER_SECONDS: Final = 2.0
_STARTUP_SECONDS: Final = 10.0
_LIMITS: Final = HttpLimits(body_bytes=0, connections=64)
_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class RunCollector(Collector):
    """Reads everything anew at each request."""

    def __init__(self, paths: RunPaths | None, supervisor: Supervisor, headers: Mapping[str, str]) -> None:
        self._paths = paths
        self._supervisor = supervisor
        self._headers = headers

    def collect(self) -> Iterator[Metric]:
        """The metrics of this module's docstring."""
        if self._paths is not None:
            yield from self._steps(self._paths)
        yield from self._processes()
        yield from self._servers()

    def _steps(self, paths: RunPaths) -> Iterator[Metric]:
        for component in ("trainer", "orchestrator", "eval"):
            for record in read_jsonl(paths.metrics / f"{component}.jsonl")[-1:]:
                for name, value in record.items():
                    metric = re.sub(r"[^a-zA-Z0-9_]", "_", f"pointillist_{component}_{name}")
                    if is_number(value):
                        yield GaugeMetricFamily(metric, f"{name} of {component}, newest step", value=float(value))

    def _processes(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("pointillist_process_up", "Whether it runs and answers.", labels=["process"])
        restarts = CounterMetricFamily("pointillist_process_restarts", "Starts after the first.", labels=["process"])
        resident = GaugeMetricFamily("pointillist_process_resident_bytes", "Memory.", labels=["process"])
        for name, each in self._supervisor.watched.items():
            up.add_metric([name], float(each.is_up))
            restarts.add_metric([name], each.restarts)
            if each.child is not None:
                with suppress(psutil.Error):
                    resident.add_metric([name], psutil.Process(each.child.process.pid).memory_info().rss)
        yield from (up, restarts, resident)

    def _servers(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for name, each in self._supervisor.watched.items():
            if each.spec.metrics_url is None:
                continue
            with suppress(httpx.HTTPError, ValueError, LookupError):  # the last two: text that is no metrics
                answer = httpx.get(
                    each.spec.metrics_url, headers=self._headers, timeout=_ANSWER_SECONDS, trust_env=False
                )
                for family in text_string_to_metric_families(answer.raise_for_status().text):
                    mine = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    for sample in family.samples:
                        mine.add_sample(sample.name, {**sample.labels, "process": name}, sample.value)
        yield from merged.values()


class MetricsEndpoint:
    """A small server in a thread of the launcher."""

    def __init__(
        self, config: ServerConfig, paths: RunPaths | None, supervisor: Supervisor, headers: Mapping[str, str]
    ) -> None:
        """Binds.

        Args:
            config: Address to listen on.
            paths: The run's folder; None on a machine that does not report the steps.
            supervisor: Supervisor of the machine's processes.
            headers: HTTP headers for the inference servers.

        Raises:
            OSError: The address is taken.
            ConfigError: The variable of the API key is not set.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(RunCollector(paths, supervisor, headers))
        variable = config.api_key_var
        key = key_from_environment(variable, "the metrics endpoint's API key") if variable else None

        def check(request: Request) -> None:
            check_address(request, loopback=config.is_loopback)
            if key is not None and request.scope["path"] != "/health":
                check_bearer(request, key)

        async def metrics(_: Request) -> Response:
            return Response(await run_in_threadpool(generate_latest, registry), media_type=_CONTENT_TYPE)

        async def health(_: Request) -> Response:
            return JSONResponse({name: each.is_up for name, each in supervisor.watched.items()})

        app = Guard(Starlette(routes=[Route("/metrics", metrics), Route("/health", health)]), _LIMITS, check=check)
        self._socket = socket.create_server(
            (config.host, config.port), family=socket.AF_INET6 if ":" in config.host else socket.AF_INET
        )
        host, port = self._socket.getsockname()[:2]
        self.url = f"{http_url(host, port)}/metrics"
        self._thread: threading.Thread | None = None
        self._server = uvicorn.Server(uvicorn_config(app, _LIMITS, host=config.host, port=port, lifespan="off"))

    def start(self) -> None:
        """Serves until `stop`."""
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="metrics", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _STARTUP_SECONDS
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends it."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(_ANSWER_SECONDS)  # it lets go of the socket itself
        self._socket.close()
