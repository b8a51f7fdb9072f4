"""What only vLLM can get wrong: pixels, caches and weights. `make test-vllm` runs this where vLLM is installed.

The server is started once, with `POINTILLIST_TEST_BACKEND=vllm`; the conformance tests of `test_inference_server.py`
run against the same one.
"""

import asyncio
import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pointillist.config import MultimodalConfig, PolicyConfig
from pointillist.config.orchestrator import ClientConfig
from pointillist.config.shared import ModelConfig
from pointillist.errors import InferenceError
from pointillist.families import load_family
from pointillist.images import ImageLimits, ImageStore, Sources
from pointillist.inference.prompt import CheckedPrompt
from pointillist.inference.vllm.versions import check_vllm
from pointillist.pixels import RawImageMaterializer
from pointillist.render import FolderTokenizer, RawRenderer
from pointillist.sessions import Sampling, Session
from pointillist.sessions.factory import SessionFactory
from pointillist.weights.publish import write_weights
from tests.helpers.generate import GENERATE, generate_body, post_generate, sampled_logprobs, served_choices, with_ref
from tests.helpers.pictures import encoded, picture, stored_ref
from tests.helpers.processes import RunningServer, free_port, wait_for
from tests.helpers.reference import Reference

pytestmark = pytest.mark.integration

PROMPTS = 56
HOSTILE = 10_000
UPDATES = 50


@pytest.fixture(scope="module")
def vllm_config(model_dir: Path) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = AsyncEngineArgs(model=str(model_dir), dtype="float32", max_model_len=512, enforce_eager=True)
    return arguments.create_engine_config()


def test_the_facts_that_the_plugin_relies_on(vllm_config: Any) -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    assert check_vllm()
    # Pixels are normalised on the device: what we send must be uint8.
    assert vllm_config.model_config.get_multimodal_config().mm_device_do_normalize is True
    # The hook between decoding a request's items and the engine.
    assert callable(ServingTokens._validate_mm_cache_handles)
    source = Path(__import__(ServingTokens.__module__, fromlist=["x"]).__file__).read_text()
    assert source.index("mm_kwargs_from_features(features)") < source.index(
        "self._validate_mm_cache_handles(mm_kwargs, features.mm_hashes)"
    ) < source.index("mm_kwargs=MultiModalKwargsItems(mm_kwargs)")  # fmt: skip


async def test_items_are_vllms_own_and_the_trainers_pixels(vllm_config: Any, model_dir: Path, tmp_path: Path) -> None:
    """The item made from a reference equals the trainer's pixels bit for bit, whatever its size.

    It also equals the one that vLLM's own processor makes, bit for bit where the picture is not resized; where it is,
    vLLM resizes by torchvision and the two differ by a level or two here and there: which is why ours are sent.
    """
    from vllm.inputs import TokensPrompt
    from vllm.renderers.registry import renderer_from_config

    from pointillist.inference.vllm.serving import ItemMaker

    renderer = renderer_from_config(vllm_config)
    family, store = load_family(str(model_dir)), ImageStore(tmp_path / "images", ImageLimits())
    reader = RawImageMaterializer(family, [store.root], ImageLimits())
    maker = ItemMaker(vllm_config, renderer.get_mm_processor(), reader)
    assert maker.dtype == "uint8"
    for size in ((64, 96), (128, 32), (100, 70), (333, 200)):
        image = picture(*size, seed=size[0])
        ref = stored_ref(family, store, image)
        (ours,) = await maker.items(CheckedPrompt([family.image_token_id] * ref.length, [ref], 0))
        prompt = TokensPrompt(prompt_token_ids=[3, family.image_token_id, 4], multi_modal_data={"image": [image]})
        (theirs,) = await renderer.render_cmpl_async([prompt])
        (expected,) = theirs["mm_kwargs"]["image"]
        assert ours.keys() == expected.keys()
        for name, element in expected.items():
            assert ours[name].data.dtype == element.data.dtype
            levels = (ours[name].data.int() - element.data.int()).abs()
            assert levels.max() <= (0 if size[0] % 32 == 0 else 2)
            assert type(ours[name].field) is type(element.field)
        # And what the trainer puts on its device: the same bytes, one frame of them.
        trainers = reader.joiner.join(reader.load([ref]).images, "uint8")["pixel_values"]
        frames = ours["pixel_values"].data.numpy().reshape(len(trainers), 3, family.frames, -1)
        assert all(np.array_equal(frames[:, :, frame], trainers) for frame in range(family.frames))


