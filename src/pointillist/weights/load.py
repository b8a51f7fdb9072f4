"""Weights between trainer and server: one safetensors file a version, written atomically, loaded whole or not."""

import hashlib
import math
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from pointillist.base.digests import (
    DIGESTS_FILE,
    MAX_DIGESTS_BYTES,
    FileDigest,
    decode_digests,
)
from pointillist.base.system import machine_id, pid_namespace
from pointillist.errors import InferenceError
from pointillist.runs.paths import WEIGHTS_FILE

_TRAINED_TYPES: Final = (torch.float32, torch.bfloat16)
_CHUNK_BYTES: Final = 4 * 1024 * 1024
_MAX_HEADER_BYTES: Final = 100 * 1024 * 1024
"""Longest header of a safetensors file, as the format defines it."""


class StoredTensor(Protocol):
    """One tensor of a safetensors file, not yet read."""

    def get_shape(self) -> list[int]:
        """Its shape."""
        ...


class TensorFile(Protocol):
    """An open safetensors file: `safetensors.safe_open`, whose methods have no annotations."""

    def keys(self) -> list[str]:
        """Names of its tensors."""
        ...

    def get_slice(self, name: str) -> StoredTensor:
        """A tensor, not yet read."""
        ...

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU."""
        ...


class HasWeights(Protocol):
    """A model, as far as its weights are concerned."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights by name, tied ones under each of their names; they share the model's memory."""
        ...


