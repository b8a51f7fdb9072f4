"""Which GPUs of a machine each process sees, where servers and ranks share it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_DRIVER_LIST: Final = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class GpuShares:
    """Shares of one machine; empty ones where there is nothing to share."""

    servers: list[list[str]]
    ranks: list[str]

    def server(self, number: int) -> dict[str, str]:
        """Environment of an inference server."""
        return _environ(self.servers[number] if self.servers else [])

    def trainer(self) -> dict[str, str]:
        """Environment of the trainer's ranks."""
        return _environ(self.ranks)


def gpu_shares(environ: Mapping[str, str], *, servers: int, ranks: int, driver_list: Path = _DRIVER_LIST) -> GpuShares:
    """Splits the GPUs: one for each trainer rank, the others evenly among the servers.

    Nothing is split where one process has them all, or where there are too few: then all processes see all of them.

    Args:
        environ: `CUDA_VISIBLE_DEVICES` says what this run may use.
        servers: Inference servers on this machine.
        ranks: Trainer ranks on it.
        driver_list: Folder with one entry a GPU.
    """
    visible = _visible(environ, driver_list)
    if len(visible) < servers + ranks or servers + (ranks > 0) <= 1:
        return GpuShares([], [])
    per_server = (len(visible) - ranks) // servers if servers else 0
    return GpuShares(
        [visible[number * per_server : (number + 1) * per_server] for number in range(servers)],
        visible[len(visible) - ranks :] if ranks else [],
    )


def _visible(environ: Mapping[str, str], driver_list: Path) -> list[str]:
    if _VISIBLE in environ:
        return [name.strip() for name in environ[_VISIBLE].split(",") if name.strip()]
    return [str(index) for index, _ in enumerate(driver_list.iterdir())] if driver_list.is_dir() else []


def _environ(gpus: list[str]) -> dict[str, str]:
    return {_VISIBLE: ",".join(gpus)} if gpus else {}
