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

A request's pictures are stored, and its body is dropped, before anything is sampled. `http_guard` bounds bodies,
headers and connections; the numbers that a request may ask for are bounded in `call`. Work on bodies and long answers
runs in threads of the gateway's own (`pools`), never on the event loop. A streamed answer comes as the events of its
API, all at once when it is sampled.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pointillist.base.http_errors import Api, answer_json, as_request_error
from pointillist.base.http_guard import Guard, HttpLimits, check_address, check_bearer, release_body, uvicorn_config
from pointillist.base.net import http_url, key_from_environment
from pointillist.base.pools import READING, WRITING
from pointillist.config import GatewayConfig
from pointillist.errors import ConfigError, PointillistError, RequestError, RequestRefusedError, shown
from pointillist.sessions.gateway import anthropic, chat, responses
from pointillist.sessions.gateway.call import Call
from pointillist.sessions.session import Conversation, Session, Turn

logger = logging.getLogger(__name__)

_APIS: Final = {"chat/completions": chat, "responses": responses, "messages": anthropic}
_CLOSED_REMEMBERED: Final = 10_000
_RESPONSES_REMEMBERED: Final = 1000
"""Of one session: what `previous_response_id` may name."""
_CLIENT_GONE: Final = 499
_MAX_VALUES: Final = 500_000
"""Values in a body: a list takes 2 bytes of it and 56 of memory."""
_MAX_DEPTH: Final = 100
_INTEGER_BITS: Final = 63
_IMAGE_TYPES: Final = frozenset({"image", "image_url", "input_image"})
_LONG_ANSWER: Final = 1000
"""Tokens of an answer from which on it is encoded in a thread."""


class _Entry:
    """An open session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.responses: OrderedDict[str, Conversation] = OrderedDict()
        """What `previous_response_id` may name."""
        self._requests = 0

    @contextlib.contextmanager
    def serving(self, most: int) -> Iterator[None]:
        """Counts a request.

        Raises:
            RequestError: 429: there are too many.
        """
        if self._requests >= most:
            raise RequestError(
                f"session has {self._requests} requests under way, gateway.max_session_requests is {most}",
                status=429,
                code="too_many_requests",
            )
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    def remember(self, name: str, conversation: Conversation) -> None:
        """Keeps a response for those that follow it; the oldest are dropped."""
        self.responses[name] = conversation
        if len(self.responses) > _RESPONSES_REMEMBERED:
            self.responses.popitem(last=False)


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
        variable = config.api_key_var
        self._key = key_from_environment(variable, "the gateway's API key") if variable else None
        self._entries: dict[str, _Entry] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._server: _GuestServer | None = None
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
        limits = HttpLimits(
            body_bytes=self._config.max_request_bytes,
            inflight_bytes=self._config.inflight_bytes,
            # An agent thinks between two requests; a connection that is closed under a request loses it.
            idle_seconds=600,
        )
        app = Guard(self.app(), limits, check=self._check, answer=_refuse)
        self._server = _GuestServer(uvicorn_config(app, limits, host=self._config.host, port=port, lifespan="off"))
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
        routes += [Route("/s/{key}/v1/models", self._models), Route("/health", _health)]
        if self._open_session is not None:
            routes += [
                Route("/sessions", self._open, methods=["POST"]),
                Route("/sessions/{key}", self._look),
                Route("/sessions/{key}", self._end, methods=["DELETE"]),
            ]
        handlers: dict[Any, Any] = {404: _no_route, 405: _no_route, 500: _failed, RequestError: _refuse}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _check(self, request: Request) -> None:
        """Looks at a request before its body is read.

        Raises:
            RequestError: 401, 404 or 410; 400 or 403 if it was sent by a page of another site.
        """
        # Not `request.url`, which is made from what the client says in Host.
        if request.scope["path"] == "/health":
            return
        if self._key is not None:
            check_bearer(request, self._key, header="x-api-key")
        elif request.scope["path"].startswith("/sessions"):
            # Whoever may open sessions needs no key on loopback, so at least no page of the web may.
            check_address(request, loopback=self._config.is_loopback)
        if request.scope["path"].startswith("/s/"):
            session, _, route = request.scope["path"][len("/s/") :].partition("/v1/")
            if route in _APIS:
                self._entry(session)

    def _endpoint(self, api: Any) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            try:
                return await self._serve(api, request)
            except PointillistError as error:
                return _refuse(request, error)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_GONE)

        return serve

    async def _serve(self, api: Any, request: Request) -> Response:
        body = b"".join([chunk async for chunk in request.stream()])  # not by request.body(), which keeps it
        call = await READING.run(self._taken_in, api, body)
        del body
        entry = self._entry(request.path_params.get("key", call.session))
        with entry.serving(self._config.max_session_requests):
            conversation = await self._read(entry, call)
            release_body(request)
            return await self._answer(api, request, entry, call, conversation)

    async def _read(self, entry: _Entry, call: Call) -> Conversation:
        """A request's messages, their pictures stored; nothing of its body is held afterwards."""
        most = entry.session.max_images
        if call.images > most:
            raise RequestError(
                f"request has {call.images} images, expected at most {most}", param="messages", code="too_many_images"
            )
        messages, call.messages = call.messages, []
        conversation = await entry.session.read(messages, from_client=True)
        before = entry.responses.get(call.previous or "")
        if call.previous is not None and before is None:
            raise RequestError(
                f"previous_response_id {call.previous[:64]!r} is not a response of this session, or it was forgotten: "
                f"the newest {_RESPONSES_REMEMBERED} are remembered",
                status=404, param="previous_response_id", code="previous_response_not_found",
            )  # fmt: skip
        return _joined(before, conversation)

    async def _answer(
        self, api: Any, request: Request, entry: _Entry, call: Call, conversation: Conversation
    ) -> Response:
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
            entry.remember(f"resp_{name}", conversation.followed_by(Conversation([turns[0].message], [])))

        def written() -> list[bytes]:
            if call.stream:
                return list(api.events(call, turns, name, created, session.decode))
            return [msgspec.json.encode(api.answer(call, turns, name, created, session.decode))]

        long = sum(len(turn.completion.token_ids) for turn in turns) > _LONG_ANSWER
        chunks = await WRITING.run(written) if long else written()
        if call.stream:
            return StreamingResponse(_all(chunks), media_type="text/event-stream")
        return Response(chunks[0], media_type="application/json")

    def _taken_in(self, api: Any, body: bytes) -> Call:
        """What a body says; runs in a thread."""
        call = _parsed(api, body)
        if call.n > self._config.max_choices:
            raise RequestError(f"n is {call.n}, expected an integer from 1 to {self._config.max_choices}", param="n")
        return call

    def _entry(self, key: str) -> _Entry:
        if key in self._entries:
            return self._entries[key]
        if key in self._closed:
            raise RequestError("session is closed", status=410, code="session_closed")
        raise RequestError("no such session", status=404, code="session_not_found")

    async def _models(self, request: Request) -> Response:
        self._entry(request.path_params["key"])
        card = {"id": self._model_name, "object": "model", "created": 0, "owned_by": "pointillist"}
        return JSONResponse({"object": "list", "data": [card]})

    async def _open(self, _: Request) -> Response:
        if self._open_session is None:
            raise RequestError("sessions belong to rollouts here", status=404)
        if len(self._entries) >= self._config.max_sessions:
            raise RequestError(
                f"{len(self._entries)} sessions are open, gateway.max_sessions is {self._config.max_sessions}: close "
                "those that are over", status=429, code="too_many_sessions",
            )  # fmt: skip
        session = self._open_session()
        key = self.add(session)
        return JSONResponse({"id": key, "base_url": session.base_url}, status_code=201)

    async def _look(self, request: Request) -> Response:
        session = self._entry(request.path_params["key"]).session
        return Response(await WRITING.run(_state, session), media_type="application/json")

    async def _end(self, request: Request) -> Response:
        key = request.path_params["key"]
        session = self._entry(key).session
        self.close(key)
        return Response(await WRITING.run(_state, session), media_type="application/json")


