"""`pointillist view`: the routes.

| route | page |
| --- | --- |
| `GET /` | overview of all runs, side by side |
| `GET /runs/<n>/rollouts?...` | rollouts, filtered and sorted |
| `GET /runs/<n>/group?id=` | a group's rollouts beside each other |
| `GET /runs/<n>/rollout?id=` | one rollout |
| `GET /runs/<n>/store` | the image store |
| `GET /runs/<n>/picture/<hh>/<sha256>.<ext>`, `/thumbnail/<size>/...` | a stored picture, whole or small |
| `GET /runs/<n>/status` | how far the index is, as JSON |

Every page is made on the server, with autoescape on; the script only helps the hand. Nothing is ever written to a run.
"""

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pointillist.base.http_guard import Guard
from pointillist.errors import CorruptImageError, ImageError, MissingImageError, RefError
from pointillist.images.store import STORED_NAME, read_stored
from pointillist.runs.paths import number_of
from pointillist.view.queries import (
    FAULTS,
    OUTCOMES,
    PAGE,
    SORTS,
    Filters,
    choices,
    group,
    neighbours,
    rollouts,
    store_facts,
)
from pointillist.view.run import ViewedRun
from pointillist.view.thumbnails import SIZES, thumbnail
from pointillist.view.web.access import LIMITS_OF_REQUESTS, Access, answer, check
from pointillist.view.web.charts import number
from pointillist.view.web.overview import metric_charts, phase_charts, side_by_side
from pointillist.view.web.shown import ShownRollout, is_picture, is_sampled

logger = logging.getLogger(__name__)

