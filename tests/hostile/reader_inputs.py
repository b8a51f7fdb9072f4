"""Hostile input of what reads a run: the viewer's pages and records, the asset endpoint, archives."""

import copy
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

from pointillist.config import RUN_KEY
from tests.helpers.made_run import MadeRun
from tests.helpers.pictures import encoded, picture
from tests.hostile import odd
from tests.hostile.wire import Http, request

_QUERY = ["step", "page", "sort", "id", "env", "task", "outcome", "fault", "error", "min_reward", "max_reward", "split",
          "images", "descending", "token", "min_tokens", "max_tokens", "q"]  # fmt: skip


def _escaped(value: Any) -> str:
    if isinstance(value, odd.Raw):
        value = value.text
    text = value if isinstance(value, str) else repr(value)
    return quote(text[:4000].encode(errors="surrogatepass"), safe="")


def pages(run: MadeRun) -> Callable[[Random], Http]:
    """Requests of the viewer's pages."""
    names = [image.uri.rpartition("/")[2] for image in run.images]
    good = ["1.0.0", "2.1", "eval_0.1", "1.3.3", "3"]

    def make(chance: Random) -> Http:
        number = chance.choice(["0", "0", "0", "0", "1", "-1", "9" * 30, "9" * 5000, "x", "%00", "0.0", "\u0660"])
        name = chance.choice(
            [*names, "0" * 64 + ".png", "../../etc/passwd", "%2e%2e%2fx", "a" * 3000, "", ".png", "%00.png"]
        )
        path = chance.choice([
            f"/runs/{number}/rollouts", f"/runs/{number}/rollout", f"/runs/{number}/group", f"/runs/{number}/store",
            "/",
            f"/runs/{number}/status", f"/runs/{number}/picture/{name[:2]}/{name}", f"/runs/{number}/picture/{name}",
            f"/runs/{number}/thumbnail/{chance.choice(['64', '0', '-1', '9' * 5000, 'x', '256'])}/{name[:2]}/{name}",
            "/static/../app.py", "/static/%2e%2e/app.py", f"/runs/{number}", f"/{_escaped(odd.value(chance))}",
        ])  # fmt: skip
        query = []
        for _ in range(chance.choice([0, 1, 1, 2, 5])):
            field = chance.choice(_QUERY) if chance.random() < 0.9 else _escaped(odd.value(chance))
            value = chance.choice([chance.choice(good), _escaped(odd.value(chance)), _escaped(odd.number(chance))])
            query.append(f"{field}={value}")
        if query:
            path += "?" + "&".join(query)
        method = chance.choice(["GET"] * 12 + ["HEAD", "POST", "PUT"])
        return Http("page", request(method, path), due=method != "HEAD")

    return make


def assets(run: MadeRun) -> Callable[[Random], Http]:
    """Requests of the asset endpoint, with and without the key."""
    names = [image.uri.rpartition("/")[2] for image in run.images]

    def make(chance: Random) -> Http:
        name = chance.choice([*names, "0" * 64 + ".png", "a" * 3000, "%00", "", names[0] + "%00", names[0].upper()])
        version = chance.choice(
            ["0", "1", "1001", "-1", "9" * 30, "9" * 4301, "9" * 5000, "x", "1.0", "\u0661", "%30", "latest", ""]
        )
        path = chance.choice([
            f"/images/{name[:2]}/{name}", f"/images/{name}", f"/images/../{name}", f"/images/%2e%2e/%2e%2e/{name}",
            f"/images//{name[:2]}/{name}", f"/weights/{version}", "/weights", f"/weights/{version}/",
            f"/weights/{version}?x=1",
            "/images/etc/passwd", "/images/%2fetc%2fpasswd", f"/{_escaped(odd.value(chance))}", "/health?x",
        ])  # fmt: skip
        key = chance.choice([os.environ[RUN_KEY]] * 4 + ["", "x", "\xff", "a" * 5000])
        headers = {"Authorization": f"Bearer {key}"}
        if chance.random() < 0.2:
            headers |= chance.choice([
                {"Range": "bytes=-1"}, {"Range": "bytes=0-0," * 500 + "1-1"}, {"Range": "bytes=9-1"}, {"Range": "x"},
                {"If-Range": "x", "Range": "bytes=0-"}, {"If-Modified-Since": "x" * 500}, {"If-None-Match": "*"},
            ])  # fmt: skip
        method = chance.choice(["GET"] * 12 + ["HEAD", "POST", "DELETE"])
        return Http("asset", request(method, path, None, headers), due=method != "HEAD")

    return make


def records(run: MadeRun) -> Callable[[Random], bytes]:
    """Lines of a file of rollouts, without the newline."""
    good = [run.rollout("7.0.0", "sent"), run.rollout("7.0.1", "failed"), run.hostile("7.0.2")]

    def make(chance: Random) -> bytes:
        line = copy.deepcopy(chance.choice(good))
        kind = chance.randrange(10)
        if kind < 6:
            data = odd.write(odd.mutated(line, chance))
        elif kind < 8:
            name = chance.choice(["id", "group", "step", "turns", "reward", "advantage", "task", "env", "versions"])
            line[name] = odd.number(chance)
            line["branches"][0][chance.choice(["tokens", "sampled", "images"])] = odd.number(chance)
            data = odd.write(line)
        elif kind == 8:
            data = odd.garbled(odd.write(line), chance)
        else:
            data = odd.write(odd.value(chance))
        return data.replace(b"\n", b" ")

    return make


FORMAT = "pointillist.run_archive.1"


