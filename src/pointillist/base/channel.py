"""Messages between the processes of one run: sockets that only the run's own processes can use, and bounded decoding.

The ZMQ transport and the environment workers both use these sockets. Both ends know one secret word, the key, and
derive the listener's CURVE key pair from it (curve25519; libzmq does the cryptography). A connecting process must know
the listener's public key to finish the handshake. That key never travels and follows from the secret word only, so a
process without the word cannot exchange a single message: libzmq drops its connection before any of its bytes reach
our code. Messages are encrypted and numbered per connection, so nobody can read, change or replay them.

What an accepted peer sends is bounded too: the size of a frame by `MAXMSGSIZE`, decompressed sizes by `decompress`,
and `decode` turns whatever a decoder raises into one error.
"""

import hashlib
import hmac
import zlib
from typing import Any, Final, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from pointillist.errors import TransportError

_HANDSHAKE_MS: Final = 10_000
_QUEUED_BYTES: Final = 1024**3
"""Of messages from one peer that wait to be read; beyond it libzmq stops reading from its connection."""
_KEEPALIVE: Final = (
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.TCP_KEEPALIVE_IDLE, 30),
    (zmq.TCP_KEEPALIVE_INTVL, 10),
    (zmq.TCP_KEEPALIVE_CNT, 6),
)
"""A machine that vanishes is noticed after 90 s."""

T = TypeVar("T")


def secure_listener(socket: "zmq.Socket[Any]", key: str, *, max_bytes: int) -> None:
    """Lets only peers with the same key connect; call it before `bind`.

    Args:
        socket: The listening socket.
        key: The secret word.
        max_bytes: Size of the largest frame that a peer may send; a longer one ends its connection.

    Raises:
        TransportError: The installed libzmq has no CURVE.
    """
    secret, _ = _listener_keys(key)
    socket.curve_secretkey = secret
    socket.curve_server = True
    _bound(socket, max_bytes)


def secure_client(socket: "zmq.Socket[Any]", key: str, *, max_bytes: int) -> None:
    """Makes a socket speak to a listener with the same key, and to no other; call it before `connect`.

    Args:
        socket: The connecting socket.
        key: The secret word.
        max_bytes: Size of the largest frame that the listener may send.

    Raises:
        TransportError: The installed libzmq has no CURVE.
    """
    _, socket.curve_serverkey = _listener_keys(key)
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    _bound(socket, max_bytes)


def decompress(data: bytes, *, max_bytes: int, what: str) -> bytes:
    """What `zlib.compress` packed, if it is no larger than allowed.

    Args:
        data: Compressed bytes.
        max_bytes: Largest size of the result; no more than that is ever unpacked.
        what: Name of the message, for the error.

    Raises:
        TransportError: The bytes are not compressed, are not all there, or unpack to more.
    """
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(data, max_bytes)
    except zlib.error as error:
        raise TransportError(f"not {what} ({error})") from None
    if unpacker.unconsumed_tail:
        raise TransportError(f"not {what}: it unpacks to more than {max_bytes} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise TransportError(f"not {what}: its compressed bytes do not end where they should")
    return raw


def decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes, what: str) -> T:
    """What a peer said.

    Args:
        decoder: Of the messages that are expected.
        data: Bytes of one frame.
        what: Name of the message, for the error.

    Raises:
        TransportError: The bytes are anything else, however they are malformed.
    """
    try:
        return decoder.decode(data)
    except Exception as error:  # DecodeError, ValidationError, RecursionError of deep nesting, and what else there is
        raise TransportError(f"not {what} ({type(error).__name__}: {error})") from None


def one_frame(frames: list[bytes], what: str) -> bytes:
    """The only frame of a message.

    Args:
        frames: Frames of the message, without routing id.
        what: Name of the message, for the error.

    Raises:
        TransportError: The message has none or several.
    """
    if len(frames) != 1:
        raise TransportError(f"not {what}: it has {len(frames)} frames, expected 1")
    return frames[0]


def _listener_keys(key: str) -> tuple[bytes, bytes]:
    """The listener's secret and public key, Z85."""
    if not zmq.has("curve"):
        raise TransportError("the installed libzmq has no CURVE, by which processes of a run prove who they are")
    word = key.encode("utf-8", "surrogateescape")
    secret = z85.encode(hmac.new(word, b"pointillist channel: listener", hashlib.sha256).digest())
    return secret, zmq.curve_public(secret)


def _bound(socket: "zmq.Socket[Any]", max_bytes: int) -> None:
    socket.maxmsgsize = max_bytes
    socket.rcvhwm = max(2, min(1000, _QUEUED_BYTES // max_bytes))
    socket.handshake_ivl = _HANDSHAKE_MS
    for option, value in _KEEPALIVE:
        socket.setsockopt(option, value)
