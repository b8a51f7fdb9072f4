"""What a process asks of its operating system: its memory, to end with its parent, a free port and its address."""

import ctypes
import ipaddress
import signal
import socket
import sys
from typing import Final

import psutil

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine can reach."""

_PR_SET_PDEATHSIG: Final = 1


def resident_mb() -> float:
    """Resident memory of this process, in MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def die_with_parent() -> None:
    """Asks the kernel to end this process when its parent is gone, however that happened (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port(host: str, port: int = 0) -> int:
    """A port of this machine that can be listened on.

    Args:
        host: Address to listen on.
        port: The one that is wanted; 0 is any.

    Raises:
        OSError: It is taken.
    """
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
