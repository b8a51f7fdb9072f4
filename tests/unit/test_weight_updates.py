"""Weights on their way into a server: whatever lies in their place, the old ones serve on."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pointillist.base.digests import DIGESTS_FILE
from pointillist.config import InferenceConfig, ModelConfig
from pointillist.errors import InferenceError, PointillistError, RequestError
from pointillist.inference.embedded.server import EmbeddedServer
from pointillist.inference.protocol import decode_body
from pointillist.models import load_model
from pointillist.pixels import RawImageMaterializer
from pointillist.runs.paths import WEIGHTS_FILE
from pointillist.weights import load as module
from pointillist.weights.load import check_weights, open_weights, read_copy, read_weights, this_machine
from pointillist.weights.publish import write_weights
from pointillist.weights.wire import MAX_WEIGHT_VERSION, UpdateWeightsRequest

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(model_dir: Path) -> Weights:
    model = load_model(str(model_dir), device="cpu", dtype="float32").model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def server(model_dir: Path, tmp_path: Path) -> Iterator[EmbeddedServer]:
    config = InferenceConfig(model=ModelConfig(name=str(model_dir)), seq_len=128, output_dir=tmp_path)
    loaded = load_model(str(model_dir), device="cpu", dtype="float32")
    server = EmbeddedServer(config, loaded, RawImageMaterializer.for_run(loaded.family, config))
    server.engine.start()
    yield server
    assert server.engine.failure is None
    server.engine.stop()


def _folder(server: EmbeddedServer, version: int) -> Path:
    return server.config.output_dir / "broadcasts" / f"step_{version}"


def _request(server: EmbeddedServer, version: int, *, rewind: bool = False) -> UpdateWeightsRequest:
    return UpdateWeightsRequest(weight_dir=str(_folder(server, version)), weight_version=version, rewind=rewind)


def _fifo(path: Path, _: bytes) -> None:
    os.mkfifo(path)


def _link_outside(path: Path, data: bytes) -> None:
    outside = path.parent.parent.parent / "outside.safetensors"
    outside.write_bytes(data)
    path.symlink_to(outside)


IN_PLACE: dict[str, Callable[[Path, bytes], object]] = {
    "nothing": lambda path, data: None,
    "a FIFO": _fifo,
    "a folder": lambda path, data: path.mkdir(),
    "a link to a good file": _link_outside,
    "a link to an endless device": lambda path, data: path.symlink_to("/dev/zero"),
    "an empty file": lambda path, data: path.touch(),
    "half a file": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "a header without end": lambda path, data: path.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "a header that lies": lambda path, data: path.write_bytes(
        (63).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}'
    ),
    "no JSON": lambda path, data: path.write_bytes((4).to_bytes(8, "little") + b"{{{{"),
    "a pickle": lambda path, data: path.write_bytes(b"\x80\x04cos\nsystem\n"),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_what_is_no_weights_file_is_refused(what: str, weights: Weights, tmp_path: Path) -> None:
    folder = tmp_path / "broadcasts" / "step_1"
    folder.mkdir(parents=True)
    IN_PLACE[what](folder / WEIGHTS_FILE, save(weights))
    with pytest.raises(InferenceError):
        read_weights(folder)


def test_a_folder_that_is_a_link_is_refused(weights: Weights, tmp_path: Path) -> None:
    write_weights(weights, tmp_path / "elsewhere")
    (tmp_path / "step_1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InferenceError):
        read_weights(tmp_path / "step_1")


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / WEIGHTS_FILE).open("wb") as file:
        file.truncate(10**13)
    with pytest.raises(InferenceError, match="at most 1000"):
        read_weights(tmp_path, max_bytes=1000)


@pytest.mark.integration
def test_what_happens_to_the_file_afterwards_does_not_reach_the_reader(weights: Weights, tmp_path: Path) -> None:
    """A mapped file that is cut kills whoever reads it."""
    write_weights(weights, tmp_path)
    with open_weights(tmp_path) as opened:
        (tmp_path / WEIGHTS_FILE).write_bytes(b"")
        assert all(torch.equal(opened.tensor(name), weights[name]) for name in opened.shapes)
        # As a worker of the same machine maps it, in another process.
        code = f"from pointillist.weights.load import *; print(sorted(read_copy('{opened.path}')), this_machine())"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.strip() == f"{sorted(opened.shapes)} {this_machine()}"
    with pytest.raises(InferenceError):
        read_copy(opened.path)
    write_weights(weights, tmp_path)
    read = read_weights(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"")
    assert all(torch.equal(read[name], weights[name]) for name in read)


def test_a_file_that_changes_while_it_is_read_is_refused(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(weights, tmp_path)
    path, real = tmp_path / WEIGHTS_FILE, module._copy

    def copy(*arguments: object) -> str:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return real(*arguments)

    monkeypatch.setattr(module, "_copy", copy)
    with pytest.raises(InferenceError, match="changed while they were read"):
        read_weights(tmp_path)


def test_digests_are_checked_where_they_are(weights: Weights, tmp_path: Path) -> None:
    write_weights(weights, tmp_path)
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    right = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    def declared(content: object) -> None:
        (tmp_path / DIGESTS_FILE).write_text(json.dumps(content))

    declared({"files": {WEIGHTS_FILE: right, "other": right}})
    assert read_weights(tmp_path, sha256=right["sha256"]).keys() <= weights.keys()
    with pytest.raises(InferenceError, match="changed since"):
        read_weights(tmp_path, sha256="0" * 64)
    for wrong in (
        {"files": {WEIGHTS_FILE: {**right, "sha256": "0" * 64}}},
        {"files": {WEIGHTS_FILE: {**right, "bytes": 1}}},
        {"files": {}},
        [[]] * 1000,
    ):
        declared(wrong)
        with pytest.raises(InferenceError, match=r"digests\.json"):
            read_weights(tmp_path)
    flipped = bytearray(data)
    flipped[-5] ^= 1
    declared({"files": {WEIGHTS_FILE: right}})
    (tmp_path / WEIGHTS_FILE).write_bytes(flipped)
    with pytest.raises(InferenceError, match="corrupt"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: torch.full_like(tensor, float("nan")), "not finite"),
        (lambda tensor: torch.full_like(tensor, -float("inf")), "not finite"),
        (lambda tensor: tensor.to(torch.int8), "type torch.int8"),
        (lambda tensor: tensor.bool(), "type torch.bool"),
        (lambda tensor: tensor.to(torch.complex64), "type torch.complex64"),
        (lambda tensor: tensor.double(), "type torch.float64"),
        (lambda tensor: tensor.half(), "type torch.float16"),
        (lambda tensor: tensor[None], "shape"),
    ],
)
def test_weights_that_cannot_serve_are_refused(
    server: EmbeddedServer, weights: Weights, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    """One of them is enough, and the last one too."""
    name = max(weights)
    changed = {**weights, name: change(weights[name])}
    write_weights(changed, _folder(server, 1))
    with pytest.raises(RequestError, match=message) as refused:
        asyncio.run(server.update_weights(_request(server, 1)))
    assert refused.value.status == 400 and "version 0 serves on" in str(refused.value)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in server.loaded.model.state_dict().items())


def test_the_types_that_are_trained_are_taken(model_dir: Path, weights: Weights) -> None:
    for own in ("float32", "bfloat16"):
        model = load_model(str(model_dir), device="cpu", dtype=own).model
        for given in (torch.float32, torch.bfloat16):
            check_weights(model, {name: tensor.to(given) for name, tensor in weights.items()})
    # What is finite in float32 may not be in the model's own type.
    with pytest.raises(InferenceError, match=r"not finite as torch\.bfloat16"):
        check_weights(model, {**weights, max(weights): torch.full_like(weights[max(weights)], 3.4028e38)})


def test_an_older_version_is_a_late_message_unless_the_run_has_gone_back(
    server: EmbeddedServer, weights: Weights
) -> None:
    for version in (2, 5):
        write_weights(
            {name: tensor * (1 + version / 100) for name, tensor in weights.items()}, _folder(server, version)
        )
    asyncio.run(server.update_weights(_request(server, 5)))
    with pytest.raises(RequestError, match="version 5 serves already") as late:
        asyncio.run(server.update_weights(_request(server, 2)))
    assert late.value.status == 409 and server.engine.weight_version == 5
    asyncio.run(server.update_weights(_request(server, 5)))  # the same again is none
    asyncio.run(server.update_weights(_request(server, 2, rewind=True)))
    assert server.engine.weight_version == 2


def test_of_many_updates_at_once_the_newest_serves(server: EmbeddedServer, weights: Weights) -> None:
    versions = [7, 3, 19, 12, 1, 20, 5, 18, 2, 11]
    for version in versions:
        write_weights(
            {name: tensor * (1 + version / 100) for name, tensor in weights.items()}, _folder(server, version)
        )

    async def update(version: int) -> int:
        try:
            await server.update_weights(_request(server, version))
            return 200
        except RequestError as error:
            return error.status

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(update(version) for version in versions for _ in range(4)))

    assert Counter(asyncio.run(all_at_once())).keys() == {200, 409}
    assert server.engine.weight_version == 20
    name = max(weights)
    assert torch.equal(server.loaded.model.state_dict()[name], weights[name] * 1.2)


def test_a_server_that_starts_passes_over_what_cannot_serve(server: EmbeddedServer, weights: Weights) -> None:
    write_weights({name: tensor * 1.01 for name, tensor in weights.items()}, _folder(server, 1))
    write_weights({name: tensor * float("nan") for name, tensor in weights.items()}, _folder(server, 2))
    _folder(server, 3).mkdir()
    (_folder(server, 3) / WEIGHTS_FILE).write_bytes(b"half")
    _folder(server, 4).mkdir()
    os.mkfifo(_folder(server, 4) / WEIGHTS_FILE)
    asyncio.run(server.load_latest())
    assert server.engine.weight_version == 1


def test_a_server_starts_where_no_version_can_serve(server: EmbeddedServer, weights: Weights) -> None:
    write_weights({name: tensor * float("inf") for name, tensor in weights.items()}, _folder(server, 2))
    asyncio.run(server.load_latest())
    assert server.engine.weight_version == 0


@pytest.mark.parametrize(
    "weight_dir",
    [
        "", ".", "~", "/etc", "a\0b", "/" + "a" * 4000, "{broadcasts}", "{broadcasts}/../outside",
        "{broadcasts}x/step_1",
        "{broadcasts}/step_1/../../outside", "{broadcasts}/link", "{broadcasts}/circle",
        "{broadcasts}/step_1/" + WEIGHTS_FILE,
    ],
)  # fmt: skip
def test_only_folders_of_the_broadcasts_are_read(server: EmbeddedServer, weights: Weights, weight_dir: str) -> None:
    broadcasts = server.config.output_dir / "broadcasts"
    write_weights(weights, broadcasts / "step_1")
    write_weights(weights, server.config.output_dir / "outside")
    (broadcasts / "link").symlink_to(server.config.output_dir / "outside")
    (broadcasts / "circle").symlink_to(broadcasts / "circle")
    request = UpdateWeightsRequest(weight_dir=weight_dir.format(broadcasts=broadcasts), weight_version=1)
    with pytest.raises(RequestError) as refused:
        asyncio.run(server.update_weights(request))
    assert refused.value.status == 400


@pytest.mark.parametrize("version", ["-1", "9007199254740992", "1" + "0" * 400, "1e308", "true", "1.0", '"5"', "null"])
def test_absurd_versions_are_refused(version: str) -> None:
    with pytest.raises(RequestError) as refused:
        decode_body(b'{"weight_dir":"a","weight_version":%s}' % version.encode(), UpdateWeightsRequest)
    assert refused.value.status == 400
    assert isinstance(refused.value, PointillistError)
    largest = decode_body(b'{"weight_dir":"a","weight_version":%d}' % MAX_WEIGHT_VERSION, UpdateWeightsRequest)
    assert largest.weight_version == MAX_WEIGHT_VERSION