class OpenWeights:
    """A weight version in memory that is this process' own: whatever happens to its file does not reach it."""

    def __init__(self, tensors: TensorFile, path: str, sha256: str) -> None:
        self._tensors = tensors
        self.path = path
        """Path of the copy, for other processes on `this_machine`; `read_copy` maps it there without a second copy."""
        self.sha256 = sha256
        """Digest of the file's bytes, 64 hex digits."""
        self.shapes = shapes_in(tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """A weight, on the CPU."""
        return self._tensors.get_tensor(name)


def open_tensors(path: str | Path) -> AbstractContextManager[TensorFile]:
    """A safetensors file, mapped; raises OSError or SafetensorError if it cannot be read."""
    return cast(AbstractContextManager[TensorFile], safe_open(path, framework="pt"))


def shapes_in(tensors: TensorFile) -> dict[str, list[int]]:
    """Shapes of all tensors in a file, by name; no tensor is read."""
    return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - it is no mapping


@contextmanager
def open_weights(folder: Path, *, max_bytes: int | None = None) -> Iterator[OpenWeights]:
    """Reads the weights in a folder into memory and checks them against `digests.json`, if that lies beside them.

    The file is opened once, without following links, and copied: a mapped file that is rewritten or cut under its
    reader kills the process. It takes the file's size in memory.

    Args:
        folder: Holds a `model.safetensors`.
        max_bytes: Longest file; None is any.

    Raises:
        InferenceError: No such file, not a regular one, longer than `max_bytes`, changed while it was read, other than
            its digest, or not a safetensors file.
    """
    try:
        with _private_copy(folder, max_bytes) as (path, sha256), open_tensors(path) as tensors:
            yield OpenWeights(tensors, path, sha256)
    except (OSError, SafetensorError) as error:
        raise InferenceError(f"weights in {folder} cannot be read ({error})") from None


def read_weights(folder: Path, *, max_bytes: int | None = None, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict that `write_weights` wrote.

    Args:
        folder: Holds a `model.safetensors`.
        max_bytes: Longest file; None is any.
        sha256: Digest that the file must have, from an earlier look at it.

    Raises:
        InferenceError: As `open_weights`, or another digest.
    """
    with open_weights(folder, max_bytes=max_bytes) as weights:
        if sha256 is not None and weights.sha256 != sha256:
            raise InferenceError(f"weights in {folder} have changed since they were checked")
        return {name: weights.tensor(name) for name in weights.shapes}


def read_copy(path: str) -> dict[str, torch.Tensor]:
    """The state dict in `OpenWeights.path` of another process of this machine, which keeps it open meanwhile.

    Raises:
        InferenceError: It is gone.
    """
    try:
        with open_tensors(path) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise InferenceError(f"weights in {path} cannot be read ({error})") from None


def this_machine() -> str:
    """Name of this machine since its last start, and of the process numbers that are valid in it."""
    return f"{machine_id()}/{pid_namespace()}"


@contextmanager
def _private_copy(folder: Path, max_bytes: int | None) -> Iterator[tuple[str, str]]:
    """Path of an anonymous file with the weights' bytes, and their sha256."""
    where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        expected = _expected_digest(where)
        with _opened_regular(where, WEIGHTS_FILE) as file:
            before = os.fstat(file.fileno())
            if max_bytes is not None and before.st_size > max_bytes:
                raise InferenceError(f"weights have {before.st_size} bytes, this model's have at most {max_bytes}")
            copy = os.memfd_create("weights")
            try:
                sha256 = _copy(file, copy, before.st_size)
                after = os.fstat(file.fileno())
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise InferenceError(f"weights in {folder} changed while they were read")
                if expected is not None and (expected.bytes, expected.sha256) != (before.st_size, sha256):
                    raise InferenceError(f"weights in {folder} are not those of {DIGESTS_FILE}: the file is corrupt")
                yield f"/proc/{os.getpid()}/fd/{copy}", sha256
            finally:
                os.close(copy)
    finally:
        os.close(where)


@contextmanager
def _opened_regular(folder: int, name: str) -> Iterator[BinaryIO]:
    # O_NONBLOCK: opening a FIFO in the file's place must not hang.
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InferenceError(f"{name} is not a regular file")
        yield file


def _copy(file: BinaryIO, target: int, num_bytes: int) -> str:
    """Copies so many bytes, or as many as there are; the sha256 of what was copied."""
    digest = hashlib.sha256()
    while num_bytes > 0 and (chunk := file.read(min(_CHUNK_BYTES, num_bytes))):
        digest.update(chunk)
        num_bytes -= len(chunk)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(target, rest) :]
    return digest.hexdigest()


def _expected_digest(folder: int) -> FileDigest | None:
    """What `digests.json` says of the weights; None if it is not there."""
    try:
        with _opened_regular(folder, DIGESTS_FILE) as file:
            return decode_digests(file.read(MAX_DIGESTS_BYTES))[WEIGHTS_FILE]
    except FileNotFoundError:
        return None
    except (KeyError, ValueError) as error:
        raise InferenceError(f"{DIGESTS_FILE} beside the weights cannot be used ({error})") from None


@torch.no_grad()
def check_weights(model: HasWeights, weights: Mapping[str, torch.Tensor]) -> None:
    """Checks that weights are exactly this model's and can serve.

    Raises:
        InferenceError: A name or shape differs, a type is not one that this model can take, or a value is not finite
            in the model's own type.
    """
    own = _own_weights(model, weights)
    for name, tensor in weights.items():
        check_values(name, tensor, own[name].dtype)


def check_values(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Checks the values of one weight.

    Args:
        name: The weight's name, for the message.
        tensor: The new weight, of any shape.
        dtype: Type of the model's weight. Trained weights come in it, or in the trainer's float32 or bfloat16; any
            other type would lose what it holds.

    Raises:
        InferenceError: Another type, or a value that is not finite as `dtype`.
    """
    if tensor.dtype != dtype and not (dtype.is_floating_point and tensor.dtype in _TRAINED_TYPES):
        raise InferenceError(f"weight {name} has type {tensor.dtype}, the model has {dtype}")
    if not bool(torch.isfinite(tensor.to(dtype)).all()):
        raise InferenceError(f"weight {name} has values that are not finite as {dtype}: training has diverged")


@torch.no_grad()
def copy_weights(model: HasWeights, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into a model whose weights they are.

    Raises:
        InferenceError: A name or shape differs; the model keeps its old weights.
    """
    own = _own_weights(model, weights)
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def largest_file(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes that a weights file of such tensors has at most: all in float32, tied ones twice, and a header.

    Example:
        One weight of shape `(10, 3)`: 2 * 30 * 4 = 240 bytes, and the header's 100 MiB.
    """
    return 2 * sum(math.prod(shape) * 4 for shape in shapes.values()) + _MAX_HEADER_BYTES


def check_weights_fit(
    own: Mapping[str, Sequence[int]], new: Mapping[str, Sequence[int]], *, optional: Collection[str]
) -> None:
    """Checks names and shapes of weights before a model is touched.

    Args:
        own: Shapes of the model's weights.
        new: Shapes of those that are to be loaded.
        optional: Names that either may have without the other: weights that are tied to another one.

    Raises:
        InferenceError: A name or shape differs.
    """
    missing, unknown = own.keys() - new.keys() - set(optional), new.keys() - own.keys() - set(optional)
    if missing or unknown:
        raise InferenceError(
            f"weights do not fit the model: missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
        )
    for name in own.keys() & new.keys():
        if list(own[name]) != list(new[name]):
            raise InferenceError(f"weight {name} has shape {list(new[name])}, expected {list(own[name])}")


def _own_weights(model: HasWeights, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own weights, whose names and shapes are those of the new ones; of tied ones either may lack one.

    Raises:
        InferenceError: A name or shape differs.
    """
    own = model.state_dict()
    tied = {name for name in own if name not in weights and _shares_memory(own, name, weights)}
    check_weights_fit(_shapes(own), _shapes(weights), optional=tied)
    return own


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, Sequence[int]]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _shares_memory(own: Mapping[str, torch.Tensor], name: str, weights: Mapping[str, torch.Tensor]) -> bool:
    pointer = own[name].data_ptr()
    return any(own[other].data_ptr() == pointer for other in weights if other in own)
