"""Claims: the gateway costs little over a direct request, and 500 conversations with big pictures fit in 1 GB.

    python -m benchmarks.gateway

Three processes: a server that answers after a fixed time with one token, `pointillist gateway` before it, and this
client. Overhead: 32 sessions that ask the gateway and 32 that post the same prompts to the server directly, in turns.
Load: 500 sessions at once, 8 turns each, a new 1 MB JPEG at every turn, the whole history as base64 in every request,
as chat clients do.
"""

import asyncio
import base64
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.common import picture, rss_mb, scratch, write_tiny_model
from pointillist.base.net import free_port
from pointillist.config import PolicyConfig
from pointillist.config.shared import ModelConfig
from pointillist.images import normalize_images
from pointillist.refs import encode_features
from pointillist.sessions.factory import SessionFactory

ROOT = Path(__file__).parent.parent
OVERHEAD_SESSIONS, OVERHEAD_TURNS, ANSWER_SECONDS = 32, 40, 0.2
SESSIONS, TURNS = 500, 8


def main() -> None:
    with scratch() as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        results = asyncio.run(_overhead(folder)) | asyncio.run(_load(folder))
    json.dump(results, sys.stdout, indent=2)


class Processes:
    """Server and gateway."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.server_port, self.gateway_port = free_port("127.0.0.1"), free_port("127.0.0.1")
        self.sessions = SessionFactory.from_config(
            PolicyConfig(model=ModelConfig(name=str(folder / "model")), output_dir=folder / "run", seq_len=32_768)
        )
        token = str(self.sessions.renderer.stop_token_ids[0])
        stub = [sys.executable, "-m", "benchmarks.stub_server", str(self.server_port), token, str(seconds)]
        command = [
            sys.executable, "-m", "pointillist", "gateway", "--model.name", folder / "model",
            "--output-dir", folder / "run", "--seq-len", 32_768, "--gateway.port", self.gateway_port,
            "--client.base_url", f"http://127.0.0.1:{self.server_port}",
        ]  # fmt: skip
        self.server = subprocess.Popen(stub, cwd=ROOT, stdout=sys.stderr)
        self.gateway = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=sys.stderr)
        self.url = f"http://127.0.0.1:{self.gateway_port}"

    async def __aenter__(self) -> "Processes":
        async with httpx.AsyncClient() as http:
            while True:
                try:
                    (await http.get(f"{self.url}/health")).raise_for_status()
                    return self
                except httpx.HTTPError:
                    await asyncio.sleep(0.1)

    async def __aexit__(self, *_: object) -> None:
        for process in (self.gateway, self.server):
            process.terminate()
            process.wait()
        await self.sessions.client.aclose()


async def _overhead(folder: Path) -> dict[str, Any]:
    """Latencies beyond the server's fixed time, in milliseconds."""
    data = picture(512, 512, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    spent: dict[str, list[float]] = {"direct": [], "gateway": []}
    async with Processes(folder, ANSWER_SECONDS) as processes, httpx.AsyncClient(timeout=60, limits=_LIMITS) as http:
        images: list[Any] = []
        prompt = processes.sessions.renderer.render(
            normalize_images(messages, processes.sessions.sources, images), images
        )
        params = {"max_tokens": 8, "n": 1, "seed": 0, "logprobs": 0}
        direct = {"token_ids": prompt.token_ids, "features": encode_features(prompt.images), "sampling_params": params}
        keys = [(await http.post(f"{processes.url}/sessions")).json()["id"] for _ in range(OVERHEAD_SESSIONS)]
        chat = {"model": "policy", "messages": messages, "max_tokens": 8}

        async def client(index: int) -> None:
            await asyncio.sleep(ANSWER_SECONDS * index / OVERHEAD_SESSIONS)  # not all in the same moment
            ways = {
                "direct": await _Connection.open(processes.server_port, "/inference/v1/generate", direct),
                "gateway": await _Connection.open(
                    processes.gateway_port, f"/s/{keys[index]}/v1/chat/completions", chat
                ),
            }
            for turn in range(OVERHEAD_TURNS):
                way = "direct" if (turn + index) % 2 else "gateway"
                started = time.perf_counter()
                await ways[way].post()
                if turn > 1:
                    spent[way].append(1000 * (time.perf_counter() - started - ANSWER_SECONDS))

        await asyncio.gather(*(client(index) for index in range(OVERHEAD_SESSIONS)))
    median = {way: statistics.median(values) for way, values in spent.items()}
    return {
        "gateway_overhead_ms": median["gateway"] - median["direct"],
        "gateway_direct_ms": median["direct"],
        "gateway_chat_ms": median["gateway"],
    }


class _Connection:
    """One request, again and again over one connection: a client that costs next to nothing by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        self._reader, self._writer, self._request = reader, writer, request

    @classmethod
    async def open(cls, port: int, path: str, body: dict[str, Any]) -> "_Connection":
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return cls(*await asyncio.open_connection("127.0.0.1", port), head.encode() + data)

    async def post(self) -> None:
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        (length,) = re.findall(rb"content-length: (\d+)", head.lower())
        await self._reader.readexactly(int(length))


async def _load(folder: Path) -> dict[str, Any]:
    jpeg = _megabyte_jpeg()
    errors: list[str] = []
    started = time.perf_counter()
    async with Processes(folder, ANSWER_SECONDS) as processes, httpx.AsyncClient(timeout=3600, limits=_LIMITS) as http:
        before = rss_mb(processes.gateway.pid)

        async def conversation(index: int) -> int:
            opened = (await http.post(f"{processes.url}/sessions")).json()
            for turn in range(TURNS):
                size, body = _history(jpeg, index, turn + 1)
                answer = await http.post(
                    f"{opened['base_url']}/chat/completions", content=body, headers={"Content-Length": str(size)}
                )
                if answer.status_code != httpx.codes.OK:
                    errors.append(answer.text[:200])
                    return 0
            branches = (await http.delete(f"{processes.url}/sessions/{opened['id']}")).json()["branches"]
            return len(branches[0]["images"]) if len(branches) == 1 else 0

        images = await asyncio.gather(*(conversation(index) for index in range(SESSIONS)))
        peak = rss_mb(processes.gateway.pid, peak=True)
    return {
        "gateway_load_errors": len(errors) + sum(count != TURNS for count in images),
        "gateway_load_peak_mb": peak,
        "gateway_load_idle_mb": before,
        "gateway_load_requests": SESSIONS * TURNS,
        "gateway_load_gigabytes_sent": SESSIONS * len(jpeg) * 4 / 3 * TURNS * (TURNS + 1) / 2 / 1e9,
        "gateway_load_seconds": time.perf_counter() - started,
    }


_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=1000)


def _megabyte_jpeg() -> bytes:
    """1024x1024, about 1 MB."""
    pixels = np.random.default_rng(0).normal(128, 42, (1024, 1024, 3)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def _distinct(jpeg: bytes, index: int, turn: int) -> bytes:
    """The same picture with a comment of its own, so that its hash is another."""
    comment = f"{index}/{turn}".encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def _history(jpeg: bytes, index: int, turns: int) -> tuple[int, AsyncIterator[bytes]]:
    """Length of a request with so many pictures, and its bytes, made as they are sent: the client holds none of it."""

    def head(turn: int) -> bytes:
        opening = b'{"model":"policy","max_tokens":8,"messages":[' if turn == 0 else b","
        return opening + (b'{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/jpeg;base64,')

    said = b'"}}]},{"role":"assistant","content":""}'
    parts: Sequence[tuple[bytes, int, bytes]] = [
        (head(turn), turn, said if turn + 1 < turns else b'"}}]}]}') for turn in range(turns)
    ]
    size = sum(len(a) + 4 * -(-len(_distinct(jpeg, index, turn)) // 3) + len(b) for a, turn, b in parts)

    async def stream() -> AsyncIterator[bytes]:
        for before, turn, after in parts:
            yield before
            yield base64.b64encode(_distinct(jpeg, index, turn))
            yield after

    return size, stream()


if __name__ == "__main__":
    main()