class _GuestServer(uvicorn.Server):
    """A server in a process that handles signals itself."""

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
    """What a body asks for; runs in a thread.

    Raises:
        RequestError: 400: not JSON, not this API's, or more than is taken.
    """
    # Before it is decoded: 20 MB of empty lists are 560 MB of memory. What stands in texts is counted too, so the
    # bound is generous.
    values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if values > _MAX_VALUES:
        raise RequestError(f"body has about {values} values, at most {_MAX_VALUES} are accepted")
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"body is not JSON that can be read ({error})") from None
    if not isinstance(data, dict):
        raise RequestError("body is not a JSON object")
    images = _count_images(data)
    try:
        call: Call = api.parse(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # A shape that a parser does not expect is its sender's fault, and costs this request only.
        logger.warning("a request of an unexpected shape was refused", exc_info=error)
        raise RequestError("a field of the request has a shape that this API does not have") from None
    call.images = images
    return call


def _count_images(body: dict[str, Any]) -> int:
    """Counts the images of a body; refuses what code that walks through it, or writes it again, might fail at.

    Raises:
        RequestError: 400: nested too deeply, or an integer of more than 63 bits.
    """
    images = 0
    level: list[Any] = [value for value in body.values() if isinstance(value, dict | list)]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                kind = value.get("type")
                images += isinstance(kind, str) and kind in _IMAGE_TYPES
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
                raise RequestError(f"body has {shown(value)}, expected integers of at most {_INTEGER_BITS} bits")
        if not below:
            return images
        level = below
    raise RequestError(f"body is nested more than {_MAX_DEPTH} levels deep")


def _refuse(request: Request, error: Exception) -> Response:
    """The answer to a request that is not served, in the shape of its API."""
    api: Api = "anthropic" if request.scope["path"].endswith("/messages") else "openai"
    return answer_json(request, _as_chat_error(error), api)


def _as_chat_error(error: Exception) -> RequestError:
    """What a chat client is told: it knows its own fields by their last name, and its pictures as those of messages."""
    if isinstance(error, RequestRefusedError):
        return RequestError(str(error), param=error.param and error.param.rpartition(".")[2], code=error.code)
    return as_request_error(error, param="messages")


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


async def _all(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _no_route(request: Request, _: Exception) -> Response:
    error = RequestError(f"no route {request.method} {request.scope['path']}", status=404, code="unknown_route")
    return answer_json(request, error, "openai")


async def _failed(request: Request, error: Exception) -> Response:
    return answer_json(request, error, "openai")
