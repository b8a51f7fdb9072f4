"""Hostile input against everything that parses: only errors of our own tree, nothing read outside, nothing large made.

A few hundred inputs a target with the other tests; `make fuzz` sets FUZZ_EXAMPLES for a long run.
"""

import base64
import builtins
import json
import os
import resource
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pointillist.errors import PointillistError, RequestError, SourceError
from pointillist.families import Family
from pointillist.images import ImageLimits, ImageStore, Sources, decode_rgb, normalize_images, read_header
from pointillist.images.remote import RemoteImages, public_address
from pointillist.inference.embedded.sampling import draw_noise, sample
from pointillist.inference.prompt import ServerBounds, check_prompt, check_sizes
from pointillist.inference.protocol import GenerateRequest, SamplingParams, decode_body
from pointillist.pixels import RawImageMaterializer
from pointillist.refs import build_mm_refs, decode_ref, encode_ref, parse_descriptor
from tests.helpers.pictures import encoded, picture, stored_ref

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=250_000, max_side=2_000)
SHA = "ab" * 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(tmp_path_factory.mktemp("fuzz") / "images", LIMITS)


@pytest.fixture(scope="module")
def reader(store: ImageStore, family: Family) -> RawImageMaterializer:
    return RawImageMaterializer(family, [store.root], LIMITS)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """The largest picture within the limits takes a few MB; hypothesis itself some tens."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


class _Opened:
    """Every path that is opened, by whatever way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        for module, name in ((os, "open"), (builtins, "open")):
            monkeypatch.setattr(module, name, self._recording(getattr(module, name)))

    def _recording(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(path: Any, *arguments: Any, **options: Any) -> Any:
            if options.get("dir_fd") is None and not isinstance(path, int):
                self.paths.append(os.fspath(path))
            return original(path, *arguments, **options)

        return recorded


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
paths = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["/etc/passwd", "/proc/self/mem", "/dev/zero", f"/store/ab/{SHA}.png", f"/../ab/{SHA}.png", "//x"]),
    st.lists(st.sampled_from(["..", ".", "", "ab", "etc", "%2e%2e", "%00", f"{SHA}.png"]), max_size=6).map("/".join),
)
uris = st.builds(
    lambda scheme, path: scheme + path, st.sampled_from(["file://", "FILE://", "", "file:", "http://"]), paths
)


def mangled(text: str) -> st.SearchStrategy[str]:
    """A string with a piece replaced."""
    return st.builds(
        lambda at, length, piece: text[:at] + piece + text[at + length :],
        st.integers(0, len(text)),
        st.integers(0, 8),
        st.text(max_size=8),
    )


