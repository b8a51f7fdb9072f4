"""The guarded fetch against a real HTTP server."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pointillist.errors import SourceError
from pointillist.images import ImageStore, Sources
from pointillist.images.remote import RemoteImages, public_address
from tests.conftest import encoded, picture

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
