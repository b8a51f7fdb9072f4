"""The asset endpoint and its readers: the same pixels, nothing but images and weights, a bounded store."""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from pointillist.assets.cache import FetchedImages
from pointillist.assets.client import AssetClient
from pointillist.assets.server import create_app
from pointillist.config import InferenceConfig
from pointillist.errors import AssetError, ConfigError, MissingImageError, RefError
from pointillist.families import Family, place_image
from pointillist.images import ImageLimits, ImageStore
from pointillist.pixels import RawImageMaterializer
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths
from pointillist.weights.fetch import WeightFolders
from tests.helpers.pictures import encoded, picture

KEY = "the run's own word"
LIMITS = ImageLimits()


@dataclass
class Endpoint:
    url: str
    store: ImageStore
    paths: RunPaths

    def client(self, key: str = KEY) -> AssetClient:
        return AssetClient([self.url], key, timeout=10)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    paths = RunPaths(tmp_path / "run")
    store = ImageStore(_made(paths.output_dir / "assets" / "images"), LIMITS)
    wire = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(store.root, paths, KEY, LIMITS), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([wire],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Endpoint(f"http://127.0.0.1:{wire.getsockname()[1]}", store, paths)
    server.should_exit = True
    thread.join()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _name(store: ImageStore, uri: str) -> str:
    return uri.removeprefix(f"file://{store.root}/")


def test_a_reader_without_the_folder_has_the_same_pixels(endpoint: Endpoint, family: Family, tmp_path: Path) -> None:
    stored = endpoint.store.put(encoded(picture(64, 96)))
    layout = family.layout(64, 96)
    ref = place_image(family, stored, layout, 0)
    local = RawImageMaterializer(family, [endpoint.store.root], LIMITS)
    expected = local.materialize([ref])
    # As on another machine: the reference's folder is not there.
    endpoint.store.root.rename(tmp_path / "elsewhere")
    fetched = FetchedImages(tmp_path / "mine", 10**6, endpoint.client(), LIMITS)
    with pytest.raises(MissingImageError):
        RawImageMaterializer(family, [endpoint.store.root], LIMITS, fetched=fetched).materialize([ref])
    (tmp_path / "elsewhere").rename(endpoint.store.root)
    reader = RawImageMaterializer(family, [tmp_path / "not" / "here"], LIMITS, fetched=fetched)
    with pytest.raises(RefError, match="not an image under an allowed root"):
        reader.materialize([ref])
    data = fetched.read(_name(endpoint.store, stored.uri), stored.sha256)
    assert hashlib.sha256(data).hexdigest() == stored.sha256
    (endpoint.store.root / _name(endpoint.store, stored.uri)).unlink()  # from now on it is in the reader's store only
    again = RawImageMaterializer(family, [endpoint.store.root], LIMITS, fetched=fetched)
    tensors = again.materialize([ref])
    assert np.array_equal(tensors["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    "path",
    [
        "/images/../configs/rl.toml", "/images/%2e%2e/secret", "/images/ab/notes.txt", "/images/",
        "/images//etc/passwd", "/configs/rl.toml", "/weights/7", "/weights/-1", "/weights/../x",
        f"/images/00/{'0' * 64}.png", f"/weights/{'9' * 5000}", "/weights/\u0661", "/weights/01", "/weights/3/x",
        "/weights/%00", "/images/%00", "/images/%ed%a0%80", f"/images/{'a' * 5000}", "/weights/1e3",
    ],
)  # fmt: skip
def test_nothing_else_can_be_asked_for(endpoint: Endpoint, path: str) -> None:
    (endpoint.paths.output_dir / "secret").write_text("s")
    _made(endpoint.store.root / "ab").joinpath("notes.txt").write_text("s")
    _made(endpoint.paths.configs).joinpath("rl.toml").write_text("s")
    answer = httpx.get(f"{endpoint.url}{path}", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 404, path
    assert httpx.post(f"{endpoint.url}{path}", headers={"Authorization": f"Bearer {KEY}"}).status_code in (404, 405)


def test_links_are_not_followed(endpoint: Endpoint, tmp_path: Path) -> None:
    data = encoded(picture(32, 32))
    sha256 = hashlib.sha256(data).hexdigest()
    (tmp_path / "outside").write_bytes(data)
    _made(endpoint.store.root / sha256[:2]).joinpath(f"{sha256}.png").symlink_to(tmp_path / "outside")
    answer = httpx.get(f"{endpoint.url}/images/{sha256[:2]}/{sha256}.png", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 404


def test_the_key_is_asked_for(endpoint: Endpoint, tmp_path: Path) -> None:
    stored = endpoint.store.put(encoded(picture(32, 32)))
    name = _name(endpoint.store, stored.uri)
    assert httpx.get(f"{endpoint.url}/images/{name}").status_code == 401
    assert httpx.get(f"{endpoint.url}/weights").status_code == 401
    assert httpx.get(f"{endpoint.url}/health").status_code == 200
    reader = FetchedImages(tmp_path / "mine", 10**6, endpoint.client("another word"), LIMITS)
    with pytest.raises(MissingImageError, match="answered 401"):
        reader.read(name, stored.sha256)


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "127.0.0.1/health", "a@b/health", ""])
def test_no_host_header_opens_a_route(endpoint: Endpoint, host: str) -> None:
    stored = endpoint.store.put(encoded(picture(32, 32)))
    for path in (f"/images/{_name(endpoint.store, stored.uri)}", "/weights", "/weights/1"):
        assert httpx.get(f"{endpoint.url}{path}", headers={"Host": host}).status_code in (400, 401)


@pytest.mark.parametrize("path", ["/health/", "//health", "/health/../weights", "/weights?/health", "/./health"])
def test_only_health_needs_no_key(endpoint: Endpoint, path: str) -> None:
    with socket.create_connection(("127.0.0.1", int(endpoint.url.rpartition(":")[2])), timeout=120) as wire:
        wire.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b" 401 " in wire.recv(100)


def test_damage_on_the_way_is_found(endpoint: Endpoint, tmp_path: Path) -> None:
    stored = endpoint.store.put(encoded(picture(32, 32)))
    name = _name(endpoint.store, stored.uri)
    reader = FetchedImages(tmp_path / "mine", 10**6, endpoint.client(), LIMITS)
    good = reader.read(name, stored.sha256)
    # A damaged file of the reader's own store is fetched anew, a damaged one of the writers' is refused.
    (tmp_path / "mine" / name).write_bytes(good[:-1] + b"x")
    assert reader.read(name, stored.sha256) == good
    (endpoint.store.root / name).write_bytes(good[:-1] + b"x")
    (tmp_path / "mine" / name).unlink()
    with pytest.raises(RefError, match="the file is corrupt"):
        reader.read(name, stored.sha256)


def test_the_readers_store_is_bounded(endpoint: Endpoint, tmp_path: Path) -> None:
    stored = [endpoint.store.put(encoded(picture(32, 32, seed))) for seed in range(12)]
    bound = sum(each.num_bytes for each in stored[:5])
    reader = FetchedImages(tmp_path / "mine", bound, endpoint.client(), LIMITS)
    for number, each in enumerate(stored):
        reader.read(_name(endpoint.store, each.uri), each.sha256)
        # The first is used again and again, so it stays.
        reader.read(_name(endpoint.store, stored[0].uri), stored[0].sha256)
        left = list((tmp_path / "mine").rglob("*.png"))
        assert sum(path.stat().st_size for path in left) <= bound, number
    names = {path.stem for path in left}
    assert stored[0].sha256 in names
    assert stored[-1].sha256 in names
    # Another reader of the same folder knows what lies there.
    other = FetchedImages(tmp_path / "mine", bound, AssetClient(["http://127.0.0.1:1"], KEY, 1), LIMITS)
    assert other.read(_name(endpoint.store, stored[-1].uri), stored[-1].sha256)
    with pytest.raises(MissingImageError, match="did not answer"):
        other.read(_name(endpoint.store, stored[1].uri), stored[1].sha256)


def test_an_endpoint_that_is_gone_is_passed_over(endpoint: Endpoint, tmp_path: Path) -> None:
    stored = endpoint.store.put(encoded(picture(32, 32)))
    client = AssetClient(["http://127.0.0.1:1", endpoint.url], KEY, timeout=2)
    assert FetchedImages(tmp_path / "mine", 10**6, client, LIMITS).read(
        _name(endpoint.store, stored.uri), stored.sha256
    )
    with pytest.raises(AssetError, match="more than 10 bytes"):
        client.fetch(f"/images/{_name(endpoint.store, stored.uri)}", max_bytes=10)


def test_weights_are_downloaded_whole(endpoint: Endpoint, tmp_path: Path) -> None:
    assert httpx.get(f"{endpoint.url}/weights", headers={"Authorization": f"Bearer {KEY}"}).json() == {"version": None}
    _made(endpoint.paths.broadcast_step(3)).joinpath(WEIGHTS_FILE).write_bytes(weights := bytes(range(256)) * 10_000)
    assert httpx.get(f"{endpoint.url}/weights", headers={"Authorization": f"Bearer {KEY}"}).json() == {"version": 3}
    endpoint.client().download("/weights/3", tmp_path / "here" / WEIGHTS_FILE)
    assert (tmp_path / "here" / WEIGHTS_FILE).read_bytes() == weights
    with pytest.raises(AssetError, match="answered 404"):
        endpoint.client().download("/weights/4", tmp_path / "there" / WEIGHTS_FILE)
    assert not (tmp_path / "there" / WEIGHTS_FILE).exists()


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "folder"])
def test_only_a_regular_file_is_weights(endpoint: Endpoint, tmp_path: Path, kind: str) -> None:
    _made(tmp_path / "outside").joinpath(WEIGHTS_FILE).write_text("secret")
    folder = endpoint.paths.broadcast_step(3)
    _made(folder if kind != "folder link" else folder.parent)
    if kind == "link":
        (folder / WEIGHTS_FILE).symlink_to(tmp_path / "outside" / WEIGHTS_FILE)
    elif kind == "folder link":
        folder.symlink_to(tmp_path / "outside")
    elif kind == "pipe":
        os.mkfifo(folder / WEIGHTS_FILE)
    else:
        (folder / WEIGHTS_FILE).mkdir()
    answer = httpx.get(f"{endpoint.url}/weights/3", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 404


def _digests(folder: Path, data: bytes) -> None:
    digest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "digests.json").write_text(json.dumps({"files": {WEIGHTS_FILE: digest}}))


