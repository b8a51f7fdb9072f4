"""Which process a file in a run's folder is about: the fields that heartbeats and the run's lock share."""

import json
import os
import socket
from dataclasses import dataclass, fields
from typing import Any, Self

from pointillist.base.system import is_process, machine_id, pid_namespace, process_start


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process, on whatever machine; subclasses add what it says of itself."""

    host: str
    machine: str
    """See `system.machine_id`."""
    namespace: str
    """See `system.pid_namespace`."""
    pid: int
    process_start: str
    """See `system.process_start`."""

    @classmethod
    def of_this_process(cls, **more: Any) -> Self:
        """The record of the calling process.

        Args:
            more: Fields of the subclass.
        """
        pid = os.getpid()
        start = process_start(pid) or ""
        return cls(socket.gethostname(), machine_id(), pid_namespace(), pid, start, **more)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The record in a file; keys of other versions are ignored.

        Raises:
            ValueError: The bytes are no such record.
        """
        try:
            said = json.loads(data)
            return cls(**{field.name: said[field.name] for field in fields(cls) if field.name in said})
        except (TypeError, RecursionError) as error:
            raise ValueError(f"not the record of a process ({error})") from None

    @property
    def is_here(self) -> bool:
        """Whether its process number means something to this process: same machine, same pid namespace."""
        return self.machine == machine_id() and self.namespace == pid_namespace()

    @property
    def is_alive(self) -> bool:
        """Whether the process is alive; only for one that `is_here`."""
        return is_process(self.pid, self.process_start)
