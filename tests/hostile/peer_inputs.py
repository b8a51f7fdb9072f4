"""Hostile peers of the ZMQ sockets: frames, floods of nesting, compressed bombs, and TCP that is not ZMTP."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import msgspec

from tests.hostile import odd


@dataclass(frozen=True, slots=True)
class Peer:
    """What a foreign peer sends: frames of one message, or bytes of a bare TCP connection."""

    kind: str
    frames: tuple[bytes, ...] = ()
    identity: bytes = b""
    """Of the socket; empty lets ZMQ choose."""
    tcp: bytes = b""
    keyed: bool = False
    """Whether it has the run's key: a process of the run that has gone wrong."""


_HONEST_GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\0NULL" + b"\0" * 16 + b"\0" * 32
_READY = b"\x04\x26\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
_NESTED = [
    b"\x91" * 100_000 + b"\xc0",
    b"\x81\xa1a" * 50_000 + b"\xc0",
    b"\x92\xc0" * 3000 + b"\xc0",
    b"\x91" * 1000 + b"\xc0",
]


def inputs(honest: list[bytes], *, compressed: bool) -> Callable[[Random], Peer]:
    """Messages of a foreign peer.

    Args:
        honest: Messages that honest peers send, as they go on the wire.
        compressed: Whether they are compressed there.
    """
    plain = [zlib.decompress(data) for data in honest] if compressed else honest

    def make(chance: Random) -> Peer:
        kind = chance.choice(
            ["mutated"] * 5 + ["garbled"] * 5 + ["frames"] * 3 + ["nested"] * 2 + ["sizes", "random", "tcp"]
        )
        if chance.random() < 1 / 400:
            kind = "large"
        if kind == "tcp":
            return Peer(kind, tcp=_tcp(chance))
        if kind == "frames":
            count = chance.choice([0, 2, 2, 3, 20, 500])
            return Peer(kind, tuple(chance.choice([b"", b"a", chance.choice(honest)]) for _ in range(count)) or (b"",))
        if kind == "large":
            return Peer(kind, (_bomb() if compressed else b"\0" * chance.choice([1_000_000, 20_000_000]),))
        keyed = chance.random() < 0.5
        if keyed and kind == "mutated":
            kind = "garbled"  # with the key and good values it would be the honest peer itself
        data = _message(kind, chance.choice(plain), chance)
        if compressed and chance.random() < 0.8:
            data = zlib.compress(data, 1)
            if chance.random() < 0.1:
                data = odd.garbled(data, chance)
        identity = chance.choice([b""] * 12 + [b"\x01", b"a" * 255, b"rank0", b"\0a", chance.randbytes(5)])
        return Peer(kind, (data,), identity if not identity.startswith(b"\0") else b"", keyed=keyed)

    return make


@cache
def _bomb() -> bytes:
    """Half a gigabyte of zeros, compressed."""
    press = zlib.compressobj()
    return b"".join(press.compress(b"\0" * 1_000_000) for _ in range(500)) + press.flush()


def _message(kind: str, honest: bytes, chance: Random) -> bytes:
    if kind == "mutated":
        return _mutated(honest, chance)
    if kind == "garbled":
        return odd.garbled(honest, chance)
    if kind == "nested":
        nested = chance.choice(_NESTED)
        return nested if chance.random() < 0.5 else b"\x85" + honest[1:] + b"\xa1z" + nested
    if kind == "sizes":
        return chance.choice([b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
                              b"\xc9\xff\xff\xff\xff\0", b"\xdc\xff\xff", b"\xc1", b"", b"\x80", b"\x90",
                              b"\xc0"])  # fmt: skip
    return chance.randbytes(chance.choice([1, 9, 300, 5000]))


def _mutated(honest: bytes, chance: Random) -> bytes:
    """A good message with other values; numbers that JSON alone can say become strings."""
    try:
        tree = msgspec.msgpack.decode(honest)
    except (msgspec.MsgspecError, RecursionError):
        return odd.garbled(honest, chance)
    holder: Any = odd.mutated({"message": tree}, chance)

    def plain(value: Any) -> Any:
        if isinstance(value, odd.Raw):
            try:
                number: Any = float(value.text) if not value.text.lstrip("-").isdigit() else int(value.text[:19])
            except ValueError:
                number = value.text[:2000]
            return number
        if isinstance(value, dict):
            return {_utf8(key): plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return _utf8(value)

    return msgspec.msgpack.encode(plain(holder.get("message")))


def _utf8(value: Any) -> Any:
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _tcp(chance: Random) -> bytes:
    """Bytes of somebody who does not speak ZMTP, or begins to."""
    return chance.choice([
        lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", lambda: chance.randbytes(chance.choice([1, 64, 5000])),
        lambda: b"\xff" * 64,
        lambda: _HONEST_GREETING, lambda: _HONEST_GREETING[: chance.randrange(64)],
        lambda: _HONEST_GREETING.replace(b"NULL", b"PLAI"),
        lambda: _HONEST_GREETING + _READY, lambda: _HONEST_GREETING + _READY + b"\x02" + struct.pack(">Q",
            2**62) + b"x" * 1000,
        lambda: _HONEST_GREETING + _READY + b"\x02" + struct.pack(">Q", 2**31) + b"x" * 1000,
        lambda: _HONEST_GREETING + _READY + (b"\x01\x01a" * 5000) + b"\x00\x01a",
        lambda: _HONEST_GREETING + b"\x04\xff" + b"\x05READY" + b"a" * 249,
        lambda: _HONEST_GREETING + odd.garbled(_READY, chance), lambda: b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x05",
        lambda: b"",
    ])()  # fmt: skip