def test_weights_by_parts_and_without_their_bytes(endpoint: Endpoint) -> None:
    folder = _made(endpoint.paths.broadcast_step(3))
    (folder / WEIGHTS_FILE).write_bytes(weights := bytes(range(256)) * 1000)
    key = {"Authorization": f"Bearer {KEY}"}
    url = f"{endpoint.url}/weights/3"
    assert httpx.get(url, headers=key | {"Range": "bytes=10-19"}).content == weights[10:20]
    head = httpx.head(url, headers=key)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(weights)), b"")
    for odd in ("bytes=", "bytes=9-1", f"bytes={'9' * 5000}-", "x", "bytes=" + "0-1," * 2000):
        assert httpx.get(url, headers=key | {"Range": odd}).status_code < 500
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        httpx.head(url, headers=key)
    assert len(list(Path("/proc/self/fd").iterdir())) < open_files + 10


def test_corrupt_weights_are_not_taken(endpoint: Endpoint, tmp_path: Path) -> None:
    folder, target = _made(endpoint.paths.broadcast_step(3)), tmp_path / "here" / WEIGHTS_FILE
    _digests(folder, weights := b"weights" * 1000)
    (folder / WEIGHTS_FILE).write_bytes(b"x" + weights[1:])
    with pytest.raises(AssetError, match="another digest than"):
        endpoint.client().download("/weights/3", target)
    assert list(target.parent.iterdir()) == []
    (folder / WEIGHTS_FILE).write_bytes(weights)
    assert endpoint.client().download("/weights/3", target) == hashlib.sha256(weights).hexdigest()
    for text in ("[" * 5000, "{}", '{"files": 5}', ""):  # nothing that could be used
        (folder / "digests.json").write_text(text)
        endpoint.client().download("/weights/3", target)