def _difference(reference: Reference, body: dict[str, Any], *, blank: bool = False) -> float:
    """Largest difference between the server's logprobs and the reference's."""
    (choice,) = served_choices(reference.server, body)
    expected = reference.logprobs(body, choice["token_ids"], blank=blank)
    return float((sampled_logprobs(choice) - expected).abs().max())


@pytest.fixture
def reference(server: RunningServer, model_dir: Path) -> Reference:
    return Reference(server, model_dir)


def test_logprobs_equal_huggingface_over_many_prompts(reference: Reference) -> None:
    largest, smallest_blank = 0.0, float("inf")
    for number in range(PROMPTS):
        body = generate_body(reference.server, *range(1000 + 4 * number, 1001 + 4 * number + number % 4), seed=number)
        largest = max(largest, _difference(reference, body))
        smallest_blank = min(smallest_blank, _difference(reference, body, blank=True))
    print(f"{PROMPTS} prompts: largest difference {largest:.2e}, smallest with blank pictures {smallest_blank:.3f}")
    assert largest <= 1e-5
    assert smallest_blank > 0.01  # the control


def _hostile(server: RunningServer, good: dict[str, Any], random: random.Random) -> dict[str, Any]:
    """A request with one thing wrong."""
    body = json.loads(json.dumps(good))
    image = body["features"]["kwargs_data"]["image"]
    places = body["features"]["mm_placeholders"]["image"]
    sha = body["features"]["mm_hashes"]["image"][0]
    other = "".join(random.choices("0123456789abcdef", k=64))
    kind = random.randrange(10)
    if kind == 0:
        image[0] = None
    elif kind == 1:
        cut = random.randrange(len(image[0]))
        image[0] = image[0][:cut]
    elif kind == 2:
        place = random.randrange(6, len(image[0]))
        image[0] = image[0][:place] + random.choice("ABCabc019-_@") + image[0][place + 1 :]
    elif kind == 3:  # the right file under a wrong hash: what would poison a cache
        body["features"]["mm_hashes"]["image"][0] = other
        body = with_ref(body, hash=other)
    elif kind == 4:
        body = with_ref(body, raw_image_uri=(server.store.root / other[:2] / f"{other}.png").as_uri(), hash=other)
        body["features"]["mm_hashes"]["image"][0] = other
    elif kind == 5:
        places[0]["length"] += random.choice((-1, 1))
    elif kind == 6:
        places[0]["offset"] += random.choice((-1, 1, 1000))
    elif kind == 7:
        body = with_ref(body, family=random.choice(("kimi_k25", "gemma3", "")))
    elif kind == 8:
        body = with_ref(body, payload={"image_grid_thw": [1, 2, random.randrange(1, 99)]})
    else:
        body["features"]["mm_hashes"]["image"] = [sha] * random.randrange(2, 5)
    return body


async def test_hostile_requests_hurt_nobody(server: RunningServer) -> None:
    chance = random.Random(0)
    good = [generate_body(server, 2000 + number, 2100 + number) for number in range(8)]
    before = [served_choices(server, body)[0]["logprobs"] for body in good]
    counts: dict[int, int] = {}
    limit = asyncio.Semaphore(32)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:

        async def send(number: int) -> None:
            body = _hostile(server, good[number % len(good)], chance)
            if body == good[number % len(good)]:
                return  # the changed letter was the same one
            async with limit:
                response = await http.post(GENERATE, json=body)
            counts[response.status_code] = counts.get(response.status_code, 0) + 1
            if response.status_code != 200:
                assert response.json()["error"]["type"] in ("invalid_mm_image_ref", "missing_mm_image")

        await asyncio.gather(*(send(number) for number in range(HOSTILE)))
    print(f"answers by status: {counts}")
    # A changed letter can leave the same meaning (base64 ignores spare bits): then, and only then, the answer is 200.
    assert set(counts) <= {200, 400}
    assert counts[400] > 0.95 * HOSTILE
    after = [served_choices(server, body)[0]["logprobs"] for body in good]
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(
            torch.tensor([entry["logprob"] for entry in left["content"]]),
            torch.tensor([entry["logprob"] for entry in right["content"]]), rtol=0, atol=1e-6,
        )  # fmt: skip


