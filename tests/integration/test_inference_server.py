"""What every inference server must do: the same tests for any server behind the same wire."""

import asyncio
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pointillist.errors import InferenceError
from pointillist.images.store import local_path
from pointillist.models import load_model
from pointillist.runs.paths import WEIGHTS_FILE
from pointillist.sessions import InferenceClient, Sampling, Session
from pointillist.weights.follow import update_weights
from pointillist.weights.publish import write_weights
from tests.helpers.generate import (
    GENERATE,
    generate_body,
    post_generate,
    rendered,
    sampled_logprobs,
    served_choices,
    with_entry,
    with_ref,
)
from tests.helpers.pictures import picture
from tests.helpers.processes import BACKEND, RunningServer
from tests.helpers.reference import Reference

pytestmark = pytest.mark.integration

# What only one server has, or counts in metrics of its own.
only_embedded = pytest.mark.skipif(BACKEND != "embedded", reason="about the embedded server")


def _huggingface(
    server: RunningServer, model_dir: Path, body: dict[str, Any], tokens: list[int], *, blank: bool
) -> torch.Tensor:
    """Logprobs of the tokens by model and processor alone, pictures read from the store."""
    return Reference(server, model_dir).logprobs(body, tokens, blank=blank)


def test_logprobs_equal_huggingface_and_the_picture_is_seen(server: RunningServer, model_dir: Path) -> None:
    for seeds in ((1,), (2, 3), (4, 5, 6, 7)):
        body = generate_body(server, *seeds)
        (choice,) = served_choices(server, body)
        expected = _huggingface(server, model_dir, body, choice["token_ids"], blank=False)
        assert (sampled_logprobs(choice) - expected).abs().max() < 1e-5
        blank = _huggingface(server, model_dir, body, choice["token_ids"], blank=True)
        assert (sampled_logprobs(choice) - blank).abs().max() > 0.01


def test_response_has_vllms_fields(server: RunningServer) -> None:
    body = generate_body(server, 1, n=3, logprobs=2)
    answer = post_generate(server, {**body, "request_id": "mine", "return_token_ids": True}).json()
    assert answer["request_id"].endswith("mine")  # vLLM puts a prefix before it
    assert answer["prompt_token_ids"] == body["token_ids"]
    assert answer["mm_placeholders"] == body["features"]["mm_placeholders"]
    counts = {"prompt_tokens": len(body["token_ids"]), "completion_tokens": 15}
    assert counts.items() <= answer["usage"].items()
    assert answer["usage"]["total_tokens"] == len(body["token_ids"]) + 15
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["weight_versions"] == [{"version": choice["weight_versions"][0]["version"], "start": 0, "end": 5}]
    assert {"token_id", "logprob", "rank", "top_logprobs"} == choice["logprobs"]["content"][0].keys()


