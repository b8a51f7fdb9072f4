"""Sends hostile inputs to real processes and notes what they do to them, and to whoever asks honestly beside them."""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import zmq

from pointillist.base.channel import secure_client, secure_listener
from pointillist.config import RUN_KEY
from tests.helpers.files import ROOT
from tests.hostile import gateway_inputs, generate_inputs, http_inputs, peer_inputs, prober, reader_inputs
from tests.hostile.peer_inputs import Peer
from tests.hostile.services import Service, Services
from tests.hostile.wire import SESSION, Connection, Http, request

SHARES: Final = {
    "references": 40, "sampling": 22, "bodies": 20, "chat": 16, "responses": 14, "messages": 14, "inference http": 8,
    "gateway http": 8, "viewer http": 3, "assets http": 3, "pages": 8, "assets": 8, "records": 10, "transport": 10,
    "workers": 8, "archives": 8,
}  # fmt: skip
"""Parts of 200 of all inputs, by target."""
SENDERS: Final = 8
GROWTH_MIB: Final = 300.0
"""How much more memory a process may hold at the end of a target than before it: caches fill, and malloc keeps what
large bodies needed."""
PEAK_MIB: Final = 1200.0
"""The same at any moment."""
SLOWEST_SECONDS: Final = 1.0
"""The longest that an honest request may take, times the patience."""
_ANSWER_SECONDS: Final = 60.0
_SILENT_SECONDS: Final = 20.0
_MOST_DEATHS: Final = 12
_SHOWN: Final = 5
_PEERS_AT_ONCE: Final = 25
_BESIDE: Final = 64
_WAITING_SECONDS: Final = 3.0
"""How long an input that is not whole is left waiting for an answer, beside what it drips."""


