"""How the nodes of a job find each other: small files in the run's folder, one folder a start of the job."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from pointillist.base.files import write_atomically
from pointillist.errors import LaunchError
from pointillist.launch.placement import Machine

_POLL_SECONDS: Final = 0.2


class Rendezvous:
    """One start of a job; a requeued job meets in another folder, so nothing of the last start is mistaken for it."""

    def __init__(self, folder: Path, num_nodes: int, timeout: float) -> None:
        """Nothing is written yet.

        Args:
            folder: Folder of this start of the job, on a file system that all nodes share.
            num_nodes: Nodes that will come.
            timeout: Seconds that they may take.
        """
        self._folder = folder
        self._num_nodes = num_nodes
        self._timeout = timeout

    def join(self, machine: Machine) -> None:
        """Says where this node is."""
        write_atomically(self._folder / f"node_{machine.index}.json", msgspec.json.encode(machine))

    def machines(self) -> list[Machine]:
        """All nodes, by index; waits for them.

        Raises:
            LaunchError: Some did not come.
        """
        paths = [self._folder / f"node_{index}.json" for index in range(self._num_nodes)]
        self._wait(
            lambda: all(path.is_file() for path in paths),
            lambda: f"nodes {', '.join(str(i) for i, path in enumerate(paths) if not path.is_file())}",
        )
        return [msgspec.json.decode(path.read_bytes(), type=Machine) for path in paths]

    def announce(self) -> None:
        """The head says that configs are written and processes may start."""
        write_atomically(self._folder / "go.json", b"{}")

    def wait_for_go(self) -> None:
        """Waits until the head says so.

        Raises:
            LaunchError: It did not do so in time.
        """
        path = self._folder / "go.json"
        self._wait(path.is_file, lambda: "the head's configs")

    def finish(self) -> None:
        """The head says that the run is over."""
        write_atomically(self._folder / "finished.json", b"{}")

    def is_finished(self) -> bool:
        """Whether the head has said so."""
        return (self._folder / "finished.json").is_file()

    def _wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        deadline = time.monotonic() + self._timeout
        while not ready():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"waited {self._timeout:.0f} s (slurm.startup_timeout) for {what()} in {self._folder}: is the "
                    "run's folder shared by all nodes?"
                )
            time.sleep(_POLL_SECONDS)
