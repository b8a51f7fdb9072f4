"""The gateway: HTTP over sessions.

| route | effect |
| --- | --- |
| `POST /s/<session>/v1/chat/completions` | OpenAI Chat Completions |
| `POST /s/<session>/v1/responses` | OpenAI Responses |
| `POST /s/<session>/v1/messages` | Anthropic Messages |
| `POST /v1/chat/completions` | the same, of the session that the body's `pointillist_session` names |
| `GET /s/<session>/v1/models` | the policy |
| `POST /sessions`, `GET` and `DELETE /sessions/<session>` | open, look at, close (a gateway by itself) |
| `GET /health` | |

A request's pictures are stored, and its body forgotten, before anything is sampled; how many bytes of bodies are held
at once is bounded. Work on bodies runs in threads, never on the event loop. A streamed answer comes as the events of
its API, all at once when it is sampled.
"""

import asyncio
import contextlib
import secrets
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pointillist.budget import ByteBudget
from pointillist.config import GatewayConfig
from pointillist.errors import ConfigError, PointillistError
from pointillist.rollouts.client import api_key
from pointillist.rollouts.gateway import anthropic, chat, responses
from pointillist.rollouts.gateway.call import Call
from pointillist.rollouts.gateway.errors import ApiError, api_error
from pointillist.rollouts.session import Conversation, Session, Turn
from pointillist.system import http_url

_APIS: Final = {"chat/completions": chat, "responses": responses, "messages": anthropic}
_CLOSED_REMEMBERED: Final = 10_000
_CLIENT_GONE: Final = 499


class _Entry:
    """An open session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.responses: dict[str, Conversation] = {}
        """What `previous_response_id` may name."""


class Gateway:
    """Serves sessions; belongs to one event loop."""

    def __init__(
        self, config: GatewayConfig, model_name: str, open_session: Callable[[], Session] | None = None
    ) -> None:
        """Prepares the server.

        Args:
            config: Address and limits.
            model_name: What the policy is called.
            open_session: Opens a session for `POST /sessions`; None where sessions belong to rollouts.

        Raises:
            ConfigError: The API key is not set.
        """
        self._config = config
        self._model_name = model_name
        self._open_session = open_session
        self._key = api_key(config.api_key_var) if config.api_key_var else None
        self._budget = ByteBudget(config.inflight_bytes)
        self._entries: dict[str, _Entry] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.url = ""
        """Where it listens, once started."""

    async def start(self) -> None:
        """Listens.

        Raises:
            ConfigError: The address can not be had.
        """
        listener = _listen(self._config.host, self._config.port)
        port = listener.getsockname()[1]
        host = "127.0.0.1" if self._config.host in ("0.0.0.0", "::") else self._config.host  # noqa: S104 - asks, does not bind
        self.url = http_url(host, port)
        # A connection may stay idle while its agent thinks; closing it under a request that is being sent loses it.
        self._server = _Server(
            uvicorn.Config(self.app(), log_level="warning", lifespan="off", timeout_keep_alive=600, backlog=4096)
        )
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))
        await self._server.listening.wait()

    async def aclose(self) -> None:
        """Stops listening; requests under way are cut."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._task

    def add(self, session: Session) -> str:
        """Serves a session from now on and tells it where; returns the key that `close` wants."""
        key = secrets.token_hex(16)
        self._entries[key] = _Entry(session)
        session.gateway_url, session.key = self.url, key
        session.api_key = self._key or "none"
        return key

    def close(self, key: str) -> None:
        """Ends a session: later requests are told that it is closed."""
        del self._entries[key]
        self._closed[key] = None
        if len(self._closed) > _CLOSED_REMEMBERED:
            self._closed.popitem(last=False)

    def app(self) -> Starlette:
        """The web application."""
        routes = [Route(f"/s/{{key}}/v1/{path}", self._endpoint(api), methods=["POST"]) for path, api in _APIS.items()]
        routes += [Route("/v1/chat/completions", self._endpoint(chat), methods=["POST"])]
        routes += [Route("/s/{key}/v1/models", self._guarded(self._models)), Route("/health", _health)]
        if self._open_session is not None:
            routes += [
                Route("/sessions", self._guarded(self._open), methods=["POST"]),
                Route("/sessions/{key}", self._guarded(self._look)),
                Route("/sessions/{key}", self._guarded(self._end), methods=["DELETE"]),
            ]
        return Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route, 500: _failed})

    def _endpoint(self, api: Any) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            try:
                self._check_key(request)
                return await self._serve(api, request)
            except (ApiError, PointillistError) as error:
                refusal = error if isinstance(error, ApiError) else api_error(error)
                body = refusal.anthropic() if api is anthropic else refusal.openai()
                return JSONResponse(body, status_code=refusal.status)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_GONE)

        return serve

    def _guarded(self, handler: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            try:
                self._check_key(request)
                return handler(request)
            except ApiError as error:
                return JSONResponse(error.openai(), status_code=error.status)

        return serve

    async def _serve(self, api: Any, request: Request) -> Response:
        entry, call, conversation = await self._receive(api, request)
        session = entry.session
        answering = asyncio.ensure_future(
            session.chat(
                conversation,
                tools=call.tools,
                sampling=call.sampling(session.sampling),
                n=call.n,
                stop=call.stop,
            )
        )
        turns = await _unless_client_leaves(answering, request)
        name, created = uuid.uuid4().hex, int(time.time())
        call.model = call.model or self._model_name
        if api is responses:
            entry.responses[f"resp_{name}"] = conversation.followed_by(Conversation([turns[0].message], []))
        decode = session.decode
        if call.stream:
            stream: Iterator[bytes] = api.events(call, turns, name, created, decode)
            return StreamingResponse(_all(stream), media_type="text/event-stream")
        return Response(
            msgspec.json.encode(api.answer(call, turns, name, created, decode)), media_type="application/json"
        )

    async def _receive(self, api: Any, request: Request) -> tuple[_Entry, Call, Conversation]:
        """Reads a request and stores its pictures; nothing of its body is held afterwards."""
        named = request.path_params.get("key")
        if named is not None:
            self._entry(named)  # before the body is read
        limit = self._config.max_request_bytes
        length = int(request.headers.get("content-length", limit))
        if length > limit:
            raise ApiError(f"request has {length} bytes, at most {limit} are accepted", status=413)
        share = await self._budget.take(length)
        try:
            body = await _body(request, limit)
            call, entry = await asyncio.to_thread(self._taken_in, api, body, named)
            del body
            messages, call.messages = call.messages, []
            try:
                stored = await entry.session.fetch_remote(messages)
                del messages
                conversation = await asyncio.to_thread(entry.session.read_now, stored, from_client=True)
            except RecursionError:
                raise ApiError("messages are nested too deeply", param="messages") from None
        finally:
            share.release()
        before = entry.responses.get(call.previous or "")
        if call.previous is not None and before is None:
            raise ApiError(
                f"previous_response_id {call.previous[:64]!r} is not a response of this session",
                status=404, param="previous_response_id", code="previous_response_not_found",
            )  # fmt: skip
        return entry, call, _joined(before, conversation)

    def _taken_in(self, api: Any, body: bytes, named: str | None) -> tuple[Call, _Entry]:
        """What a body says; runs in a thread."""
        call = _parsed(api, body)
        return call, self._entry(call.session if named is None else named)

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self._key.encode()):
            raise ApiError("expected Authorization: Bearer <API key> or x-api-key", status=401, code="invalid_api_key")

    def _entry(self, key: str) -> _Entry:
        if key in self._entries:
            return self._entries[key]
        if key in self._closed:
            raise ApiError("session is closed", status=410, code="session_closed")
        raise ApiError("no such session", status=404, code="session_not_found")

    def _models(self, request: Request) -> Response:
        self._entry(request.path_params["key"])
        card = {"id": self._model_name, "object": "model", "created": 0, "owned_by": "pointillist"}
        return JSONResponse({"object": "list", "data": [card]})

    def _open(self, _: Request) -> Response:
        if self._open_session is None:
            raise ApiError("sessions belong to rollouts here", status=404)
        session = self._open_session()
        key = self.add(session)
        return JSONResponse({"id": key, "base_url": session.base_url}, status_code=201)

    def _look(self, request: Request) -> Response:
        return Response(_state(self._entry(request.path_params["key"]).session), media_type="application/json")

    def _end(self, request: Request) -> Response:
        key = request.path_params["key"]
        state = _state(self._entry(key).session)
        self.close(key)
        return Response(state, media_type="application/json")