def archives(run: MadeRun, outside: Path) -> Callable[[Random], bytes]:
    """Run archives. What they try to write outside of their destination is all below `outside`."""
    root = run.store.root.as_uri()
    pictures = [(image, Path(image.uri.removeprefix("file://")).read_bytes()) for image in run.images]
    lines = b"".join(odd.write(run.rollout(f"1.0.{member}", "sent")) + b"\n" for member in range(2))
    manifest: dict[str, Any] = {"format": FORMAT, "image_root": root, "images": len(pictures)}

    def good() -> list[tuple[tarfile.TarInfo, bytes]]:
        members = [("manifest.json", json.dumps(manifest).encode())]
        for image, data in pictures:
            name = image.uri.rpartition("/")[2]
            members.append((f"images/{name[:2]}/{name}", data))
        members += [("run/rollouts/step_1/rollouts.jsonl", lines), ("run/configs/rl.toml", b"seed = 0\n")]
        return [(_info(name, data), data) for name, data in members]

    def make(chance: Random) -> bytes:
        members = good()
        kind = chance.choice(
            ["name"] * 5 + ["type"] * 3 + ["manifest"] * 2 + ["content", "order", "garbled", "header", "checkpoint"]
        )
        if kind == "name":
            members.append((_info(_odd_name(outside, chance), b"x"), b"x"))
        elif kind == "type":
            info = _info(chance.choice(["run/configs/x.toml", "run/rollouts/step_1", "images/aa", "run"]), b"")
            info.type = chance.choice(
                [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"]
            )
            info.linkname = chance.choice([str(outside), "../../..", "/etc/passwd", "rl.toml", ""])
            later = _info(f"{info.name}/summary.json", b"x")  # through the link
            members += [(info, b""), (later, b"x")]
        elif kind == "manifest":
            data = odd.write(odd.mutated(copy.deepcopy(manifest), chance))
            if chance.random() < 0.3:
                data = odd.garbled(data, chance)
            members[0] = (_info("manifest.json", data), data)
        elif kind == "content":
            at = chance.randrange(1, len(members))
            data = odd.garbled(members[at][1], chance)
            members[at] = (_info(members[at][0].name, data), data)
        elif kind == "order":
            chance.shuffle(members)
            members += members[: chance.randrange(3)]
        elif kind == "header":
            info, data = members[-1]
            info.size = chance.choice([0, 1, 10**6, 8**11 - 1, 2**62])
            info.mode, info.uid, info.mtime = 0o7777, 2**20, chance.choice([0, -1, 2**40])
        elif kind == "checkpoint":
            name = chance.choice(["trainer/.metadata", "trainer/__0_0.distcp", "orchestrator.json", "digests.json"])
            members.append(
                (_info(f"run/checkpoints/step_1/{name}", b"\x80\x04cos\nsystem\n."), b"\x80\x04cos\nsystem\n.")
            )
        data = _tar(members, chance)
        return odd.garbled(data, chance) if kind == "garbled" else data

    return make


def good_archive(run: MadeRun) -> bytes:
    """An archive that must be accepted."""
    data = b"seed = 0\n"
    first = json.dumps({"format": FORMAT, "image_root": run.store.root.as_uri(), "images": 1}).encode()
    image = encoded(picture(40, 40, 0))
    name = run.images[0].uri.rpartition("/")[2]
    members = [("manifest.json", first), (f"images/{name[:2]}/{name}", image), ("run/configs/rl.toml", data)]
    return _tar([(_info(name, data), data) for name, data in members], Random(0))


def _odd_name(outside: Path, chance: Random) -> str:
    up = "../" * 12
    target = f"{outside}/written"
    return chance.choice([
        f"run/{target}", f"run//{target}", target, f"run/{up}{target}", f"{up}{target}",
        f"run/configs/../../{up}{target}",
        f"run/./{target}", "run/../x", "run", "run/", "run//", "run/.", "images/../x", "images", "manifest.json/x",
        "/manifest.json",
        "./manifest.json", "manifest.json", "run\\..\\x", "run/configs/a\\b.toml", "run/configs/.toml",
        "run/configs/x.toml/y.toml",
        "run/rollouts/step_1/rollouts.jsonl/x.jsonl", "run/" + "a/" * 90 + "x.jsonl",
        "run/configs/" + "a" * 300 + ".toml",
        "run/configs/\ud8ff.toml".encode(errors="surrogatepass").decode(errors="replace"), "run/configs/\x01.toml",
        "other/x", "",
        "run/logs/x.log", "run/model/config.json", "run/broadcasts/step_1/model.safetensors", "run/state/x.json",
        "run/.lock",
        "run/assets/images/aa/x.png", "run/rollouts/step_" + "9" * 200 + "/rollouts.jsonl", "run/metrics/../../x.jsonl",
        "images/zz/" + "0" * 64 + ".png", "images/00/" + "0" * 64 + ".png", "images//00/" + "0" * 64 + ".png",
        "run/configs/CON.toml",
    ])  # fmt: skip


def _info(name: str, data: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info


def _tar(members: list[tuple[tarfile.TarInfo, bytes]], chance: Random) -> bytes:
    buffer = io.BytesIO()
    way = chance.choice([tarfile.PAX_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(
        fileobj=buffer, mode=chance.choice(["w", "w", "w", "w:gz"]) if chance.random() < 0.2 else "w", format=way
    ) as tar:
        for info, data in members:
            try:
                buffer_info = info.tobuf(way, "utf-8", "surrogateescape")
            except (ValueError, UnicodeError):
                continue  # this format cannot say it
            tar.fileobj.write(buffer_info + data + b"\0" * (-len(data) % 512))  # as it says, whatever it says
    return buffer.getvalue()