def test_text_only_and_seeds(server: RunningServer) -> None:
    body = generate_body(server)
    assert body["features"] is None
    first, again, other = (
        served_choices(server, {**body, "sampling_params": {**body["sampling_params"], "seed": seed}})
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_concurrent_requests(server: RunningServer) -> None:
    bodies = [generate_body(server, seed, seed + 50) for seed in range(24)]
    alone = [served_choices(server, body)[0]["token_ids"] for body in bodies[:4]]
    with ThreadPoolExecutor(24) as pool:
        together = [choices[0]["token_ids"] for choices in pool.map(lambda body: served_choices(server, body), bodies)]
    assert together[:4] == alone


def _faults(server: RunningServer) -> dict[str, tuple[dict[str, Any], str]]:
    body = generate_body(server, 1, 2)
    sha = body["features"]["mm_hashes"]["image"][0]

    def features(**change: Any) -> dict[str, Any]:
        return {**body, "features": {**body["features"], **change}}

    places = body["features"]["mm_placeholders"]["image"]
    return {
        "none": (with_entry(body, None), "every image needs its mmraw"),
        "processed tensor": (with_entry(body, "gASVdGVuc29y"), "expected an mmraw: string"),
        "inline image": (with_entry(body, "data:image/png;base64,aaaa"), "inline"),
        "not a string": (with_entry(body, {"pixel_values": [1]}), "Expected `str"),
        "malformed": (with_entry(body, "mmraw:@@"), "base64url"),
        "unknown family": (with_ref(body, family="kimi_k25"), "served by"),
        "wrong modality": (with_ref(body, modality="video"), "modality"),
        "other hash": (with_ref(body, hash="0" * 64), "different hashes"),
        "fingerprint": (with_ref(body, layout_fingerprint="0" * 32), "image processor configuration"),
        "grid": (with_ref(body, payload={"image_grid_thw": [1, 2, 2]}), "image_grid_thw"),
        "outside": (with_ref(body, raw_image_uri=f"file:///etc/{sha[:2]}/{sha}.png"), "allowed root"),
        "passwd": (with_ref(body, raw_image_uri="file:///etc/passwd"), "allowed root"),
        "http": (with_ref(body, raw_image_uri="http://127.0.0.1/a.png"), "file://"),
        "counts": (features(mm_hashes={"image": [sha]}), "1 mm_hashes, 2 mm_placeholders"),
        "no data": (features(kwargs_data=None), "0 kwargs_data"),
        "video": (features(mm_hashes={"video": [sha, sha]}), "modality"),
        "length off by one": (
            features(mm_placeholders={"image": [{**places[0], "length": places[0]["length"] - 1}, places[1]]}),
            "without an image",
        ),
        "offset off by one": (
            features(mm_placeholders={"image": [{**places[0], "offset": places[0]["offset"] + 1}, places[1]]}),
            "no image|not image tokens",
        ),
        "unsorted": (features(mm_placeholders={"image": places[::-1]}), "no image|unsorted"),
        "no features": ({**body, "features": None}, "no features"),
        "too many": (
            {**body, "features": {k: {"image": v["image"][:1] * 300} for k, v in body["features"].items()}},
            "at most 256",
        ),
    }  # fmt: skip


FAULTS = [
    "none", "processed tensor", "inline image", "not a string", "malformed", "unknown family", "wrong modality",
    "other hash",
    "fingerprint", "grid", "outside", "passwd", "http", "counts", "no data", "video", "length off by one",
    "offset off by one",
    "unsorted", "no features", "too many",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_references_are_structured_400s(server: RunningServer, fault: str) -> None:
    body, message = _faults(server)[fault]
    response = post_generate(server, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_mm_image_ref"
    assert error["code"] == 400
    assert error["param"].startswith("features.")
    assert re.search(message, error["message"]), error["message"]
    assert len(served_choices(server, generate_body(server, 1))) == 1  # the others go on


def test_every_fault_is_tested(server: RunningServer) -> None:
    assert sorted(FAULTS) == sorted(_faults(server))


def test_missing_and_corrupt_files(server: RunningServer) -> None:
    body = generate_body(server, 900)
    (sha,) = body["features"]["mm_hashes"]["image"]
    path = server.store.root / sha[:2] / f"{sha}.png"
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    error = post_generate(server, body).json()["error"]
    assert error["type"] == "invalid_mm_image_ref"
    assert error["param"] == "features.kwargs_data.image[0]"
    path.unlink()
    response = post_generate(server, body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "missing_mm_image"
    path.write_bytes(data)
    assert len(served_choices(server, body)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [10**9]}, "token_ids must be from 0"),
        ({"token_ids": "abc"}, "token_ids"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"temprature": 1}}, "temprature"),
        ({"sampling_params": {"n": 10_000}}, "n is 10000"),
        ({"sampling_params": {"max_tokens": 10_000}}, "at most 512"),
        ({"token_ids": [10**40]}, "token_ids"),
        ({"sampling_params": {"temperature": 1e39}}, "temperature"),
        ({"sampling_params": {"temperature": 1e-38}}, "temperature"),
        ({"sampling_params": {"top_k": 2**63}}, "top_k"),
        ({"sampling_params": {"seed": 10**40}}, "seed"),
        ({"sampling_params": {"seed": -1}}, "seed"),
        ({"sampling_params": {"n": 10**9}}, "n"),
        ({"sampling_params": {"max_tokens": 10**40}}, "max_tokens"),
        ({"sampling_params": {"logprobs": 10**30}}, "logprobs"),
        ({"sampling_params": {"stop_token_ids": [10**40]}}, "stop_token_ids"),
        ({"sampling_params": {"stop_token_ids": list(range(100_000))}}, "stop_token_ids"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"stream": True}, "stream"),
        ({"content": 1}, "content"),
    ],
)
def test_other_bad_requests_are_structured_400s(server: RunningServer, change: dict[str, Any], message: str) -> None:
    response = post_generate(server, {**generate_body(server), **change})
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


@only_embedded
def test_parameters_that_are_not_served_are_refused(server: RunningServer) -> None:
    response = post_generate(server, {**generate_body(server), "sampling_params": {"repetition_penalty": 1.5}})
    assert response.status_code == 400
    assert "repetition_penalty" in response.json()["error"]["message"]


