"""The libraries: are they there, in the ranges that the package itself declares, and do they work?"""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from pointillist.errors import ConfigError, ImageError
from pointillist.images import ImageLimits, decode_rgb
from pointillist.inference.vllm.versions import check_vllm, installed_vllm
from pointillist.launch.doctor.finding import Finding, State

_TRAIN: Final = "pip install '.[train]'"
# Library -> what it is for, and the extra that brings it.
_OPTIONAL: Final = {
    "wandb": ("the monitor Weights & Biases", "monitors"),
    "tensorboard": ("the monitor TensorBoard", "monitors"),
    "pyarrow": ("Parquet files in the environment `dataset`", "parquet"),
    "math-verify": ("the reward `math` of the environment `dataset`", "math"),
    "verifiers": ("environments of its ecosystem", "verifiers"),
}
_TORCH_SECONDS: Final = 120
# In a process of its own: a torch that can not load may take its process with it.
_TORCH: Final = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "built_for": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
    "works": not cuda or float(torch.ones(8, device="cuda").sum()) == 8.0,
}))
"""


def check_libraries() -> Iterator[Finding]:
    """Findings about the libraries."""
    yield _torch()
    yield _ranged("transformers", "models", "problem", _TRAIN)
    yield _vllm()
    yield _images()
    for name, (purpose, extra) in _OPTIONAL.items():
        yield _ranged(name, purpose, "absent", f"pip install '.[{extra}]'")


def declared_range(name: str) -> SpecifierSet:
    """The versions that pointillist's own metadata ask for; any, if it says nothing of the library."""
    try:
        declared = [Requirement(line) for line in requires("pointillist") or ()]
    except PackageNotFoundError:  # run from a source tree
        declared = []
    return next((each.specifier for each in declared if each.name == name), SpecifierSet())


def _ranged(name: str, purpose: str, if_missing: State, remedy: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, if_missing, f"not installed; for {purpose}: {remedy}")
    wanted = declared_range(name)
    if not wanted.contains(found, prereleases=True):
        return Finding(name, "problem", f"{found}, expected {wanted}: {remedy}")
    return Finding(name, "ok", found)


def _torch() -> Finding:
    try:
        version("torch")
    except PackageNotFoundError:
        return Finding("torch", "problem", f"not installed; server and trainer need it: {_TRAIN}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("torch", "problem", f"does not import within {_TORCH_SECONDS} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding("torch", "problem", f"is installed and does not work: {last}")
    return _judge_torch(json.loads(done.stdout.splitlines()[-1]))


def _judge_torch(told: dict[str, object]) -> Finding:
    """A finding from what the child process printed."""
    found, built_for, devices = str(told["version"]), told["built_for"], told["devices"]
    wanted = declared_range("torch")
    if not wanted.contains(found, prereleases=True):
        return Finding("torch", "problem", f"{found}, expected {wanted}: {_TRAIN}")
    if not told["works"]:
        return Finding("torch", "problem", f"{found} computes nonsense on {devices}")
    if devices:
        return Finding("torch", "ok", f"{found}, CUDA {built_for}: {devices}")
    if built_for:
        return Finding("torch", "warning", f"{found} is made for CUDA {built_for}, but sees no device (driver?)")
    return Finding("torch", "ok", f"{found} without CUDA: runs on the CPU")


def _vllm() -> Finding:
    found = installed_vllm()
    if found is None:
        return Finding("vllm", "absent", "not installed; for inference.backend = 'vllm': pip install '.[vllm]'")
    try:
        return Finding("vllm", "ok", check_vllm())
    except ConfigError as error:
        return Finding("vllm", "problem", str(error))


def _images() -> Finding:
    """Decodes a PNG, which must come back as it was, and a JPEG, on which both decoders must agree."""
    text = f"Pillow {version('pillow')}, simplejpeg {version('simplejpeg')}"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    try:
        for file_format in ("PNG", "JPEG"):
            file = io.BytesIO()
            picture.save(file, format=file_format)
            with Image.open(file) as opened:
                expected = np.asarray(opened.convert("RGB"))
            if not np.array_equal(decode_rgb(file.getvalue(), ImageLimits()), expected):
                return Finding("images", "problem", f"{text}: {file_format} is decoded differently than Pillow does")
    except (ImageError, OSError) as error:
        return Finding("images", "problem", f"{text}: {error}")
    return Finding("images", "ok", text)
