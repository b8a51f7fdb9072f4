"""The guarded fetch against a real HTTP server."""

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.errors import SourceError
from pointillist.images import ImageStore, Sources, normalize_images
from pointillist.images.remote import RemoteImages, is_public, public_address
from tests.helpers.pictures import encoded, picture

PNG = encoded(picture(8, 6))


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/image":
            self._answer(200, PNG)
        elif self.path == "/hop":
            self._answer(302, b"", Location="/image")
        elif self.path == "/loop":
            self._answer(302, b"", Location="/loop")
        elif self.path == "/inside":
            self._answer(302, b"", Location="http://127.0.0.1:1/secret")
        elif self.path == "/file":
            self._answer(302, b"", Location="file:///etc/passwd")
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b"x")
                time.sleep(0.1)
        else:
            self._answer(404, b"no")

    def _answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def _known(host: str, port: int) -> str:
    """Name service of these tests: one public name; everything else by the real rules."""
    return "127.0.0.1" if host == "pictures.test" else public_address(host, port)


def _url(port: int, path: str) -> str:
    return f"http://pictures.test:{port}{path}"


@pytest.mark.parametrize("path", ["/image", "/hop"])
def test_images_and_redirects(port: int, path: str, store: ImageStore) -> None:
    sources = Sources(store, fetch=RemoteImages(10_000, address_of=_known).fetch)
    stored = sources.put(_url(port, path))
    assert (stored.header.width, stored.header.height) == (8, 6)


@pytest.mark.parametrize(
    ("path", "message"),
    [("/loop", "redirects"), ("/inside", "not a public"), ("/file", "scheme 'file'"), ("/nothing", "answered 404")],
)
def test_refusals(port: int, path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        RemoteImages(10_000, address_of=_known).fetch(_url(port, path))


def test_size_and_time_are_bounded(port: int) -> None:
    with pytest.raises(SourceError, match="more than the 100 bytes"):
        RemoteImages(100, address_of=_known).fetch(_url(port, "/image"))
    with pytest.raises(SourceError, match=r"not there after|no answer"):
        RemoteImages(10_000, seconds=0.3, address_of=_known).fetch(_url(port, "/slow"))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::1", "fd00::1",
     "::ffff:10.0.0.1",
     "224.0.0.1", "no-such-host.invalid"],
)  # fmt: skip
def test_private_and_unknown_hosts_are_refused(host: str) -> None:
    with pytest.raises(SourceError, match=r"not a public address|is unknown"):
        public_address(host, 80)


@pytest.mark.parametrize("url", ["http://", "http://[", "https://127.0.0.1/a.png", "http://0x7f.1/a.png"])
def test_odd_urls_are_source_errors(url: str, store: ImageStore) -> None:
    with pytest.raises(SourceError):
        Sources(store, fetch=RemoteImages(100).fetch).put(url)
    with pytest.raises(SourceError, match="allow_remote"):
        Sources(store).put(url)


class _Raw:
    """A server that says exactly what it is told, one connection after the other, each in a thread."""

    def __init__(self, answer: Callable[[socket.socket, str], None]) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.asked: list[str] = []
        self.ended = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (piece := connection.recv(4096)):
                head += piece
            self.asked.append(head.decode("latin-1"))
            self._answer(connection, head.split(b" ")[1].decode("latin-1") if b" " in head else "")

    def close(self) -> None:
        self.ended.set()
        self._socket.close()

    def drip(self, connection: socket.socket, first: bytes, piece: bytes) -> None:
        """Sends a piece ten times a second for as long as anybody listens."""
        connection.sendall(first)
        while not self.ended.wait(0.1):
            connection.sendall(piece)


@contextlib.contextmanager
def _raw(answer: Callable[["_Raw", socket.socket, str], None]) -> Iterator["_Raw"]:
    server = _Raw(lambda connection, path: answer(server, connection, path))
    yield server
    server.close()


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: 1\r\n"),
        (b"HTTP/1.1 200", b" "),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (b"", b""),
    ],
)
def test_one_deadline_covers_headers_and_body(first: bytes, piece: bytes) -> None:
    with (
        _raw(lambda server, connection, _: server.drip(connection, first, piece)) as server,
        pytest.raises(SourceError, match=r"not there after 0.5 s|no answer"),
    ):
        RemoteImages(10_000, seconds=0.5, address_of=_known).fetch(_url(server.port, "/"))