def test_a_wrong_hash_never_changes_a_later_answer(reference: Reference) -> None:
    """The first request with a picture's hash brings another picture's file; later ones see the right picture."""
    server = reference.server
    body, other = generate_body(server, 3001), generate_body(server, 3004)
    text = other["features"]["kwargs_data"]["image"][0].removeprefix("mmraw:")
    uri = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))["raw_image_uri"]
    assert post_generate(server, with_ref(body, raw_image_uri=uri)).status_code == 400
    assert _difference(reference, body) <= 1e-5


def test_weights_follow_and_no_embedding_is_stale(reference: Reference, model_dir: Path) -> None:
    """Language weights alone leave the encoder cache; vision weights empty it. Either way the answer is the model's."""
    server, body = reference.server, generate_body(reference.server, 4001)
    assert _difference(reference, body) <= 1e-5
    original = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
    resets = []
    for version, part in ((101, "model.language_model."), (102, "model.visual."), (103, "")):
        changed = {name: t * 1.05 if part and name.startswith(part) else t for name, t in original.items()}
        changed["lm_head.weight"] = changed["model.language_model.embed_tokens.weight"]
        resets.append(_update(server, changed, version)["encoder_resets"])
        old = _difference(reference, body)
        reference.model.load_state_dict(changed)
        assert _difference(reference, body) <= 1e-5
        assert old > 1e-3  # the control: the version before would be seen
    # Version 101 changes no vision weight; 102 does; 103 changes them back.
    assert resets[1:] == [resets[0] + 1, resets[0] + 2]


def _update(server: RunningServer, weights: dict[str, torch.Tensor], version: int) -> dict[str, Any]:
    folder = server.output_dir / "broadcasts" / f"step_{version}"
    write_weights(weights, folder)
    request = {"weight_dir": str(folder), "weight_version": version}
    response = httpx.post(server.url + "/update_weights", json=request, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_weight_updates_under_load(server: RunningServer, model_dir: Path) -> None:
    """32 requests in flight, 50 updates: no request fails, and versions only grow."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for number in (0, 1):
        scaled = {name: tensor * (1 + 0.01 * number) for name, tensor in weights.items()}
        write_weights(scaled, server.output_dir / "broadcasts" / f"step_{200 + number}")
    failures, spans = asyncio.run(_load_and_update(server))
    crossing = sum(len(span) > 1 for span in spans)
    print(f"{len(spans)} requests, {len(failures)} failed, {crossing} crossed an update")
    assert not failures
    assert crossing > 0
    assert all(span == sorted(span) for span in spans)
    _update(server, weights, 300)


async def _load_and_update(server: RunningServer) -> tuple[list[str], list[list[int]]]:
    """Failed answers, and the weight versions of each good one."""
    failures: list[str] = []
    spans: list[list[int]] = []
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=64)) as http:

        async def ask(number: int) -> None:
            while not stop.is_set():
                body = generate_body(server, 5000 + number, max_tokens=60, seed=number)
                response = await http.post(GENERATE, json=body)
                if response.status_code != 200:
                    failures.append(response.text)
                    return
                (choice,) = response.json()["choices"]
                assert len(choice["token_ids"]) == 60
                spans.append([int(span["version"]) for span in choice["weight_versions"]])

        asking = [asyncio.create_task(ask(number)) for number in range(32)]
        for version in range(200, 200 + UPDATES):
            folder = server.output_dir / "broadcasts" / f"step_{200 + version % 2}"
            request = {"weight_dir": str(folder), "weight_version": version}
            response = await http.post("/update_weights", json=request)
            assert response.status_code == 200, response.text
            await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*asking)
    return failures, spans


def test_weights_that_do_not_fit_change_nothing(reference: Reference, model_dir: Path) -> None:
    server, body = reference.server, generate_body(reference.server, 6001)
    weights = {k: v for k, v in reference.model.state_dict().items() if k != "lm_head.weight"}
    name = "model.language_model.norm.weight"
    for number, wrong in enumerate(({**weights, name: weights[name][:-1]}, {"x": weights[name]}, None)):
        folder = server.output_dir / "broadcasts" / f"step_{900 + number}"
        folder.mkdir(parents=True, exist_ok=True)
        if wrong is None:
            (folder / "model.safetensors").write_bytes(b"\xff" * 100)
        else:
            write_weights(wrong, folder)
        request = {"weight_dir": str(folder), "weight_version": 900}
        response = httpx.post(server.url + "/update_weights", json=request, timeout=60)
        assert response.status_code == 400
        assert re.search(r"version \d+ serves on", response.json()["error"]["message"])
    assert _difference(reference, body) <= 1e-5


@pytest.fixture(scope="module")
def stock(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A vLLM that has never heard of Pointillist, and the folder that it may read."""
    folder, port = tmp_path_factory.mktemp("stock"), free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model_dir, "--enforce-eager",
        "--max-model-len", 512, "--dtype", "float32", "--enable-scale-out", "--port", port, "--host", "127.0.0.1",
        "--limit-mm-per-prompt", '{"image": 8, "video": 0}', "--allowed-local-media-path", folder,
        "--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill",
    ]  # fmt: skip
    environ = {**os.environ, "VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environ, text=True)
    wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200, process, seconds=300)
    yield f"http://127.0.0.1:{port}", folder
    process.terminate()
    process.wait(600)