def test_neutral_parameters_of_other_clients_are_accepted(server: RunningServer) -> None:
    assert served_choices(
        server, generate_body(server, top_k=-1, min_p=0.0, repetition_penalty=1.0, skip_special_tokens=False)
    )


@pytest.mark.parametrize("path", [GENERATE, "/update_weights", "/pause"])
def test_pages_of_other_sites_can_do_nothing(server: RunningServer, path: str) -> None:
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 400),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ):
        response = httpx.post(
            server.url + path, content=b"{}", headers={"Content-Type": "application/json", **headers}, timeout=60
        )
        assert response.status_code == status
        assert response.json()["error"]["code"] == status
    assert httpx.get(server.url + "/is_paused").json() == {"is_paused": False}


def test_bodies_and_headers_are_bounded_and_others_go_on(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}

    def chunks() -> Iterator[bytes]:
        yield b'{"token_ids":['
        for _ in range(400):
            yield b"[]," * 20_000

    for content in (b'{"token_ids":[' + b"[]," * 7_000_000, chunks()):
        response = httpx.post(server.url + GENERATE, content=content, headers=headers, timeout=60)
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "RequestTooLarge"
    assert httpx.get(server.url + "/health", headers={"X": "y" * 200_000}).status_code == 431
    assert len(served_choices(server, generate_body(server, 1))) == 1


def test_images_that_touch_are_served(server: RunningServer) -> None:
    """Whether or not the model's own code knows where one ends: in the other order they give other numbers."""

    def asked(*seeds: int) -> torch.Tensor:
        body = generate_body(server, *seeds)
        ids = body["token_ids"]
        pads = [i for i, token in enumerate(ids) if token == server.family.image_token_id]
        body["token_ids"] = [*ids[: pads[0]], *(ids[i] for i in pads), *ids[pads[-1] + 1 :]]
        first, second = body["features"]["mm_placeholders"]["image"]
        second["offset"] = first["offset"] + first["length"]
        return sampled_logprobs(served_choices(server, body)[0])

    assert (asked(1, 2) - asked(2, 1)).abs().max() > 1e-3
    assert len(served_choices(server, generate_body(server, 1))) == 1


def test_health_models_metrics_pause(server: RunningServer) -> None:
    assert httpx.get(server.url + "/health").json()["status"] == "ok"
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["max_model_len"] == 512
    assert httpx.post(server.url + "/pause").status_code == 200
    assert httpx.get(server.url + "/is_paused").json() == {"is_paused": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + GENERATE, json=generate_body(server), timeout=0.5)
    assert httpx.post(server.url + "/resume").status_code == 200
    assert len(served_choices(server, generate_body(server))) == 1
    metrics = httpx.get(server.url + "/metrics").text
    running = re.search(r"^(?:pointillist_running|vllm:num_requests_running\{.*\}) 0.0$", metrics, re.MULTILINE)
    assert running is not None  # the request whose client hung up is gone
    assert "pointillist_images_materialized_total" in metrics


def test_new_weights_while_requests_run(server: RunningServer, model_dir: Path) -> None:
    weights = load_model(str(model_dir), device="cpu", dtype="float32").model.state_dict()
    broadcasts = server.output_dir / "broadcasts"
    body = generate_body(server, 1)
    before = served_choices(server, body)[0]
    base = int(httpx.get(server.url + "/health").json()["weight_version"])  # other tests may have been here

    async def load() -> list[str]:
        client = InferenceClient([server.url])
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            long = {**body, "sampling_params": {**body["sampling_params"], "max_tokens": 300}}
            for version in (base + 1, base + 2, base + 3):
                scaled = {name: tensor * (1 + (version - base) / 100) for name, tensor in weights.items()}
                write_weights(scaled, broadcasts / f"step_{version}")
            await http.post("/pause")  # so that the requests are there still when the last version comes
            running = [asyncio.create_task(http.post(GENERATE, json=long)) for _ in range(4)]
            for version in (base + 1, base + 2, base + 3):
                await update_weights(client.servers[0], str(broadcasts / f"step_{version}"), version)
                assert (await http.get("/is_paused")).json() == {"is_paused": True}
                await http.post("/resume")
                if version < base + 3:
                    await http.post("/pause")
            with pytest.raises(InferenceError, match="not below"):
                await update_weights(client.servers[0], str(model_dir), base + 9)
            with pytest.raises(InferenceError, match=f"version {base + 3} serves on"):
                await update_weights(client.servers[0], str(broadcasts / "none"), base + 77)
            answers = [(await task).json() for task in running]
        await client.aclose()
        return [span["version"] for answer in answers for span in answer["choices"][0]["weight_versions"]]

    assert f"{base + 3}" in asyncio.run(load())
    after = served_choices(server, body)[0]
    assert after["weight_versions"][0]["version"] == f"{base + 3}"
    assert (sampled_logprobs(after) - sampled_logprobs(before)).abs().max() > 1e-4
    write_weights(weights, broadcasts / f"step_{base + 4}")
    request = {"weight_dir": str(broadcasts / f"step_{base + 4}"), "weight_version": base + 4}
    response = httpx.post(server.url + "/update_weights", json=request)
    assert response.status_code == 200
    assert sampled_logprobs(served_choices(server, body)[0]).tolist() == sampled_logprobs(before).tolist()