def test_reference_strings(
    store: ImageStore, reader: RawImageMaterializer, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = stored_ref(family, store, picture(64, 64))
    value = {**{key: item for key, item in good.item.items() if key != "kind"}, "modality": "image", "hash": good.hash}
    opened = _Opened(monkeypatch)
    fields = st.dictionaries(st.sampled_from([*value, "extra"]), json_values | uris, max_size=3)
    as_text = fields.map(lambda change: json.dumps({**value, **change}, default=str)).map(
        lambda text: "mmraw:" + base64.urlsafe_b64encode(text.encode(errors="surrogatepass")).rstrip(b"=").decode()
    )

    @fuzzed
    @given(st.one_of(as_text, mangled(encode_ref(good)), st.text(max_size=80), json_values), st.integers(-2, 40))
    def check(text: object, length: int) -> None:
        opened.paths.clear()
        try:
            reader.materialize([decode_ref(text, 0, length)])
        except PointillistError as error:
            assert "root:" not in str(error)
        assert all(Path(path).is_relative_to(store.root) for path in opened.paths), opened.paths

    check()


def test_descriptors_and_spans() -> None:
    good = {
        "kind": "raw_mm_item", "family": "qwen_vl", "raw_image_uri": f"file:///s/ab/{SHA}.png",
        "layout_fingerprint": "0" * 32, "payload": {"image_grid_thw": [1, 4, 4]},
    }  # fmt: skip
    items = st.one_of(
        st.dictionaries(st.sampled_from([*good, "data"]), json_values | uris, max_size=3).map(lambda c: {**good, **c}),
        json_values,
    )
    places = st.fixed_dictionaries({"offset": st.integers(-1, 12), "length": st.integers(-1, 6)}) | json_values

    @fuzzed
    @given(
        st.lists(items, max_size=3), st.lists(st.just(SHA) | json_values, max_size=3), st.lists(places, max_size=3),
        st.lists(st.integers(0, 2), max_size=16),
    )  # fmt: skip
    def check(descriptors: list[Any], hashes: list[Any], spans: list[Any], types: list[int]) -> None:
        for item in descriptors:
            try:
                parse_descriptor(item)
            except PointillistError:
                pass
        try:
            refs = build_mm_refs(descriptors, hashes, spans, types)
        except PointillistError:
            return
        covered = sum(image.length for image in refs.images) if refs else 0
        assert covered == types.count(1)

    check()


def test_sources_in_messages(store: ImageStore) -> None:
    sources = Sources(store)
    good = "data:image/png;base64," + base64.b64encode(encoded(picture(4, 4))).decode()
    urls = st.one_of(mangled(good), uris.filter(lambda uri: "/dev" not in uri and "/proc" not in uri), json_values)
    shapes = st.one_of(
        st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, urls),
        st.builds(lambda url: {"type": "input_image", "image_url": url}, urls),
        st.builds(lambda url: {"type": "image", "image": url}, urls),
        st.builds(
            lambda kind, url: {"type": "image", "source": {"type": kind, "data": url}}, st.text(max_size=6), urls
        ),
        st.dictionaries(st.sampled_from(["type", "image", "image_url", "source"]), st.just("image") | json_values),
    )

    @fuzzed
    @given(st.lists(shapes | json_values, max_size=3))
    def check(content: list[Any]) -> None:
        images: list[Any] = []
        try:
            normalize_images([{"role": "user", "content": content}], sources, images)
        except PointillistError:
            pass
        assert all(Path(image.uri.removeprefix("file://")).is_relative_to(store.root) for image in images)

    check()


def _png_header(width: int, height: int, depth: int, colour: int, interlace: int, tail: bytes) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + tail