async def test_sessions_talk_to_a_vllm_without_the_plugin(
    stock: tuple[str, Path], server: RunningServer, model_dir: Path, tmp_path: Path
) -> None:
    """Its tokens and placeholders are ours, resized pictures included; a layout that differs is refused."""
    url, folder = stock
    store = ImageStore(folder / "images", ImageLimits())
    config = PolicyConfig(
        model=ModelConfig(name=str(model_dir)), output_dir=folder, seq_len=512,
        multimodal=MultimodalConfig(offload_dir=str(store.root)),
        client=ClientConfig(base_url=[url], wire="content_parts"),
    )  # fmt: skip
    policy = SessionFactory.from_config(config)
    client = policy.client
    session = policy.open(Sampling(max_tokens=6), seed=1)
    for seed, size in enumerate([(64, 64), (100, 70), (33, 150)]):
        parts = [{"type": "image", "image": picture(*size, seed)}, {"type": "text", "text": "?"}]
        await session.generate([{"role": "user", "content": parts}])
    (branch,) = session.branches
    assert len(branch.images) == 3
    # The record is true: the same tokens have these logprobs (64x64 needs no resizing, so its pixels are equal too).
    first = policy.open(Sampling(max_tokens=6), seed=1)
    await first.generate([{"role": "user", "content": [{"type": "image", "image": picture(64, 64, 0)}]}])
    (alone,) = first.branches
    begin = alone.loss_mask.index(True)
    body = {"token_ids": alone.token_ids[:begin], "features": {"mm_hashes": {"image": [alone.images[0].hash]}}}
    server.store.put(encoded(picture(64, 64, 0)))
    for blank in (False, True):
        again = Reference(server, model_dir).logprobs(body, alone.token_ids[begin:], blank=blank)
        difference = float((again - torch.tensor(alone.logprobs_sampled[begin:])).abs().max())
        assert difference > 0.01 if blank else difference < 1e-4

    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] = 64 * 64
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    renderer = RawRenderer(load_family(str(other)), FolderTokenizer(other))
    wrong = Session(renderer, Sources(store), client, Sampling(max_tokens=6), seq_len=512, seed=1)
    with pytest.raises(InferenceError, match="its layout of the images is another one"):
        await wrong.generate([{"role": "user", "content": [{"type": "image", "image": picture(128, 128, 5)}]}])
    assert wrong.turns == []
    await client.aclose()