@dataclass
class Result:
    """What became of one target."""

    target: str
    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Answers that no input may cause, with the number of the input; the first few."""
    num_faults: int = 0
    deaths: list[dict[str, Any]] = field(default_factory=list)
    probes: int = 0
    slowest: float = 0.0
    median: float = 0.0
    probe_faults: list[str] = field(default_factory=list)
    num_probe_faults: int = 0
    memory_mib: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def fault(self, number: int, what: str, data: bytes) -> None:
        """Notes an answer that must not be."""
        self.num_faults += 1
        if len(self.faults) < _SHOWN:
            self.faults.append({"input": number, "what": what[:400], "data": repr(data[:300])})

    def wrong(self, patience: float) -> list[str]:
        """Everything that is not as it should be."""
        grown = self.memory_mib.get("last", 0.0) - self.memory_mib.get("first", 0.0)
        peak = self.memory_mib.get("peak", 0.0) - self.memory_mib.get("first", 0.0)
        limit = SLOWEST_SECONDS * patience
        found = {
            f"{self.num_faults} answers that no input may cause": self.num_faults,
            f"{len(self.deaths)} deaths": len(self.deaths),
            f"{self.num_probe_faults} honest requests failed": self.num_probe_faults,
            f"an honest request took {self.slowest:.2f} s, at most {limit:g} s are allowed": self.slowest > limit,
            "no honest request was answered": self.probes == 0,
            f"memory grew by {grown:.0f} MiB, at most {GROWTH_MIB:g} are allowed": grown > GROWTH_MIB,
            f"memory rose by {peak:.0f} MiB for a while, at most {PEAK_MIB:g} are allowed": peak > PEAK_MIB,
        }
        return [f"{self.target}: {text}" for text, is_so in found.items() if is_so]


def chance_of(seed: int, target: str, number: int) -> Random:
    """The random generator that decides one input."""
    return Random(f"{seed}/{target}/{number}")


class Attack:
    """One target under attack: sends inputs, brings the process back when it dies, and finds out which input it was."""

    def __init__(self, services: Services, service: str, target: str, seed: int, patience: float) -> None:
        self._services = services
        self._service_name = service
        self._target = target
        self._seed = seed
        self._patience = patience
        self.result = Result(target)
        self.service = services.get(service)
        self._lock = threading.RLock()
        self._recent: deque[int] = deque(maxlen=2 * SENDERS)
        self._unanswered: set[int] = set()
        self._numbers: Iterator[int] = iter(())
        self._deaths_before = 0

    @property
    def given_up(self) -> bool:
        """Whether it died so often that further inputs would tell nothing."""
        return len(self.result.deaths) >= _MOST_DEATHS

    def run(self, first: int, count: int, advance: Callable[[], None]) -> Result:
        """Sends the inputs `first` to `first + count - 1`."""
        self._await_answer(time.time())
        began, self._numbers = time.time(), iter(range(first, first + count))
        memory = self.service.memory
        memory.first, memory.peak = self.service.resident(), 0.0
        watcher = threading.Thread(target=self._watch, daemon=True)
        self._over = threading.Event()
        watcher.start()
        self._send_all(advance)
        self._over.set()
        watcher.join()
        self._await_answer(time.time())
        done, waiting = self.service.probes(began)
        seconds = sorted([note["seconds"] for note in done if not note["fault"]] + [waiting])
        faults = [note["fault"] for note in done if note["fault"]]
        # While a process is down its honest clients fail; that is counted as its death.
        self.result.num_probe_faults = len(
            [fault for fault in faults if not _is_down(fault)] if self.result.deaths else faults
        )
        self.result.probe_faults = faults[:_SHOWN]
        self.result.probes, self.result.slowest = len(done), round(seconds[-1], 3)
        self.result.median = round(seconds[len(seconds) // 2], 3)
        memory.last = self.service.resident()
        peak = max(memory.peak, memory.last)
        self.result.memory_mib = {"first": round(memory.first), "last": round(memory.last), "peak": round(peak)}
        self.result.seconds = round(time.time() - began, 1)
        return self.result

    def make(self, number: int) -> Any:
        """One input."""
        return self.maker(chance_of(self._seed, self._target, number))

    maker: Callable[[Random], Any]

    def send_alone(self, number: int) -> None:
        """Sends one input again, to see whether it is the one."""
        raise NotImplementedError

    def _send_all(self, advance: Callable[[], None]) -> None:
        raise NotImplementedError

    def took(self, number: int) -> None:
        """Remembers that an input is on its way."""
        self._recent.append(number)
        self.result.sent += 1

    def look_after(self) -> None:
        """Brings back what has died, or answers nobody any more: the process, or one that it asks."""
        with self._lock:
            for each in (*self.service.needs, self.service):
                # A process that ends may still hold its socket for a moment.
                for _ in range(20):
                    if not each.alive():
                        break
                    time.sleep(0.05)
                if not each.alive() or each.silence() > _SILENT_SECONDS * self._patience:
                    self._bring_back(each)
                    return

    def _bring_back(self, service: Service) -> None:
        """Notes a death, starts the process again, and finds out which input it was."""
        suspects = list(dict.fromkeys([*sorted(self._unanswered), *self._recent]))[: 4 * SENDERS]
        self._recent.clear()
        silent = service.alive()
        code = service.stop()
        how = f"{service.name} {'answers nobody' if silent else f'ended with code {code}'}"
        self.result.deaths.append({"how": how, "said": service.last_words(), "suspects": suspects, "culprits": []})
        if not self.given_up:
            service.start()
            self._find_culprit(suspects, service)

    def _find_culprit(self, suspects: list[int], service: Service) -> None:
        """Sends the suspects again, one by one."""
        if len(self.result.deaths) > _SHOWN:
            return
        death = self.result.deaths[-1]
        for number in suspects:
            self.send_alone(number)
            if not self._answers():
                death["culprits"].append({"input": number, "data": repr(self.make(number))[:400]})
                service.stop()
                service.start()
                break

    def _answers(self) -> bool:
        """Whether the honest client is answered from now on."""
        since = time.time()
        everybody = (*self.service.needs, self.service)
        while time.time() < since + _SILENT_SECONDS * self._patience and all(each.alive() for each in everybody):
            done, _ = self.service.probes(since)
            # The second one began after the input.
            if len(done) >= 2:
                return not done[-1]["fault"]
            time.sleep(0.05)
        return False

    def _await_answer(self, since: float) -> None:
        deadline = time.time() + 6 * _SILENT_SECONDS * self._patience
        while time.time() < deadline and not self.service.probes(since)[0] and self.service.alive():
            time.sleep(0.05)

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            limit = _SILENT_SECONDS * self._patience
            everybody = (*self.service.needs, self.service)
            if not self.given_up and any(not each.alive() or each.silence() > limit for each in everybody):
                self.look_after()


def _is_down(fault: str) -> bool:
    return "Connection" in fault or "RemoteDisconnected" in fault or "Timeout" in fault or "status 50" in fault


class HttpAttack(Attack):
    """Hostile requests from several senders at once."""

    def __init__(self, maker: Callable[[Random], Http], sessions: bool, *rest: Any) -> None:
        super().__init__(*rest)
        self.maker = maker
        self._sessions = sessions

    def send_alone(self, number: int) -> None:
        given = self.make(number)
        data = self._aimed(given.data, prober.Sessions(self.service.port)) if self._sessions else given.data
        with contextlib.suppress(OSError):
            asyncio.run(Connection(self.service.port).send(given, data, 10.0))

    def _send_all(self, advance: Callable[[], None]) -> None:
        asyncio.run(self._send_from_all(advance))

    async def _send_from_all(self, advance: Callable[[], None]) -> None:
        # Inputs that are not whole may never be answered: the others do not wait for them.
        self._beside = asyncio.Semaphore(_BESIDE)
        self._tasks: set[asyncio.Task[None]] = set()
        await asyncio.gather(*(self._sender(advance) for _ in range(SENDERS)))
        await asyncio.gather(*self._tasks)

    async def _send_beside(self, number: int, given: Http, data: bytes) -> None:
        connection = Connection(self.service.port)
        try:
            await self._send(connection, number, given, data)
        finally:
            connection.close()
            self._beside.release()

    async def _sender(self, advance: Callable[[], None]) -> None:
        connection = Connection(self.service.port)
        sessions = prober.Sessions(self.service.port) if self._sessions else None
        for number in self._numbers:
            advance()
            if self.given_up:
                continue
            given = self.make(number)
            self.took(number)
            try:
                data = await asyncio.to_thread(self._aimed, given.data, sessions) if sessions else given.data
            except (OSError, ValueError, KeyError, prober.http.client.HTTPException):
                await asyncio.to_thread(self.look_after)
                continue
            if given.due:
                await self._send(connection, number, given, data)
            else:
                await self._beside.acquire()
                self._tasks.add(asyncio.create_task(self._send_beside(number, given, data)))
        connection.close()

    @staticmethod
    def _aimed(data: bytes, sessions: prober.Sessions) -> bytes:
        return data.replace(SESSION.encode(), sessions.key().encode())

    async def _send(self, connection: Connection, number: int, given: Http, data: bytes) -> None:
        seconds = _ANSWER_SECONDS * self._patience if given.due else _WAITING_SECONDS + 10 * given.drip
        self._unanswered.add(number)
        try:
            answer = await connection.send(given, data, seconds)
        except OSError:
            self.result.statuses["no connection"] += 1
            await asyncio.to_thread(self.look_after)
            return
        finally:
            self._unanswered.discard(number)
        statuses = self.result.statuses
        statuses[f"{answer.status // 100}xx" if answer.status else answer.note or "closed"] += 1
        if answer.status >= 500 and answer.status not in (503, 505):
            statuses[str(answer.status)] += 1
            self.result.fault(number, f"{given.kind}: {answer.status} {answer.body!r}", data)
        elif answer.status == 503:
            statuses["503"] += 1
        elif given.due and not answer.status and self.service.alive():
            await asyncio.sleep(0.3)
            if self.service.alive():
                self.result.fault(number, f"{given.kind}: no answer ({answer.note})", data)
        if not self.service.alive():
            await asyncio.to_thread(self.look_after)


class PeerAttack(Attack):
    """Hostile peers of a ZMQ socket; after every few of them the honest one must still be served."""

    def __init__(
        self, maker: Callable[[Random], Peer], address: Callable[[], str], key: Callable[[], str], *rest: Any
    ) -> None:
        super().__init__(*rest)
        self.maker = maker
        self._address, self._key = address, key
        self._context = zmq.Context()

    def send_alone(self, number: int) -> None:
        self._knock(self.make(number))

    def _send_all(self, advance: Callable[[], None]) -> None:
        numbers = list(self._numbers)
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(numbers), _PEERS_AT_ONCE):
                batch = numbers[start : start + _PEERS_AT_ONCE]
                if not self.given_up:
                    for number in batch:
                        self.took(number)
                    self._recent = deque(batch)
                    for kind in pool.map(self._knock, map(self.make, batch)):
                        self.result.statuses[kind] += 1
                    if not self._answers() and not self._recovered():
                        self._end_silent()
                for _ in batch:
                    advance()
        self._context.destroy(linger=0)

    def _recovered(self) -> bool:
        """Whether somebody else brought it back meanwhile."""
        return self.service.alive() and self.service.silence() < 1.0 and not self._recent

    def _end_silent(self) -> None:
        with self._lock:
            self._bring_back(self.service)

    def _knock(self, peer: Peer) -> str:
        address = self._address()
        if not peer.frames:
            port = int(address.rpartition(":")[2])
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                raw.sendall(peer.tcp)
                raw.settimeout(0.05)
                with contextlib.suppress(OSError):
                    raw.recv(100)
            return "tcp"
        wire = self._context.socket(zmq.DEALER)
        wire.linger = 300
        if peer.identity:
            wire.setsockopt(zmq.IDENTITY, peer.identity)
        if peer.keyed:
            secure_client(wire, self._key(), max_bytes=2**31)
        wire.sndtimeo = 5000  # a listener that refuses the handshake takes the socket's only pipe away
        wire.connect(address)
        with contextlib.suppress(zmq.Again):
            wire.send_multipart(list(peer.frames))
        # Time to arrive: a message of a socket that closes may be lost.
        wire.poll(20)
        wire.close()
        return peer.kind


class RecordsAttack(Attack):
    """Files of rollouts with hostile lines; the viewer must still show the good line after them."""

    _LINES: Final = 200

    def __init__(self, services: Services, *rest: Any) -> None:
        super().__init__(services, *rest)
        self.maker = reader_inputs.records(services.run)
        self._files = itertools.count(1000)

    def send_alone(self, number: int) -> None:
        step = self._write([number])
        self._is_shown(step)

    def _send_all(self, advance: Callable[[], None]) -> None:
        numbers = list(self._numbers)
        for start in range(0, len(numbers), self._LINES):
            batch = numbers[start : start + self._LINES]
            if not self.given_up:
                self._recent = deque(batch)
                self.result.sent += len(batch)
                step = self._write(batch)
                if self._is_shown(step):
                    self.result.statuses["shown after"] += len(batch)
                    self._look_at(batch, step)
                else:
                    self._blame(batch)
            for _ in batch:
                advance()

    def _blame(self, batch: list[int]) -> None:
        with self._lock:
            silent = self.service.alive()
            how = "the index shows nothing new" if silent else f"ended with code {self.service.stop()}"
            self.result.deaths.append({"how": how, "said": self.service.last_words(), "suspects": [], "culprits": []})
            # The lines stay in their file, which would end the next viewer as well.
            self._forget()
            self.service.stop()
            self.service.start()
            if len(self.result.deaths) <= _SHOWN:
                number = self._one_of(batch)
                self.result.deaths[-1]["culprits"] = [{"input": number, "data": repr(self.make(number)[:300])}]

    def _one_of(self, suspects: list[int]) -> int:
        """The first line that the index cannot get over, by halves."""
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            if self._is_shown(self._write(half), seconds=6.0):
                suspects = suspects[len(half) :]
            else:
                suspects = half
                self._forget()
                self.service.stop()
                self.service.start()
        return suspects[0]

    def _forget(self) -> None:
        for file in self._services.run.paths.rollouts.glob("step_1[0-9][0-9][0-9]*/rollouts.jsonl"):
            file.unlink()

    def _write(self, numbers: list[int]) -> int:
        step = next(self._files)
        good = json.dumps(self._services.run.rollout(f"{step}.0.9", "sent")).encode()
        path = self._services.run.paths.rollouts_file(step)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(self.make(number) + b"\n" for number in numbers) + good + b"\n")
        return step

    def _status(self, path: str) -> tuple[int, bytes]:
        try:
            return prober.exchange(self.service.port, request("GET", path, headers={"Connection": "close"}), 30.0)
        except (OSError, prober.http.client.HTTPException):
            return 0, b""

    def _is_shown(self, step: int, seconds: float = 20.0) -> bool:
        deadline = time.time() + seconds * self._patience
        while time.time() < deadline and self.service.alive():
            if self._status(f"/runs/0/rollout?id={step}.0.9")[0] == 200 and self._status("/runs/0/status")[0] == 200:
                return True
            time.sleep(0.05)
        return False

    def _look_at(self, batch: list[int], step: int) -> None:
        """The pages that show what is odd; the index has it by now."""
        pages = [
            f"/runs/0/rollouts?step={step}",
            "/runs/0/rollouts",
            "/",
            f"/runs/0/group?id={step}.0",
            "/runs/0/store",
        ]
        pages += [f"/runs/0/rollout?id=7.0.{member}" for member in range(3)]
        for page in pages:
            status, body = self._status(page)
            self.result.statuses[f"page {status // 100}xx"] += 1
            if status >= 500 or status == 0:
                self.result.fault(
                    batch[0], f"{page} after inputs {batch[0]} to {batch[-1]}: {status} {body[:200]!r}", b""
                )


class ArchivesAttack(Attack):
    """Archives that a process imports, with a good one every so often."""

    _GOOD_EVERY: Final = 25

    def __init__(self, services: Services, target: str, seed: int, patience: float) -> None:
        # The process is a child of ours that is spoken to; there is no service.
        self._target, self._seed, self._patience = target, seed, patience
        self.result = Result(target)
        self._root = services.root / "archives"
        self._root.mkdir()
        (self._root / "outside").mkdir()
        self.maker = reader_inputs.archives(services.run, self._root / "outside")
        self._good = reader_inputs.good_archive(services.run)
        self._importer: subprocess.Popen[str] | None = None

    def run(self, first: int, count: int, advance: Callable[[], None]) -> Result:
        began, seconds, peaks = time.time(), [], []
        for number in range(first, first + count):
            advance()
            if number % self._GOOD_EVERY == 0:
                begun = time.monotonic()
                answer = self._import(self._good)
                seconds.append(time.monotonic() - begun)
                peaks.append(answer.get("peak_kib", 0) / 1024)
                if answer["status"] != "imported":
                    self.result.num_probe_faults += 1
                    self.result.probe_faults.append(str(answer))
            data = self.make(number)
            answer = self._import(data)
            self.result.sent += 1
            self.result.statuses[answer["status"]] += 1
            if answer["status"] in ("failed", "outside"):
                self.result.fault(number, f"{answer['status']}: {answer['note']}", data[-1500:-1000])
            elif answer["status"] == "dead":
                self.result.deaths.append(
                    {"how": answer["note"], "suspects": [number], "culprits": [{"input": number}]}
                )
        if self._importer is not None:
            self._importer.kill()
            self._importer.wait()
        self.result.probes, self.result.slowest = len(seconds), round(max(seconds), 3)
        self.result.median = round(sorted(seconds)[len(seconds) // 2], 3)
        self.result.memory_mib = {"first": round(peaks[0]), "last": round(peaks[-1]), "peak": round(max(peaks))}
        self.result.seconds = round(time.time() - began, 1)
        return self.result

    def _import(self, data: bytes) -> dict[str, Any]:
        if self._importer is None:
            self._importer = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.importer", str(self._root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            assert self._importer.stdout is not None
            self._importer.stdout.readline()
        process = self._importer
        path = self._root / "archive.tar"
        path.write_bytes(data)
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(_ANSWER_SECONDS * self._patience, process.kill)
        timer.start()
        try:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self._importer = None
            return {"status": "dead", "note": f"the importer ended with code {process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _honest_peers(services: Services) -> dict[str, list[bytes]]:
    """Messages of honest peers, caught by sockets of our own."""
    from pointillist.environments.executor import RolloutResult
    from pointillist.environments.workers import protocol
    from pointillist.transport.zmq import ZmqReceiver

    context = zmq.Context()
    wire = context.socket(zmq.ROUTER)
    secure_listener(wire, os.environ[RUN_KEY], max_bytes=2**31)
    port = wire.bind_to_random_port("tcp://127.0.0.1")
    # Of a rank that the run does not have, so that it takes nothing from the honest one.
    receiver = ZmqReceiver(f"tcp://127.0.0.1:{port}", 99)
    receiver.discard_before(1)
    threading.Thread(target=receiver.receive, args=(1,), daemon=True).start()
    ranks = [wire.recv_multipart()[-1] for _ in range(2) if wire.poll(5000)]
    context.destroy(linger=0)
    said = [
        protocol.Hello(1, ["a"], ["b"]),
        protocol.Pong(),
        protocol.Begun("1.0.0", "a"),
        protocol.Done(RolloutResult(id="1.0.0", task_id="a")),
    ]  # fmt: skip
    return {"transport": ranks or [b"\x80"], "workers": [protocol.encode(message) for message in said]}


def attack(services: Services, target: str, seed: int, patience: float, hold: float) -> Attack:
    """The attack on one target; starts what it needs."""
    rest = (target, seed, patience)
    if target in gateway_inputs.PATHS:
        return HttpAttack(gateway_inputs.inputs(target), True, services, "gateway", *rest)
    if target in ("references", "sampling", "bodies"):
        return HttpAttack(getattr(generate_inputs, target)(services.prompts), False, services, "inference", *rest)
    if target.endswith(" http"):
        service = target.removesuffix(" http")
        routes = {
            "inference": [generate_inputs.GENERATE, "/health", "/metrics", "/v1/models"],
            "gateway": [f"/s/{SESSION}/v1/{path}" for path in gateway_inputs.PATHS.values()] + ["/health", "/sessions"],
            "viewer": ["/", "/runs/0/rollouts", "/runs/0/status"],
            "assets": ["/weights", "/health", "/images/x"],
        }[service]
        return HttpAttack(http_inputs.inputs(routes, hold=hold), service == "gateway", services, service, *rest)
    if target in ("pages", "assets"):
        service = "viewer" if target == "pages" else "assets"
        return HttpAttack(getattr(reader_inputs, target)(services.run), False, services, service, *rest)
    if target == "records":
        return RecordsAttack(services, "viewer", *rest)
    if target in ("transport", "workers"):
        maker = peer_inputs.inputs(_honest_peers(services)[target], compressed=target == "workers")
        address = (
            services.pool_address if target == "workers" else lambda: f"tcp://127.0.0.1:{services.get(target).port}"
        )
        key = services.pool_key if target == "workers" else lambda: os.environ[RUN_KEY]
        return PeerAttack(maker, address, key, services, target, *rest)
    return ArchivesAttack(services, *rest)
