"""Addresses, ports and keys of servers."""

import ipaddress
import os
import random
import socket
from contextlib import suppress
from typing import Final

from pointillist.errors import ConfigError

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine can reach."""
_FIRST_PORT: Final = 20_000
_FIRST_OUTGOING_PORT: Final = 32_768
"""Linux gives ports from here on to outgoing connections, unless it is configured otherwise."""
_ATTEMPTS: Final = 20


def free_port(host: str, port: int = 0) -> int:
    """A port of this machine that can be listened on.

    Any port is one below those that the system gives to outgoing connections: one of those could take it in the
    seconds until the process for which it was chosen listens.

    Args:
        host: Address to listen on.
        port: Wanted port; 0 is any.

    Raises:
        OSError: The wanted port, or every one that was tried, is taken.
    """
    if port:
        return _bound(host, port)
    for _ in range(_ATTEMPTS):
        with suppress(OSError):
            return _bound(host, random.randrange(_FIRST_PORT, _FIRST_OUTGOING_PORT))
    return _bound(host, 0)


def _bound(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def http_url(host: str, port: int) -> str:
    """`http://host:port`, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address without brackets, is this machine for itself only."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_from_environment(variable: str, purpose: str) -> str:
    """The key in an environment variable.

    Args:
        variable: Name of the variable.
        purpose: Which key it is, such as `the gateway's API key`.

    Raises:
        ConfigError: The variable is not set or empty.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(f"environment variable {variable} should hold {purpose}, it is not set")
    return value
