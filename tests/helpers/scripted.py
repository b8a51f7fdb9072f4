"""An inference server that says what it is told to: for conversations that a random policy would not hold."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pointillist.render import RawRenderer
from tests.helpers.processes import free_port


class ScriptedPolicy:
    """An inference server that says what it is told to."""

    def __init__(self, renderer: RawRenderer) -> None:
        self._renderer = renderer
        self.says: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._answers: Callable[[dict[str, Any]], str] = lambda _: self.says.pop(0)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        app = Starlette(routes=[Route("/inference/v1/generate", self.generate, methods=["POST"])])
        self._http = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._http.serve())

    async def stop(self) -> None:
        self._http.should_exit = True
        await self._serving

    def answer_by(self, answers: Callable[[dict[str, Any]], str]) -> None:
        """Answers depend on the request, not on its number."""
        self._answers = answers

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        await self.may_answer.wait()
        choices = []
        for index in range(body["sampling_params"]["n"]):
            text = self._answers(body)
            tokens = [*self._renderer.tokenizer.encode(text), self._renderer.stop_token_ids[0]]
            content = [{"token_id": token, "logprob": -0.5, "rank": 1} for token in tokens]
            span = {"version": "4", "start": 0, "end": len(tokens)}
            choices.append(
                {
                    "index": index,
                    "token_ids": tokens,
                    "logprobs": {"content": content},
                    "weight_versions": [span],
                    "finish_reason": "stop",
                }
            )
        return JSONResponse({"choices": choices})


def call(name: str, /, **arguments: Any) -> str:
    """A tool call as the policy writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
