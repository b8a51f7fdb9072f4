"""Hostile requests to the inference server: references, sampling parameters, bodies, admin routes."""

import base64
import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from pointillist.config import RUN_KEY
from pointillist.families import load_family
from pointillist.images import ImageLimits, ImageStore, Sources, normalize_images
from pointillist.refs import encode_features
from pointillist.render import FolderTokenizer, RawRenderer
from pointillist.runs.paths import WEIGHTS_FILE, RunPaths
from tests.helpers.pictures import encoded, picture
from tests.hostile import odd
from tests.hostile.wire import Http, request

GENERATE = "/inference/v1/generate"


class Prompts:
    """Good requests over a store, and files in it that are none."""

    def __init__(self, model: Path, output_dir: Path) -> None:
        self.paths = RunPaths(output_dir)
        self.family = load_family(str(model))
        self.store = ImageStore(output_dir / "assets" / "images", ImageLimits())
        renderer = RawRenderer(self.family, FolderTokenizer(model))
        sources = Sources(self.store)

        def body(*seeds: int, **sampling: Any) -> dict[str, Any]:
            parts = [{"type": "image", "image": picture(64, 64, seed)} for seed in seeds]
            images: list[Any] = []
            message = {"role": "user", "content": [*parts, {"type": "text", "text": "What digit?"}]}
            prompt = renderer.render([normalize_images(message, sources, images)], images)
            sampling = {"max_tokens": 2, "logprobs": 0, "seed": 1, "temperature": 1.0, "top_p": 1.0, **sampling}
            return {
                "token_ids": prompt.token_ids,
                "features": encode_features(prompt.images),
                "sampling_params": sampling,
            }

        self.good = body(1)
        self.pictured = [self.good, body(2, 3), body(4, 5, 6)]
        self.texts = [body(), body(n=2, top_k=5), body(top_p=0.9, temperature=0.5, stop_token_ids=[1, 2])]
        self.parted = [self._in_parts(each) for each in self.pictured]
        self.uris = self._odd_files()

    def _in_parts(self, body: dict[str, Any]) -> dict[str, Any]:
        """The same prompt in the second form."""
        logical: list[int] = []
        for token in body["token_ids"]:
            if token != self.family.image_token_id or logical[-1] != token:
                logical.append(token)
        names = body["features"]["mm_hashes"]["image"]
        urls = [(self.store.root / sha[:2] / f"{sha}.png").as_uri() for sha in names]
        rest = {key: value for key, value in body.items() if key != "features"}
        parts = [{"type": "image_url", "url": url} for url in urls]
        return {**rest, "token_ids": logical, "content_parts": parts, "return_token_ids": True}

    def _odd_files(self) -> list[str]:
        """URIs of names in the store that are no picture, and of places outside it."""

        def name(word: str, extension: str = "png") -> Path:
            sha = hashlib.sha256(word.encode()).hexdigest()
            path = self.store.root / sha[:2] / f"{sha}.{extension}"
            path.parent.mkdir(exist_ok=True)
            return path

        made = [name(word) for word in ("directory", "fifo", "link", "loop", "empty", "half", "other", "text", "gone")]
        folder, fifo, link, loop, empty, half, other, text, _ = made
        good = encoded(picture(64, 64, 1))
        folder.mkdir(exist_ok=True)
        for path, make in ((fifo, os.mkfifo), (link, lambda to: to.symlink_to("/etc/passwd")),
                           (loop, lambda to: to.symlink_to(to.name))):  # fmt: skip
            if not path.is_symlink() and not path.exists():
                make(path)
        for path, data in ((empty, b""), (half, good[: len(good) // 2]), (other, good), (text, b"<svg/>" * 50)):
            path.write_bytes(data)
        sha = self.pictured[0]["features"]["mm_hashes"]["image"][0]
        root = self.store.root.as_uri()
        outside = [
            "file:///etc/passwd", "file:///dev/zero", "file:///dev/stdin", "file:///proc/self/mem",
            f"file:///etc/{sha}.png",
            f"{root}/{sha[:2]}/../{sha[:2]}/{sha}.png", f"{root}/{sha[:2]}//{sha}.png", f"{root}/{sha[:2]}/{sha}.png#x",
            f"{root}/{sha[:2]}/{sha}.png?x", f"{root}/{sha[:2]}/{sha}.PNG",
            f"{root}/{sha[:2]}/%2e%2e/{sha[:2]}/{sha}.png",
            f"{root}/{sha[:2]}/{sha}.png%00", f"{root}/{sha[:2]}/{sha}.png\0", f"{root}/zz/{sha}.png", root, f"{root}/",
            f"file://localhost{self.store.root}/{sha[:2]}/{sha}.png", f"FILE://{self.store.root}/{sha[:2]}/{sha}.png",
            f"file:{self.store.root}/{sha[:2]}/{sha}.png", str(self.store.root), "http://127.0.0.1:1/x.png",
            "https://127.0.0.1:1/x.png", "data:image/png;base64,AAAA", "ftp://x", "s3://b/k", "", "file://", "file:///",
            "file:///" + "a/" * 5000, "file:///" + "%41" * 2000, "file:///\ud800",
        ]  # fmt: skip
        return [*(path.as_uri() for path in made), *outside]


def _decoded(entry: str) -> dict[str, Any]:
    text = entry.removeprefix("mmraw:")
    value: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return value


def _encoded(value: Any, chance: Random) -> Any:
    data = odd.write(value)
    way = chance.randrange(14)
    if way == 0:
        data = odd.garbled(data, chance)
    text = base64.urlsafe_b64encode(data).decode()
    if way == 1:
        return "mmraw:" + text + "=" * chance.randrange(5)
    if way == 2:
        return chance.choice(["", "MMRAW:", "mmraw", "mmraw:mmraw:", " mmraw:", "mmraw2:", "data:"]) + text.rstrip("=")
    if way == 3:
        return "mmraw:" + odd.garbled(text.encode(), chance).decode("latin-1")
    if way == 4:
        return "mmraw:" + base64.b64encode(data).decode()
    if way == 5:
        return value
    return "mmraw:" + text.rstrip("=")


def _odd_reference(entry: str, uris: list[str], chance: Random) -> Any:
    value = _decoded(entry)
    field = chance.choice([*value, "extra"])
    if field == "raw_image_uri" or chance.random() < 0.25:
        value["raw_image_uri"] = chance.choice(uris)
        if chance.random() < 0.5:  # a name and a hash that agree
            value["hash"] = value["raw_image_uri"].rpartition("/")[2].partition(".")[0]
    elif field == "payload":
        grid = [chance.choice([0, 1, 2, 4, 8, 64, 65535, 2**31, 2**63, 10**30, -1, True, 1.0, "4"]) for _ in range(3)]
        value["payload"] = chance.choice([{"image_grid_thw": grid}, {"image_grid_thw": grid[:2]}, odd.value(chance)])
    elif field == "hash":
        value["hash"] = chance.choice(["0" * 64, value["hash"].upper(), value["hash"][:63], odd.value(chance)])
    else:
        value = odd.mutated(value, chance)
    return _encoded(value, chance)


def _odd_places(body: dict[str, Any], pad: int, chance: Random) -> None:
    """Moves, stretches, joins or splits the images' placeholder runs."""
    places, ids = body["features"]["mm_placeholders"]["image"], body["token_ids"]
    at = chance.randrange(len(places))
    place = places[at]
    way = chance.randrange(9)
    if way == 0:
        place["offset"] = place["offset"] + chance.choice([-1, 1, -place["offset"], 10**6, 2**63])
    elif way == 1:
        place["length"] = chance.choice([0, -1, 1, place["length"] - 1, place["length"] + 1, 2**40, 2**64])
    elif way == 2:
        places.insert(at, dict(place))
    elif way == 3:
        places.reverse()
    elif way == 4 and place["length"] > 1:  # two spans that touch in the place of one
        cut = chance.randrange(1, place["length"])
        first, second = {**place, "length": cut}, {"offset": place["offset"] + cut, "length": place["length"] - cut}
        places[at : at + 1] = [first, second]
        for name in ("mm_hashes", "kwargs_data"):
            body["features"][name]["image"].insert(at, body["features"][name]["image"][at])
    elif way == 5 and at:  # the tokens between two images are gone, so that their runs touch
        end = places[at - 1]["offset"] + places[at - 1]["length"]
        gap = place["offset"] - end
        del ids[end : place["offset"]]
        for later in places[at:]:
            later["offset"] -= gap
    elif way == 6:  # a further placeholder without an image
        ids.insert(chance.randrange(len(ids) + 1), pad)
    elif way == 7:
        del ids[place["offset"]]
    else:
        odd.mutated(body["features"]["mm_placeholders"], chance)


def references(prompts: Prompts) -> Callable[[Random], Http]:
    """Requests whose references, hashes, placeholders or parts are odd."""

    def make(chance: Random) -> Http:
        if chance.random() < 0.25:
            body = copy.deepcopy(chance.choice(prompts.parted))
            part = chance.choice(body["content_parts"])
            if chance.random() < 0.5:
                part["url"] = chance.choice(prompts.uris)
            else:
                body["content_parts"] = odd.mutated(body["content_parts"], chance)
            return Http("content parts", request("POST", GENERATE, odd.write(body)))
        body = copy.deepcopy(chance.choice(prompts.pictured))
        kind = chance.choice(["reference", "reference", "placeholder", "hashes", "features"])
        if kind == "reference":
            entries = body["features"]["kwargs_data"]["image"]
            at = chance.randrange(len(entries))
            entries[at] = changed = _odd_reference(entries[at], prompts.uris, chance)
            if isinstance(changed, str) and chance.random() < 0.3:
                try:
                    body["features"]["mm_hashes"]["image"][at] = _decoded(changed)["hash"]
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    pass  # no longer an object with a hash
        elif kind == "placeholder":
            _odd_places(body, prompts.family.image_token_id, chance)
        else:
            name = "mm_hashes" if kind == "hashes" else chance.choice(list(body["features"]))
            body["features"][name] = odd.mutated(body["features"][name], chance)
        return Http(kind, request("POST", GENERATE, odd.write(body)))

    return make


_PARAMETERS = [
    "temperature", "top_p", "top_k", "max_tokens", "n", "seed", "logprobs", "stop_token_ids", "ignore_eos", "min_p",
    "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "bad_words", "logit_bias",
    "prompt_logprobs", "skip_special_tokens", "detokenize",
]  # fmt: skip


def sampling(prompts: Prompts) -> Callable[[Random], Http]:
    """Requests whose sampling parameters are odd."""

    def make(chance: Random) -> Http:
        body = copy.deepcopy(chance.choice([*prompts.texts, prompts.good]))
        params = body["sampling_params"]
        for _ in range(chance.choice([1, 1, 2, 4])):
            name = chance.choice(_PARAMETERS)
            if name in ("stop_token_ids", "stop", "bad_words"):
                size = chance.choice([1, 3, 500, 20_000])
                params[name] = [odd.number(chance) if size < 500 else chance.randrange(-5, 2**20) for _ in range(size)]
            elif name == "logit_bias":
                params[name] = {chance.choice(["5", "-1", "x", "9" * 30]): odd.number(chance)}
            else:
                params[name] = odd.parameter(name, chance)
        return Http("sampling", request("POST", GENERATE, odd.write(body)))

    return make


def bodies(prompts: Prompts) -> Callable[[Random], Http]:
    """Requests that are odd anywhere, of any size, to any route."""
    everything = [*prompts.texts, *prompts.pictured, *prompts.parted]

    def make(chance: Random) -> Http:
        kind = chance.choice(["mutated"] * 8 + ["garbled"] * 4 + ["tokens", "type", "admin", "admin", "weights"])
        body = copy.deepcopy(chance.choice(everything))
        if chance.random() < 1 / 600:
            return _large(body, chance)
        if kind == "mutated":
            return Http(kind, request("POST", GENERATE, odd.write(odd.mutated(body, chance))))
        if kind == "garbled":
            return Http(kind, request("POST", GENERATE, odd.garbled(odd.write(body), chance)))
        if kind == "tokens":
            ids = [chance.choice([0, 1, -1, 2**31, 2**63, 10**20, prompts.family.image_token_id, 5]) for _ in range(9)]
            body["token_ids"] = chance.choice([ids, body["token_ids"] * 40, [], [odd.value(chance)], [0] * 100_000])
            return Http(kind, request("POST", GENERATE, odd.write(body)))
        if kind == "type":
            headers = chance.choice([
                {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"},
                {"Content-Type": ""},
                {"Content-Type": "multipart/form-data; boundary=x"},
                {"Content-Type": "application/json; charset=utf-16"},
                {"Content-Encoding": "gzip"}, {"Accept": "\0"}, {"Content-Type": "a" * 5000},
            ])  # fmt: skip
            return Http(kind, request("POST", GENERATE, odd.write(body), headers))
        if kind == "admin":
            return _admin(chance)
        return _weights(prompts.paths, chance)

    return make


def _large(body: dict[str, Any], chance: Random) -> Http:
    """Megabytes: of tokens, of empty lists, of one string."""
    size = chance.choice([300_000, 1_000_000, 5_000_000])
    filling = chance.choice(["1,", "[],", "{},", '"",'])
    name = chance.choice(["token_ids", "extra", "stop_token_ids"])
    body[name] = odd.Raw("[" + filling * size + "1]") if chance.random() < 0.8 else "x" * 4 * size
    return Http("large", request("POST", GENERATE, odd.write(body)))


def _admin(chance: Random) -> Http:
    """Somebody without the run's key, or a page of the web, at the admin routes."""
    headers = dict(chance.choice([
        {}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer "}, {"Authorization": "\xff"},
        {"Authorization": "Basic eDp5"},
        {"Origin": "https://example.org"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1.example.org"},
        {"Content-Type": "text/plain", "Origin": "http://example.org"}, {"X-Api-Key": "x"},
    ]))  # fmt: skip
    host = chance.choice(["127.0.0.1", "127.0.0.1", "example.org", "localhost.example.org", "[::1", "", "0"])
    path = chance.choice(["/pause", "/resume", "/update_weights", "/is_paused", "/init_weights", "//pause", "/pause/"])
    body = odd.write({"weight_dir": odd.value(chance), "weight_version": odd.number(chance)})
    method = chance.choice(["POST", "POST", "PUT", "GET", "OPTIONS"])
    return Http("admin", request(method, path, body, headers, host=host))


ODD_WEIGHTS = ["nan", "inf", "bfloat16", "complex", "shape", "empty", "half", "fifo", "link", "directory"]
_FIRST_ODD = 1001


def _weights(paths: RunPaths, chance: Random) -> Http:
    """The run's own key with weights that must not be served, or are not there."""
    names = [
        "step_1",
        "step_-1",
        "step_x",
        "step_99999999999999999999",
        "step_" + "9" * 5000,
        "",
        ".",
        "..",
        "step_1/..",
    ]
    version: Any = chance.choice([odd.number(chance), chance.randrange(20)])
    where = chance.choice([*(str(paths.broadcasts / name) for name in names), "/", "/etc", "", odd.value(chance)])
    if chance.random() < 0.6:
        version = _FIRST_ODD + chance.randrange(len(ODD_WEIGHTS))
        where = str(paths.broadcast_step(version))
    body = {"weight_dir": where, "weight_version": version}
    headers = {"Authorization": f"Bearer {os.environ[RUN_KEY]}"}
    return Http("weights", request("POST", "/update_weights", odd.write(body), headers))


def write_odd_weights(paths: RunPaths, model: Path) -> None:
    """Broadcasts that no server may load, each with the digests of what it holds."""
    import torch
    from safetensors.torch import load_file, save_file

    good = load_file(next(model.glob("*.safetensors")))
    first = next(iter(good))
    changes = {
        "nan": {**good, first: torch.full_like(good[first], float("nan"))},
        "inf": {**good, first: torch.full_like(good[first], float("inf"))},
        "bfloat16": {name: tensor.bfloat16() for name, tensor in good.items()},
        "complex": {**good, first: good[first].to(torch.complex64)},
        "shape": {**good, first: good[first][:1].clone()},
    }
    for version, name in enumerate(ODD_WEIGHTS, _FIRST_ODD):
        folder = paths.broadcast_step(version)
        folder.mkdir(parents=True)
        file = folder / WEIGHTS_FILE
        if name in changes:
            save_file(changes[name], file)
        elif name == "fifo":
            os.mkfifo(file)
        elif name == "link":
            file.symlink_to("/etc/passwd")
        elif name == "directory":
            file.mkdir()
        else:
            whole = (paths.broadcast_step(_FIRST_ODD) / WEIGHTS_FILE).read_bytes()
            file.write_bytes(whole[: len(whole) // 2] if name == "half" else b"")
        if file.is_file():
            data = file.read_bytes()
            digest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            (folder / "digests.json").write_text(json.dumps({"files": {WEIGHTS_FILE: digest}}))
