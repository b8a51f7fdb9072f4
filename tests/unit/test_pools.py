"""Threads by purpose."""

import ast
import asyncio
import threading
from pathlib import Path

from pointillist.base.pools import Pool, give_threads_to_environments

SOURCE = Path(__file__).parent.parent.parent / "src" / "pointillist"
OURS = [
    *(SOURCE / "rollouts").rglob("*.py"),
    *(SOURCE / "orchestrator").glob("*.py"),
    *(SOURCE / "transport").glob("*.py"),
]
DEADLINE = 120.0


async def test_pools_do_not_wait_for_each_other() -> None:
    free, full = Pool("free", 1), Pool("full", 1)
    ended = threading.Event()
    held = [asyncio.create_task(full.run(ended.wait, DEADLINE)) for _ in range(3)]
    assert await asyncio.wait_for(free.run(lambda: 7), DEADLINE) == 7
    ended.set()
    await asyncio.gather(*held)


async def test_environments_have_threads_for_all_their_rollouts() -> None:
    give_threads_to_environments(30)
    together = threading.Barrier(4 * 30)
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(asyncio.to_thread(together.wait, DEADLINE) for _ in range(4 * 30)))


def test_nothing_of_ours_uses_the_pool_that_environments_can_fill() -> None:
    """Of sessions, gateway, workers, orchestrator and transports."""
    shared = {"to_thread", "run_in_threadpool"}
    for path in OURS:
        if path.name == "assets.py":  # a server in a process of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert name not in shared, f"{path}:{getattr(node, 'lineno', 0)} uses {name}"