def test_one_deadline_covers_the_handshake_and_all_redirects() -> None:
    def hop(server: _Raw, connection: socket.socket, path: str) -> None:
        server.ended.wait(0.3)
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /next\r\nContent-Length: 0\r\n\r\n")

    with (
        _raw(hop) as server,
        pytest.raises(SourceError, match=r"not there after 0.5 s"),
    ):
        RemoteImages(10_000, seconds=0.5, address_of=_known).fetch(_url(server.port, "/"))
    with (
        _raw(lambda server, connection, _: server.drip(connection, b"", b"")) as server,
        pytest.raises(SourceError, match=r"not there after 0.5 s|no answer"),
    ):
        url = f"https://pictures.test:{server.port}/"
        RemoteImages(10_000, seconds=0.5, address_of=_known).fetch(url)


def test_one_deadline_covers_name_service() -> None:
    known = threading.Event()

    def slow(host: str, port: int) -> str:
        known.wait(60)
        return "127.0.0.1"

    with pytest.raises(SourceError, match=r"not there after 0.3 s"):
        RemoteImages(10_000, seconds=0.3, address_of=slow).fetch("http://slow.test/")
    known.set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "302 without a Location"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "answered 304"),
        (b"HTTP/1.1 300 Choices\r\nContent-Length: 0\r\n\r\n", "answered 300"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n", "no answer|is unknown"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://a:b@pictures.test/\r\nContent-Length: 0\r\n\r\n", "user name"),
        (b"HTTP/1.1 302 Found\r\nLocation: gopher://x/\r\nContent-Length: 0\r\n\r\n", "scheme 'gopher'"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", "compressed .gzip."),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\nabc", "no answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "no answer"),
        (b"no HTTP at all\r\n\r\n", "no answer"),
        (b"", "no answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Long: " + b"x" * 200_000, "no answer"),
    ],
)
def test_every_failure_is_a_source_error_with_its_cause(answer: bytes, message: str) -> None:
    with (
        _raw(lambda _, connection, __: connection.sendall(answer)) as server,
        pytest.raises(SourceError, match=message) as raised,
    ):
        RemoteImages(10_000, seconds=20, address_of=_known).fetch(_url(server.port, "/"))
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:word@pictures.test/a.png", "user name"),
        ("http://pictures.test:25/a.png", "port 25"),
        ("http://pictures.test:22/", "port 22"),
        ("ftp://pictures.test/a.png", "scheme 'ftp'"),
        ("http://pictures.test:99999/", "no answer"),
        ("http://pictures.test:1024\n/", "no answer"),
        ("http:///a.png", "with a host"),
        ("http://2130706433/", "not a public"),
        ("http://0177.0.0.1/", "not a public|Invalid IPv4"),
        ("http://0x7f000001/", "not a public"),
        ("http://127.1/", "not a public"),
        ("http://[::ffff:127.0.0.1]/", "not a public"),
        ("http://[fe80::1%25eth0]/", "not a public|is unknown|no answer"),
        ("http://" + "a" * 300 + ".test/", "is unknown|no answer"),
        ("http://\u2488.test/", "is unknown|no answer"),
    ],
)
def test_urls_that_are_refused_unasked(url: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        RemoteImages(100, seconds=20, address_of=_known).fetch(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("64:ff9b::808:808", True), ("2002:808:808::1", True),
        ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", False), ("::10.0.0.1", False), ("::8.8.8.8", False),
        ("64:ff9b::a00:1", False), ("64:ff9b::7f00:1", False), ("64:ff9b:1::a00:1", False),
        ("64:ff9b:1::808:808", False), ("2002:a00:1::", False), ("2002:7f00:1::1", False), ("2002:c0a8:101::", False),
        ("2001:0:a00:1::1", False), ("2001:0:808:808:0:0:f5ff:fffe", False), ("2606:4700::5efe:a00:1", False),
        ("2606:4700::200:5efe:a00:1", False), ("fec0::1", False), ("fd00::1", False), ("fe80::1", False),
        ("::", False), ("::1", False), ("ff02::1", False), ("2001:db8::1", False), ("3fff::1", False),
        ("100.64.0.1", False), ("192.0.0.8", False), ("192.88.99.1", False), ("198.18.0.1", False),
        ("240.0.0.1", False), ("255.255.255.255", False), ("169.254.169.254", False), ("224.0.0.1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@given(st.integers(0, 2**32 - 1), st.sampled_from(["::ffff:0:0", "::", "64:ff9b::", "2002::", "2606:4700::5efe:0:0"]))
def test_no_form_of_an_ipv6_address_hides_a_private_ipv4_one(number: int, form: str) -> None:
    carried = ipaddress.IPv4Address(number)
    shift = 80 if form == "2002::" else 0
    whole = ipaddress.IPv6Address(int(ipaddress.IPv6Address(form)) | number << shift)
    assert not is_public(whole) or is_public(carried)


def test_one_private_address_among_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*addresses: str) -> Callable[..., list[Any]]:
        return lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", answers("8.8.8.8", "1.1.1.1"))
    assert public_address("two.test", 80) == "8.8.8.8"
    monkeypatch.setattr(socket, "getaddrinfo", answers("8.8.8.8", "10.0.0.1"))
    with pytest.raises(SourceError, match="not a public"):
        public_address("two.test", 80)
    monkeypatch.setattr(socket, "getaddrinfo", answers())
    with pytest.raises(SourceError, match="not a public"):
        public_address("none.test", 80)


def test_the_connection_goes_to_the_address_that_was_checked(port: int) -> None:
    looked_up: list[str] = []

    def rebinding(host: str, port: int) -> str:
        looked_up.append(host)
        if len(looked_up) > 1:
            raise SourceError("asked twice for one connection")
        return "127.0.0.1"

    assert RemoteImages(10_000, address_of=rebinding).fetch(_url(port, "/image")) == PNG
    assert looked_up == ["pictures.test"]


def test_what_a_server_is_told() -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG
    with _raw(lambda _, connection, __: connection.sendall(good)) as server:
        RemoteImages(10_000, address_of=_known).fetch(_url(server.port, "/a%20b.png?size=1"))
    (asked,) = server.asked
    assert asked.startswith("GET /a%20b.png?size=1 HTTP/1.1\r\n")
    assert f"\r\nHost: pictures.test:{server.port}\r\n" in asked
    assert "cookie" not in asked.lower()
    assert "authorization" not in asked.lower()


def test_fetches_wait_for_their_turn_and_not_for_ever() -> None:
    with _raw(lambda server, connection, _: server.drip(connection, b"", b"")) as server:
        remote = RemoteImages(10_000, seconds=1, address_of=_known, at_once=1)
        with ThreadPoolExecutor(4) as pool:
            fetches = [pool.submit(remote.fetch, _url(server.port, "/")) for _ in range(4)]
            said = [str(fetch.exception()) for fetch in fetches]
    assert all("not there after" in text or "no turn" in text or "no answer" in text for text in said)


async def test_slow_servers_hold_no_thread_of_the_callers(store: ImageStore) -> None:
    """More dripping fetches than the loop has threads: work in threads goes on all the same."""
    with _raw(lambda server, connection, _: server.drip(connection, b"", b"")) as server:
        sources = Sources(store, fetch=RemoteImages(10_000, seconds=60, address_of=_known).fetch)
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": _url(server.port, "/")}}]}
        fetching = [asyncio.create_task(sources.fetch_remote([message])) for _ in range(40)]
        while not server.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        other = {"type": "image", "image": PNG}
        for _ in range(20):
            await asyncio.to_thread(normalize_images, other, sources, [])
        assert not any(task.done() for task in fetching)
        server.close()
    for task in fetching:
        task.cancel()
    await asyncio.gather(*fetching, return_exceptions=True)


async def test_remote_images_of_a_message_are_stored_first(port: int, store: ImageStore) -> None:
    sources = Sources(store, fetch=RemoteImages(10_000, address_of=_known).fetch)
    text = {"type": "text", "text": "http://pictures.test/ is no image part"}
    part = {"type": "image", "source": {"type": "url", "url": _url(port, "/hop")}}
    messages = [{"role": "user", "content": [text, part]}, {"role": "tool", "content": [part]}]
    for using in (sources, sources.for_clients()):
        ready = await using.fetch_remote(messages)
        assert ready[0]["content"][0] == text
        images: list[Any] = []
        normalize_images(ready, using, images)
        assert len({image.uri for image in images}) == 1
        assert ready[0]["content"][1] == ready[1]["content"][0]
        assert images[0].uri == ready[0]["content"][1]["image_url"]["url"]
    closed = Sources(store)
    assert await closed.fetch_remote(messages) is messages
    with pytest.raises(SourceError, match="allow_remote"):
        normalize_images(messages, closed, [])