Context: TypeAlias = dict[str, Any]
"""Values of a template by name; `run` is the run that is shown."""
_GROUP: Final = 32
"""Rollouts of a group that are shown beside each other."""
_HERE: Final = Path(__file__).parent
_FOREVER: Final = {"Cache-Control": "private, max-age=31536000, immutable"}
_STATIC: Final = {"app.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}
_TYPES: Final = {"jpg": "image/jpeg", "tiff": "image/tiff"}


class Viewer:
    """The pages of some runs."""

    def __init__(self, runs: Sequence[ViewedRun], cache: Path) -> None:
        """Prepares.

        Args:
            runs: Runs that are shown.
            cache: Folder of thumbnails.
        """
        self._runs = list(runs)
        self._cache = cache
        self._templates = Environment(
            loader=PackageLoader("pointillist.view.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"number": number, "size": size_text}
        self._templates.tests |= {"picture": is_picture, "sampled": is_sampled}

    def overview(self, _: Request) -> Context:
        """All runs."""
        return {
            "run": self._runs[0],
            "number": 0,
            "title": "Overview",
            "charts": metric_charts(self._runs),
            "phases": phase_charts(self._runs),
            "rows": side_by_side(self._runs),
        }

    def rollouts(self, request: Request) -> Context:
        """Rollouts of a run."""
        index, run = self._run(request)
        filters = Filters.of(request.query_params)
        if filters.step:
            run.index.ensure(f"{filters.step}.")
            run.index.ensure(f"eval_{filters.step}.")
        rows, total = rollouts(run, filters)
        return {
            "run": run,
            "number": index,
            "title": "Rollouts",
            "filters": filters,
            "rows": rows,
            "total": total,
            "first": (filters.page - 1) * PAGE + 1,
            "pages": max(1, -(-total // PAGE)),
            "choices": {name: [(value, value) for value in values] for name, values in choices(run).items()},
            "sorts": [(name, label) for name, (label, _) in SORTS.items()],
            "outcomes": OUTCOMES,
            "faults": FAULTS,
        }

    def group(self, request: Request) -> Context:
        """Rollouts of a group, beside each other."""
        index, run = self._run(request)
        name = request.query_params.get("id", "")
        run.index.ensure(f"{name}.")
        records = [run.index.record(rollout_id) for rollout_id in group(run, name, _GROUP)]
        shown = [ShownRollout.of(run, record) for record in records if record is not None]
        if not shown:
            raise HTTPException(404, f"run {run.name} has no group {name}")
        return {"run": run, "number": index, "title": f"Group {name}", "name": name, "shown": shown}

    def rollout(self, request: Request) -> Context:
        """One rollout."""
        index, run = self._run(request)
        rollout_id = request.query_params.get("id", "")
        record = run.index.record(rollout_id)
        if record is None:
            raise HTTPException(404, f"run {run.name} has no rollout {rollout_id}, or its record is damaged")
        before, after = neighbours(run, rollout_id)
        return {
            "run": run,
            "number": index,
            "title": f"Rollout {rollout_id}",
            "shown": ShownRollout.of(run, record),
            "before": before,
            "after": after,
        }

    def store(self, request: Request) -> Context:
        """The run's store."""
        index, run = self._run(request)
        return {"run": run, "number": index, "title": "Image store", "facts": store_facts(run)}

    def picture(self, request: Request) -> Response:
        """A stored picture as it is."""
        _, run = self._run(request)
        name = request.path_params["name"]
        try:
            data = read_stored(_root(run, name), name, run.limits)
        except (MissingImageError, RefError) as error:
            return _no_picture(error)
        extension = name.rpartition(".")[2]
        return Response(data, media_type=_TYPES.get(extension, f"image/{extension}"))

    def thumbnail(self, request: Request) -> Response:
        """A stored picture, small; or a drawn word that says what is wrong with it."""
        _, run = self._run(request)
        name, size = request.path_params["name"], number_of(request.path_params["size"])
        if size is None or size not in SIZES:
            raise HTTPException(404, f"expected a size of {SIZES}")
        try:
            small = thumbnail(_root(run, name), name, run.limits, size, self._cache)
            return Response(small, media_type="image/png", headers=_FOREVER)
        except (MissingImageError, RefError, ImageError) as error:
            return _no_picture(error)

    def status(self, request: Request) -> Response:
        """How far the index is, and a word that changes when there is something new."""
        _, run = self._run(request)
        progress = run.index.progress()
        return JSONResponse(
            {
                "percent": progress.percent,
                "damaged": progress.damaged,
                "rollouts": progress.rollouts,
                "pictures": progress.pictures,
                "pictures_checked": progress.pictures_checked,
                "state": f"{progress.rollouts} {run.trained_steps}",
            },
            headers={"Cache-Control": "no-store"},
        )

    def page(self, template: str, make: Callable[[Request], Context]) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of a page, which is made in a thread."""

        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(lambda: self._render(request, template, make(request)))

        return endpoint

    async def refuse(self, request: Request, error: Exception) -> Response:
        """The page for an address that cannot be shown."""
        status, message = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "failed")
        context = {"run": self._runs[0], "number": 0, "title": "Not there", "message": message}
        page = await run_in_threadpool(lambda: self._render(request, "refusal.html", context))
        page.status_code = status
        return page

    def _render(self, request: Request, template: str, context: Context) -> Response:
        progress = context["run"].index.progress()
        theme = request.cookies.get("theme")
        page = self._templates.get_template(template).render(
            **context,
            runs=self._runs,
            progress=progress,
            state=f"{progress.rollouts} {context['run'].trained_steps}",
            theme=theme if theme in ("dark", "light") else "",
        )
        # A folder's name need not be UTF-8.
        return HTMLResponse(page.encode(errors="replace"), headers={"Cache-Control": "no-store"})

    def _run(self, request: Request) -> tuple[int, ViewedRun]:
        index = number_of(request.path_params["run"])
        if index is None or index >= len(self._runs):
            raise HTTPException(404, f"there are {len(self._runs)} runs here")
        return index, self._runs[index]


def create_app(runs: Sequence[ViewedRun], cache: Path, token: str | None) -> ASGIApp:
    """The web application.

    Args:
        runs: Runs that are shown; the first is the one that the overview leads to.
        cache: Folder of thumbnails.
        token: Token that requests must bring; None on loopback.
    """
    viewer = Viewer(runs, cache)
    routes = [
        Route("/", viewer.page("overview.html", viewer.overview)),
        Route("/runs/{run}/rollouts", viewer.page("rollouts.html", viewer.rollouts)),
        Route("/runs/{run}/group", viewer.page("group.html", viewer.group)),
        Route("/runs/{run}/rollout", viewer.page("rollout.html", viewer.rollout)),
        Route("/runs/{run}/store", viewer.page("store.html", viewer.store)),
        Route("/runs/{run}/picture/{name:path}", viewer.picture),
        Route("/runs/{run}/thumbnail/{size}/{name:path}", viewer.thumbnail),
        Route("/runs/{run}/status", viewer.status),
        Route("/static/{name}", _static),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=Access(token))],
        exception_handlers={HTTPException: viewer.refuse, OSError: _unavailable, sqlite3.Error: _unavailable},
    )
    return Guard(app, LIMITS_OF_REQUESTS, check=lambda request: check(request, token), answer=answer)


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404, f"there is no file {name[:100]} here")
    return FileResponse(_HERE / "static" / name, media_type=_STATIC[name])


def _unavailable(_: Request, error: Exception) -> Response:
    """The index or the run's folder cannot be read now."""
    logger.warning("a page cannot be made: %r", error)
    return PlainTextResponse("the run or its index cannot be read now; the viewer's log says why", 503)


def size_text(num_bytes: int) -> str:
    """A number of bytes as people read it."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _root(run: ViewedRun, name: str) -> Path:
    """The store that holds a name, which must have the grammar of a stored image: no other file can be asked for."""
    if not STORED_NAME.fullmatch(name):
        raise RefError("expected <hh>/<sha256>.<ext>")
    if run.image_dir is None:
        raise MissingImageError("the run has no image store")
    return run.image_dir


def _no_picture(error: Exception) -> Response:
    word = (
        "missing"
        if isinstance(error, MissingImageError)
        else "corrupt"
        if isinstance(error, CorruptImageError)
        else "not shown"
    )
    drawn = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="96" height="96"><rect width="96" height="96" fill="#7f1d1d"/>'
        f'<text x="48" y="52" fill="#fff" font-size="14" font-family="sans-serif" text-anchor="middle">{word}</text>'
        "</svg>"
    )
    return Response(drawn, 404, media_type="image/svg+xml", headers={"Cache-Control": "no-store"})
