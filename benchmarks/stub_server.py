"""An inference server that answers everything with the same token after a while: what is measured is what is before it.

python -m benchmarks.stub_server PORT TOKEN_ID SECONDS
"""

import asyncio
import sys

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


def app(token: int, seconds: float) -> Starlette:
    async def generate(request: Request) -> Response:
        count = msgspec.json.decode(await request.body())["sampling_params"].get("n", 1)
        await asyncio.sleep(seconds)
        choice = {
            "token_ids": [token],
            "logprobs": {"content": [{"token_id": token, "logprob": -0.5, "rank": 1}]},
            "weight_versions": [{"version": "0", "start": 0, "end": 1}],
            "finish_reason": "stop",
        }
        return JSONResponse({"choices": [{**choice, "index": index} for index in range(count)]})

    async def health(_: Request) -> Response:
        return JSONResponse({})

    return Starlette(routes=[Route("/inference/v1/generate", generate, methods=["POST"]), Route("/health", health)])


if __name__ == "__main__":
    port, token, seconds = sys.argv[1:]
    uvicorn.run(app(int(token), float(seconds)), port=int(port), log_level="warning", lifespan="off", backlog=4096)