def test_image_bytes() -> None:
    formats = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
    originals = [encoded(picture(20, 14).convert(mode), name) for name in formats for mode in ("RGB", "L")]
    exif = picture(8, 8).getexif()
    exif[0x0112] = 6
    originals += [encoded(picture(20, 14), name, exif=exif) for name in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")]
    originals.append(encoded(Image.new("I;16", (20, 14), 40_000), "TIFF"))

    def damage(data: bytes, at: int, length: int, piece: bytes) -> bytes:
        at %= len(data) + 1
        return data[:at] + piece + data[at + length :]

    damaged = st.builds(
        damage, st.sampled_from(originals), st.integers(0, 2_000), st.integers(0, 12), st.binary(max_size=12)
    )
    sizes = st.integers(0, 2**32 - 1) | st.integers(0, 3_000)
    headers = st.builds(
        _png_header, sizes, sizes, st.integers(0, 255), st.integers(0, 255), st.integers(0, 2), st.binary(max_size=40)
    )

    @fuzzed
    @given(st.one_of(damaged, headers, st.binary(max_size=100)))
    def check(data: bytes) -> None:
        try:
            header = read_header(data, LIMITS)
            assert header.width * header.height <= LIMITS.max_pixels
            assert decode_rgb(data, LIMITS).shape == (header.height, header.width, 3)
        except PointillistError as error:
            assert len(str(error)) < 300

    check()


def test_data_urls_and_addresses(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    numeric = partial(socket.getaddrinfo, flags=socket.AI_NUMERICHOST)  # no name service is asked
    monkeypatch.setattr(socket, "getaddrinfo", numeric)
    sources = Sources(store).for_clients()
    good = "data:image/png;base64," + base64.b64encode(encoded(picture(4, 4))).decode()
    heads = st.sampled_from(["data:", "DATA:image/png", "data:image/png;base64", "data:;base64", "data:image/*;x=y"])
    bodies = st.text(max_size=80) | st.binary(max_size=80).map(lambda data: base64.b64encode(data).decode())
    addresses = st.ip_addresses().map(str) | st.text(max_size=30) | st.integers(0, 2**33).map(str)

    def nowhere(host: str, port: int) -> str:
        address = public_address(host, port)
        raise SourceError(f"would have gone to {address}")

    remote = RemoteImages(1000, seconds=20, address_of=nowhere)

    @fuzzed
    @given(
        st.one_of(mangled(good), st.builds(lambda head, body: f"{head},{body}", heads, bodies)),
        st.builds(
            lambda scheme, host, port: f"{scheme}://{host}{port}/a.png",
            st.sampled_from(["http", "https", "HTTP"]), addresses,
            st.sampled_from(["", ":80", ":0", ":-1", ":65536", ":x", "@1.2.3.4"]),
        ),
    )  # fmt: skip
    def check(data_url: str, url: str) -> None:
        try:
            sources.put(data_url)
        except PointillistError as error:
            assert len(str(error)) < 300
        with pytest.raises(PointillistError) as raised:
            remote.fetch(url)
        assert len(str(raised.value)) < 300

    check()


def test_request_bodies(store: ImageStore, reader: RawImageMaterializer, family: Family) -> None:
    """Whatever bytes come, they are a request that the server can serve or an error that names what was wrong."""
    ref = stored_ref(family, store, picture(64, 64))
    length = ref.length
    good = {
        "token_ids": [20, *[family.image_token_id] * length, 21],
        "features": {
            "mm_hashes": {"image": [ref.hash]},
            "mm_placeholders": {"image": [{"offset": 1, "length": length}]},
            "kwargs_data": {"image": [encode_ref(ref)]},
        },
        "sampling_params": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 4, "n": 2, "seed": 7},
        "request_id": "a",
    }
    numbers = st.sampled_from([0, -1, 1e-46, 1e-38, 1e39, 2**31, 2**63, 2**64, 10**30, 0.5, True, "1", None])
    parameters = [*SamplingParams.__struct_fields__, "else"]
    sampling = st.dictionaries(st.sampled_from(parameters), numbers | json_values, max_size=4)
    changes = st.dictionaries(st.sampled_from([*good, "content_parts", "stream", "model", "priority"]), json_values)
    bodies = st.one_of(
        mangled(json.dumps(good)).map(lambda text: text.encode(errors="surrogatepass")),
        st.builds(lambda change, params: json.dumps({**good, "sampling_params": params, **change}).encode(),
                  changes, sampling),
        st.binary(max_size=100),
    )  # fmt: skip
    bounds = ServerBounds(seq_len=512, vocab_size=320, max_batch_size=32)
    logits = torch.randn(1, 320, generator=torch.Generator().manual_seed(0)) * 50
    masked = torch.tensor(sorted(family.vision_token_ids))

    @fuzzed
    @given(bodies)
    def check(body: bytes) -> None:
        try:
            request = decode_body(body, GenerateRequest)
            prompt = check_prompt(request, reader, 4)
            params = request.sampling_params
            check_sizes(prompt.token_ids, params.max_tokens, params.n, params.logprobs, bounds)
        except RequestError as error:
            assert error.status == 400 and "root:" not in str(error) and len(str(error)) < 2000
            return
        noise = draw_noise([torch.Generator().manual_seed(params.seed or 0)])
        sampled = sample(logits, masked, [params], noise)
        assert sampled.usable == [True] and 0 <= int(sampled.token_ids) < 320
        assert int(sampled.token_ids) not in family.vision_token_ids

    check()