class _Server(uvicorn.Server):
    """A server inside somebody else's process: signals are that process' affair."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _state(session: Session) -> bytes:
    return msgspec.json.encode({"turns": len(session.turns), "branches": session.branches})


def _joined(before: Conversation | None, new: Conversation) -> Conversation:
    """The conversation that a response follows, and what follows; new instructions take the place of the old."""
    if before is None:
        return new
    if new.messages and new.messages[0]["role"] == "system" and before.messages[0]["role"] == "system":
        before = Conversation(before.messages[1:], before.images)
        return Conversation([new.messages[0], *before.messages, *new.messages[1:]], [*before.images, *new.images])
    return before.followed_by(new)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio switches delayed sending off only for sockets that name it: 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"gateway can not listen on {host}:{port} ({error.strerror})") from None
    return listener


def _parsed(api: Any, body: bytes) -> Call:
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(f"body is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ApiError("body is not a JSON object")
    call: Call = api.parse(data)
    return call


async def _body(request: Request, limit: int) -> bytes:
    """Not by `request.body()`, which keeps it."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise ApiError(f"request is longer than the {limit} bytes that are accepted", status=413)
        chunks.append(chunk)
    return b"".join(chunks)


async def _unless_client_leaves(answering: "asyncio.Future[list[Turn]]", request: Request) -> list[Turn]:
    """An answer that nobody waits for is neither finished nor recorded."""
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not answering.done():
            answering.cancel()
    if answering.cancelled() or not answering.done():
        raise ClientDisconnect
    return answering.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _no_route(request: Request, _: Exception) -> Response:
    error = ApiError(f"no route {request.method} {request.url.path}", status=404, code="unknown_route")
    return JSONResponse(error.openai(), status_code=404)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(type(error).__name__, status=500, code="internal_error").openai(), status_code=500)
