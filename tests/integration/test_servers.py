"""Several inference servers behind one client: where requests go, and what happens when servers die."""

import asyncio
import contextlib
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from pointillist.config import RUN_KEY
from pointillist.errors import InferenceError, UnreachableError
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths
from pointillist.sessions import InferenceClient
from pointillist.sessions.servers import InferenceServers
from pointillist.weights.follow import WeightWatcher, update_weights
from tests.helpers.processes import free_port

pytestmark = pytest.mark.integration


class Stub:
    """A server that answers everything, and remembers what it was asked."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.asked: list[str] = []
        self.version = 0
        self.status = 200
        self.delay = 0.0
        self.key: str | None = None
        self.keys: list[str] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self._open: set[asyncio.StreamWriter] = set()

    async def die(self) -> None:
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            await self._answer(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split(b" ")[1].decode()
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-le")), 0)
            body = await reader.readexactly(length)
            await asyncio.sleep(self.delay)
            given = next((line[22:] for line in head.split(b"\r\n") if line.startswith(b"Authorization: Bearer ")), b"")
            status = self.status
            if path == "/update_weights":
                self.keys.append(given.decode())
                status = 401 if self.key is not None and given.decode() != self.key else status
            if path == "/update_weights" and status == 200:
                self.version = msgspec.json.decode(body)["weight_version"]
            if path != "/health":
                self.asked.append(body.decode())
            answer = msgspec.json.encode({"weight_version": self.version})
            writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(answer), answer))


@pytest.fixture
async def stubs() -> list[Stub]:
    found = [Stub(), Stub()]
    for stub in found:
        await stub.start()
    return found


async def test_groups_stay_and_load_is_spread(stubs: list[Stub]) -> None:
    servers = InferenceServers([stub.url for stub in stubs], {}, timeout=10, unreachable_timeout=5)
    for stub in stubs:
        stub.delay = 0.02
    await asyncio.gather(*(servers.post("/x", b"%d" % (n % 10), f"group {n % 10}") for n in range(80)))
    for group in range(10):
        assert sorted(Counter(stub.asked)[f"{group}"] for stub in stubs) == [0, 8]
    assert {len(stub.asked) for stub in stubs} == {40}
    await servers.aclose()


async def test_requests_of_a_dead_server_go_to_the_other(stubs: list[Stub]) -> None:
    servers = InferenceServers([stub.url for stub in stubs], {}, timeout=10, unreachable_timeout=20)
    for stub in stubs:
        stub.delay = 0.3
    asked = [asyncio.create_task(servers.post("/x", b"%d" % n, f"{n}")) for n in range(10)]
    await asyncio.sleep(0.1)  # in flight at both
    await stubs[0].die()
    answers = await asyncio.gather(*asked)
    assert [status for status, _ in answers] == [200] * 10
    assert Counter(stubs[1].asked).keys() == {f"{n}" for n in range(10)}
    # None is left: a request waits until there is one again.
    await stubs[1].die()
    waiting = asyncio.create_task(servers.post("/x", b"late", "late"))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    again = Stub(stubs[0].port)
    await again.start()
    assert (await waiting)[0] == 200
    assert again.asked == ["late"]
    await servers.aclose()


async def test_a_server_that_says_it_is_not_available_is_like_a_dead_one(stubs: list[Stub]) -> None:
    stubs[0].status = 503
    servers = InferenceServers([stub.url for stub in stubs], {}, timeout=10, unreachable_timeout=5)
    for number in range(6):
        assert (await servers.post("/x", b"", f"{number}"))[0] == 200
    await servers.aclose()


async def test_waiting_for_a_server_ends(stubs: list[Stub]) -> None:
    for stub in stubs:
        await stub.die()
    servers = InferenceServers([stub.url for stub in stubs], {}, timeout=10, unreachable_timeout=0.5)
    with pytest.raises(UnreachableError, match="did not answer /x"):
        await servers.post("/x", b"", "")
    await servers.aclose()


def _broadcast(paths: RunPaths, version: int) -> None:
    paths.broadcast_step(version).mkdir(parents=True)
    (paths.broadcast_step(version) / WEIGHTS_FILE).touch()


async def test_every_server_gets_every_version(stubs: list[Stub], tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    client = InferenceClient([stub.url for stub in stubs])
    watcher = WeightWatcher(paths, client, 0)
    following = asyncio.create_task(watcher.follow())
    _broadcast(paths, 0)
    await asyncio.wait_for(watcher.wait_for(0), 10)
    # The first one may be older than what a living server has: this run may go on after a checkpoint.
    assert [stub.asked for stub in stubs] == [[_update(paths, 0, rewind=True)]] * 2
    # One dies: the others are not held up by it.
    await stubs[0].die()
    _broadcast(paths, 1)
    await asyncio.wait_for(watcher.wait_for(1), 10)
    assert stubs[1].version == 1
    assert stubs[1].asked[1:] == [_update(paths, 1, rewind=False)]
    # It comes back with the weights that it began with, and is given the newest.
    again = Stub(stubs[0].port)
    await again.start()
    await _until(lambda: again.version == 1)
    # One that is started anew between two versions says so itself.
    again.version = 0
    await _until(lambda: again.version == 1)
    # A server that refuses weights ends the run.
    stubs[1].status = 400
    _broadcast(paths, 2)
    with pytest.raises(InferenceError, match="/update_weights answered 400"):
        await asyncio.wait_for(watcher.wait_for(2), 10)
    following.cancel()
    await client.aclose()


async def test_admin_requests_bring_the_runs_own_key(
    stubs: list[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server from outside of the run, which knows another one, is asked with the client's API key."""
    monkeypatch.setenv(RUN_KEY, "run")
    monkeypatch.setenv("API_KEY", "api")
    stubs[0].key, stubs[1].key = "run", "api"
    client = InferenceClient([stub.url for stub in stubs], api_key_var="API_KEY")
    for server in client.servers:
        await update_weights(server, str(tmp_path), 3)
    assert [stub.keys for stub in stubs] == [["run"], ["run", "api"]]
    assert [stub.version for stub in stubs] == [3, 3]
    stubs[1].key = "another"
    with pytest.raises(InferenceError, match="answered 401"):
        await update_weights(client.servers[1], str(tmp_path), 4)
    await client.aclose()


async def test_a_server_that_has_newer_weights_already_ends_nothing(stubs: list[Stub], tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    client = InferenceClient([stub.url for stub in stubs])
    watcher = WeightWatcher(paths, client, 0)
    following = asyncio.create_task(watcher.follow())
    stubs[0].version, stubs[0].status = 5, 409
    _broadcast(paths, 4)
    await asyncio.wait_for(watcher.wait_for(4), 60)
    assert stubs[1].version == 4
    following.cancel()
    await client.aclose()


def _update(paths: RunPaths, version: int, *, rewind: bool) -> str:
    body = {"weight_dir": str(paths.broadcast_step(version)), "weight_version": version, "rewind": rewind}
    return msgspec.json.encode(body).decode()


async def _until(true: object, seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
