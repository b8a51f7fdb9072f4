"""A unit test starts no process and leaves this machine alone; what does has the mark `integration`."""

import ipaddress
import sys
from collections.abc import Iterator
from typing import Any

import pytest

_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
_running: str | None = None
"""The unit test that runs now."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook of the interpreter: what it raises ends the call that is about to be made."""
    if _running is None:
        return
    if event in _STARTS:
        raise AssertionError(f"{_running} starts a process ({event}): mark it `integration`")
    if event == "socket.connect" and _is_far(arguments[1]):
        raise AssertionError(f"{_running} connects to {arguments[1]}: a unit test stays on its machine")


def _is_far(address: Any) -> bool:
    if not isinstance(address, tuple) or address[0] == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return True


sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest) -> Iterator[None]:
    global _running  # noqa: PLW0603 - an audit hook can be given nothing else, and never be taken away
    _running = None if request.node.get_closest_marker("integration") else request.node.nodeid
    yield
    _running = None