def test_fetched_weights_that_rot_are_fetched_anew(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSETS", KEY)
    _made(endpoint.paths.broadcast_step(3)).joinpath(WEIGHTS_FILE).write_bytes(weights := b"weights" * 1000)
    config = InferenceConfig.model_validate(
        {
            "model": {"name": "m"},
            "output_dir": str(tmp_path / "reader"),
            "multimodal": {"assets": {"urls": [endpoint.url], "api_key_var": "ASSETS"}},
        }
    )
    folders = WeightFolders(config)
    here = RunPaths(tmp_path / "reader").broadcast_step(3)
    for rotten in (None, b"rotten", weights[:-1], b""):
        if rotten is not None:
            (here / WEIGHTS_FILE).write_bytes(rotten)
        assert folders.folder(str(here), 3) == here
        assert (here / WEIGHTS_FILE).read_bytes() == weights


def test_a_body_is_not_read(endpoint: Endpoint) -> None:
    answer = httpx.request("GET", f"{endpoint.url}/health", content=b"x" * 10)
    assert answer.status_code == 413


class _Odd(BaseHTTPRequestHandler):
    """Asset endpoints as they should not be."""

    def do_GET(self) -> None:
        if self.path == "/images/slow-headers":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Long: ")
            return
        self.send_response(200)
        if self.path.startswith("/images/gz"):
            self.send_header("Content-Encoding", "gzip")
        if self.path == "/weights/huge":
            self.send_header("Content-Length", str(10**17))
        if self.path == "/weights/drip":
            self.send_header("Content-Length", "10000")
        self.end_headers()
        if self.path.endswith("/drip"):
            self._drip(b"")
        else:
            self.wfile.write(b"x" * 2000)

    def _drip(self, first: bytes) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(first)
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, *_: object) -> None:
        pass