def _as_parts(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    """The same prompt in the second form: one placeholder an image, and the files' URLs."""
    logical: list[int] = []
    for token in body["token_ids"]:
        if token != server.family.image_token_id or logical[-1] != token:
            logical.append(token)
    urls = [(server.store.root / sha[:2] / f"{sha}.png").as_uri() for sha in body["features"]["mm_hashes"]["image"]]
    parts = [{"type": "image_url", "url": url} for url in urls]
    rest = {key: value for key, value in body.items() if key != "features"}
    return {**rest, "token_ids": logical, "content_parts": parts, "return_token_ids": True}


def test_content_parts_are_the_same_prompt(server: RunningServer) -> None:
    body = generate_body(server, 31, 32)
    answer = post_generate(server, _as_parts(server, body)).json()
    assert answer["prompt_token_ids"] == body["token_ids"]
    assert answer["mm_placeholders"] == body["features"]["mm_placeholders"]
    (expected,) = served_choices(server, body)
    assert answer["choices"][0]["token_ids"] == expected["token_ids"]
    torch.testing.assert_close(sampled_logprobs(answer["choices"][0]), sampled_logprobs(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"url": "data:image/png;base64,aaaa"}, "invalid_mm_image_ref", "expected file://"),
        ({"url": "http://127.0.0.1/a.png"}, "invalid_mm_image_ref", "expected file://"),
        ({"url": "file:///etc/passwd"}, "invalid_mm_image_ref", "allowed root"),
        ({"url": None}, "invalid_mm_image_ref", "image_url"),
        ({"type": "video_url"}, "invalid_mm_image_ref", "video_url"),
        ("missing", "missing_mm_image", "not in the store"),
        ("one more", "invalid_mm_image_ref", "placeholders"),
        ("both forms", "invalid_mm_image_ref", "one of them"),
    ],
)
def test_faulty_content_parts_are_structured_400s(server: RunningServer, change: Any, kind: str, message: str) -> None:
    whole = generate_body(server, 33)
    body = _as_parts(server, whole)
    (part,) = body["content_parts"]
    if isinstance(change, dict):
        body["content_parts"] = [{**part, **change}]
    elif change == "missing":
        name = "00" * 32
        body["content_parts"] = [{**part, "url": (server.store.root / "00" / f"{name}.png").as_uri()}]
    elif change == "one more":
        body["content_parts"] = [part, part]
    else:
        body["features"] = whole["features"]
    response = post_generate(server, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == kind
    assert message in error["message"]
    assert error["param"].startswith("content_parts")


def test_a_group_of_16_and_a_prompt_of_32_images(server: RunningServer) -> None:
    group = served_choices(server, generate_body(server, 40, n=16, max_tokens=2))
    assert [choice["index"] for choice in group] == list(range(16))
    alone = served_choices(server, generate_body(server, 40, max_tokens=2, seed=4))[0]
    assert group[3]["token_ids"] == alone["token_ids"]  # choice i is sampled with seed + i
    many = generate_body(server, *range(41, 73), max_tokens=1)
    assert len(many["features"]["mm_hashes"]["image"]) == 32
    assert len(served_choices(server, many)) == 1


def test_stop_tokens_and_top_logprobs(server: RunningServer) -> None:
    body = generate_body(server, 1, max_tokens=20, temperature=0, logprobs=3)
    free = served_choices(server, body)[0]
    stop = free["token_ids"][4]
    first = free["token_ids"].index(stop)
    params = {**body["sampling_params"], "stop_token_ids": [stop]}
    stopped = served_choices(server, {**body, "sampling_params": params})[0]
    assert stopped["token_ids"] == free["token_ids"][: first + 1]
    assert stopped["finish_reason"] == "stop"
    top = stopped["logprobs"]["content"][0]["top_logprobs"]
    assert top[0]["token_id"] == stopped["token_ids"][0]  # greedy
    assert [entry["logprob"] for entry in top] == sorted((entry["logprob"] for entry in top), reverse=True)


async def test_sessions_record_what_was_read_and_sampled(server: RunningServer, model_dir: Path) -> None:
    """A conversation of three turns with a picture each; a tool result among them."""
    client = InferenceClient([server.url])
    session = Session(server.renderer, server.sources, client, Sampling(max_tokens=12), seq_len=512, seed=3)
    for turn, role in enumerate(("user", "tool", "user")):
        await session.generate(
            [
                {
                    "role": role,
                    "content": [{"type": "image", "image": picture(64, 64, turn)}, {"type": "text", "text": "?"}],
                }
            ]
        )
    await client.aclose()
    (branch,) = session.branches
    assert len(branch.images) == 3
    assert sum(branch.loss_mask) == sum(len(turn.completion.token_ids) for turn in session.turns)
    # One forward over the whole record gives every turn's logprobs again: nothing was re-tokenised or moved.
    first = branch.loss_mask.index(True)
    hashes = {"mm_hashes": {"image": [image.hash for image in branch.images]}}
    body = {"token_ids": branch.token_ids[:first], "features": hashes}
    for blank in (False, True):
        again = _huggingface(server, model_dir, body, branch.token_ids[first:], blank=blank)
        sampled = torch.tensor(branch.loss_mask[first:])
        difference = (again - torch.tensor(branch.logprobs_sampled[first:]))[sampled].abs().max()
        assert difference > 0.01 if blank else difference < 1e-5
    for image in session.branches[0].images:
        assert local_path(image.uri).is_file()


@only_embedded
async def test_a_groups_first_requests_travel_as_one(server: RunningServer) -> None:
    client = InferenceClient([server.url])
    prompt = rendered(server, 1)
    params = {"max_tokens": 5, "logprobs": 0, "ignore_eos": True}

    def prompts() -> float:
        text = httpx.get(server.url + "/metrics").text
        return float(text.split("\npointillist_prompts_prefilled_total ")[1].split("\n")[0])

    before = prompts()
    order = [7, 5, 6, 40, 8]
    answers = await asyncio.gather(*(client.generate(prompt, params, seed) for seed in order))
    assert prompts() - before <= 2  # seeds 5 to 8 together, 40 perhaps with them
    for seed, answer in zip(order, answers, strict=True):
        alone = await client.generate(prompt, params, seed)
        assert alone.token_ids == answer.token_ids
    await client.aclose()


def test_weights_come_in_order_and_cannot_be_what_cannot_serve(server: RunningServer, model_dir: Path) -> None:
    weights = load_model(str(model_dir), device="cpu", dtype="float32").model.state_dict()
    broadcasts = server.output_dir / "broadcasts"
    first = int(httpx.get(server.url + "/health").json()["weight_version"])
    before = sampled_logprobs(served_choices(server, generate_body(server, 1))[0]).tolist()

    def update(name: str, version: int, **more: Any) -> httpx.Response:
        body = {"weight_dir": str(broadcasts / name), "weight_version": version, **more}
        return httpx.post(server.url + "/update_weights", json=body, timeout=120)

    name = max(weights)
    for fault, tensor in {"nan": weights[name] * float("nan"), "int8": weights[name].to(torch.int8)}.items():
        write_weights({**weights, name: tensor}, broadcasts / fault)
    (broadcasts / "fifo").mkdir()
    os.mkfifo(broadcasts / "fifo" / WEIGHTS_FILE)
    write_weights(weights, broadcasts / "good")
    (broadcasts / "link").mkdir()
    (broadcasts / "link" / WEIGHTS_FILE).symlink_to(broadcasts / "good" / WEIGHTS_FILE)
    for fault in ("nan", "int8", "fifo", "link", "nothing"):
        response = update(fault, first + 50)
        assert response.status_code == 400, fault
        assert f"version {first} serves on" in response.json()["error"]["message"]
    assert update("good", 10**400).status_code == 400  # type: ignore[arg-type]
    assert httpx.get(server.url + "/health").json()["weight_version"] == first
    assert sampled_logprobs(served_choices(server, generate_body(server, 1))[0]).tolist() == before
    assert update("good", first + 50).status_code == 200
    late = update("good", first + 49)
    assert (late.status_code, late.json()["error"]["type"]) == (409, "ConflictError")
    # Those of a run that goes on after a checkpoint; further tests find the server as it was.
    assert update("good", first, rewind=True).json()["weight_version"] == first