def test_slow_endless_and_compressed_answers_are_given_up(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = AssetClient([f"http://127.0.0.1:{server.server_address[1]}"], KEY, timeout=0.5)
        with pytest.raises(AssetError, match=r"after 0.5 s|did not answer"):
            client.fetch("/images/drip", 10_000)
        with pytest.raises(AssetError, match=r"after 0.5 s|did not answer"):
            client.fetch("/images/slow-headers", 10_000)
        with pytest.raises(AssetError, match="gzip"):
            client.fetch("/images/gz", 10_000)
        with pytest.raises(AssetError, match="more than 1000 bytes"):
            client.fetch("/images/large", 1000)
        for path, said in (
            ("drip", r"after 0.5 s|did not answer"),
            ("huge", "has room for"),
            ("endless", "its length"),
        ):
            with pytest.raises(AssetError, match=said):
                client.download(f"/weights/{path}", tmp_path / "weights")
        assert list(tmp_path.iterdir()) == []
        server.shutdown()


def test_the_next_endpoint_is_asked_where_one_sends_something_else(endpoint: Endpoint, tmp_path: Path) -> None:
    stored = endpoint.store.put(data := encoded(picture(16, 16)))
    name = _name(endpoint.store, stored.uri)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        odd = f"http://127.0.0.1:{server.server_address[1]}"
        for max_bytes in (1000, 10**6):  # too much, or other bytes
            client = AssetClient([odd, endpoint.url], KEY, timeout=10)
            assert client.fetch(f"/images/{name}", max_bytes, stored.sha256) == data
        with pytest.raises(RefError, match="corrupt"):
            AssetClient([odd], KEY, timeout=10).fetch(f"/images/{name}", 10**6, stored.sha256)
        server.shutdown()
    reader = FetchedImages(tmp_path / "mine", 10**6, endpoint.client(), LIMITS)
    for wrong in ("../../etc/passwd", f"{name}/..", name.replace(".png", ".html"), "weights"):
        with pytest.raises(RefError, match="expected the name"):
            reader.read(wrong, stored.sha256)


def test_a_failing_disk_costs_only_the_keeping(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(picture(16, 16))
    stored = endpoint.store.put(data)
    fetched = FetchedImages(tmp_path / "mine", 1, endpoint.client(), LIMITS)  # evicts at once

    def failing(*_: object, **__: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "unlink", failing)
    assert fetched.read(_name(endpoint.store, stored.uri), stored.sha256) == data
    with pytest.raises(ConfigError, match="image folder"):
        FetchedImages(Path("/proc/none/mine"), 1, endpoint.client(), LIMITS)
