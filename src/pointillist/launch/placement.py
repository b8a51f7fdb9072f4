"""Which machine runs what, and where each process is reached: the same for one machine and for many.

A run on one machine gives it every role. In a SLURM job of several, the first `inference_nodes` serve and the others
train; the first of those is the head, which also has the orchestrator, the environments and the asset endpoint. Each
machine chooses free ports of its own (`choose_ports`), so several runs can share one; `Placement.of` turns the
machines of a run into the configs and the processes of each. Nothing here changes a config in place.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from pointillist.base.net import free_port, http_url
from pointillist.config import RUN_KEY, AssetServerConfig, RLConfig
from pointillist.errors import LaunchError
from pointillist.launch.devices import gpu_shares
from pointillist.launch.supervisor import Spec
from pointillist.runs.config_files import write_toml
from pointillist.runs.paths import RunPaths

_HERE: Final = "127.0.0.1"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of the run and the ports that it chose; a port is 0 where the machine has no such role."""

    index: int
    host: str
    """Address at which the other machines reach it."""
    server_ports: list[int]
    """Ports of its inference servers."""
    transport_port: int
    assets_port: int
    rendezvous_port: int
    """Port of torchrun's rendezvous."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Which machines serve and which train, by index; on one machine these are the same."""

    serving: range
    training: range

    @classmethod
    def of(cls, config: RLConfig) -> "Roles":
        """The roles that a config asks for."""
        if config.slurm is None or not config.slurm.inference_nodes:
            return cls(range(1), range(1))
        serving = config.slurm.inference_nodes
        return cls(range(serving), range(serving, serving + config.slurm.trainer_nodes))

    @property
    def num_machines(self) -> int:
        """Machines of the run."""
        return self.training.stop

    @property
    def head(self) -> int:
        """Machine of the orchestrator and of the trainer's main rank."""
        return self.training.start


def choose_ports(config: RLConfig, index: int = 0, host: str = _HERE) -> Machine:
    """A machine with its ports: those that the config names, and free ones.

    Args:
        config: Config of the run.
        index: Number of this machine.
        host: Address at which the others reach it.

    Raises:
        LaunchError: A port that the config names is taken.
    """
    roles, server, assets = Roles.of(config), config.inference.server, config.multimodal.assets
    alone, is_head = roles.num_machines == 1, index == roles.head
    taken: set[int] = set()

    def port_of(name: str, own_host: str, port: int) -> int:
        return _choose_port(name, own_host if alone else host, port, taken)

    return Machine(
        index=index,
        host=host,
        server_ports=[
            port_of("inference.server", server.host, server.port)
            for _ in range(config.num_servers if index in roles.serving else 0)
        ],
        transport_port=port_of("transport.address", host, _transport(config)[1]) if is_head else 0,
        assets_port=port_of("multimodal.assets", assets.host, assets.port) if is_head else 0,
        rendezvous_port=port_of("torchrun", host, 0) if is_head else 0,
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """A run on its machines."""

    config: RLConfig
    """Config of the run with the addresses of all its processes."""
    machines: tuple[Machine, ...]

    @classmethod
    def of(cls, config: RLConfig, machines: Sequence[Machine]) -> "Placement":
        """Places a run.

        Args:
            config: Config of the run; its `output_dir` is absolute.
            machines: All machines by index, as `choose_ports` made them.
        """
        return cls(config.with_values(_addresses(config, machines)), tuple(machines))

    @property
    def roles(self) -> Roles:
        """Which machines serve and which train."""
        return Roles.of(self.config)

    @property
    def paths(self) -> RunPaths:
        """The run's folder."""
        return RunPaths(self.config.output_dir)

    def resumed_after(self, step: int) -> "Placement":
        """The same run going on after a step; 0 is its beginning."""
        values = {"trainer.resume_step": step or None, "orchestrator.resume_step": step or None}
        return replace(self, config=self.config.with_values(values))

    def write_configs(self) -> None:
        """Writes the run's config and that of each process to the run's folder."""
        config, folder = self.config, self.paths.configs
        # Whether a start resumes is no part of what the run is.
        write_toml(config.with_values({"resume": False, "resume_with_changes": False}), folder / "rl.toml")
        write_toml(config.orchestrator, folder / "orchestrator.toml")
        write_toml(config.trainer, folder / "trainer.toml")
        write_toml(
            AssetServerConfig(output_dir=config.output_dir, multimodal=config.multimodal, log_level=config.log_level),
            folder / "assets.toml",
        )
        for name, machine, port in self._servers():
            values = {"server.host": self._server_host(machine), "server.port": port}
            write_toml(config.inference.with_values(values), folder / f"{name}.toml")

    def processes(self, index: int, environ: Mapping[str, str]) -> list[Spec]:
        """The processes of one machine, in the order in which they are started.

        Args:
            index: Number of the machine.
            environ: Environment of its processes; GPUs are shared out on top of it.
        """
        is_head, trains = index == self.roles.head, index in self.roles.training
        shares = gpu_shares(
            environ,
            servers=len(self.machines[index].server_ports),
            ranks=self._ranks_per_machine if trains else 0,
        )
        found = []
        for name, machine, port in self._servers():
            if machine.index == index:
                own = {**environ, **shares.server(machine.server_ports.index(port))}
                found.append(self._spec(name, "inference", own, url=_url(self._server_host(machine), port)))
        if is_head and self.config.multimodal.assets.serve:
            assets = self.config.multimodal.assets
            found.append(self._spec("assets", "assets", environ, url=_url(assets.host, assets.port)))
        if trains:
            found.append(self._trainer(index, {**environ, **shares.trainer()}))
        if is_head:
            found.append(self._spec("orchestrator", "orchestrator", environ, beats=True))
        return found

    @property
    def _ranks_per_machine(self) -> int:
        return self.config.trainer.num_workers // len(self.roles.training)

    def _servers(self) -> list[tuple[str, Machine, int]]:
        """Name, machine and port of each inference server."""
        places = [(machine, port) for machine in self.machines for port in machine.server_ports]
        return [
            ("inference" if len(places) == 1 else f"inference_{number}", machine, port)
            for number, (machine, port) in enumerate(places)
        ]

    def _server_host(self, machine: Machine) -> str:
        return self.config.inference.server.host if len(self.machines) == 1 else machine.host

    def _trainer(self, index: int, environ: Mapping[str, str]) -> Spec:
        """One machine's trainer ranks, under torchrun if the run has several."""
        training, head = self.roles.training, self.machines[self.roles.head]
        torchrun: list[str] = []
        if self.config.trainer.num_workers > 1:
            torchrun = [
                "torch.distributed.run",
                f"--nnodes={len(training)}",
                f"--nproc-per-node={self._ranks_per_machine}",
                f"--node-rank={training.index(index)}",
                f"--master-addr={head.host}",
                f"--master-port={head.rendezvous_port}",
                "-m",
            ]
        name = "trainer" if len(training) == 1 else f"trainer_{training.index(index)}"
        return self._spec(name, "trainer", environ, before=torchrun, beats=True)

    def _spec(
        self,
        name: str,
        command: str,
        environ: Mapping[str, str],
        *,
        url: str | None = None,
        before: Sequence[str] = (),
        beats: bool = False,
    ) -> Spec:
        # The trainer's machines have one config; their logs are apart.
        toml = self.paths.configs / ("trainer.toml" if command == "trainer" else f"{name}.toml")
        return Spec(
            name,
            [sys.executable, "-m", *before, "pointillist", command, "@", str(toml)],
            environ,
            self.paths.logs / f"{name}.log",
            health_url=f"{url}/health" if url else None,
            metrics_url=f"{url}/metrics" if url and command == "inference" else None,
            state=self.paths.state if beats else None,
            saves=command == "trainer",
        )


def _addresses(config: RLConfig, machines: Sequence[Machine]) -> dict[str, object]:
    """Config values that say where each process is reached."""
    alone, head = len(machines) == 1, machines[Roles.of(config).head]
    server, assets = config.inference.server, config.multimodal.assets
    values: dict[str, object] = {}
    key = server.api_key_var
    if not alone and key is None:
        key = values["inference.server.api_key_var"] = RUN_KEY
    if config.num_servers:
        values["orchestrator.client.api_key_var"] = key
        values["orchestrator.client.base_url"] = [
            _url(server.host if alone else machine.host, port) for machine in machines for port in machine.server_ports
        ]
    if config.transport.type == "zmq":
        host = _transport(config)[0] if alone else head.host
        values["transport.address"] = f"tcp://{host}:{head.transport_port}"
    if assets.serve:
        host = assets.host if alone else head.host
        values["multimodal.assets.host"] = host
        values["multimodal.assets.port"] = head.assets_port
        values["multimodal.assets.urls"] = [_url(host, head.assets_port)]
    return values


def _transport(config: RLConfig) -> tuple[str, int]:
    """Host and port of `transport.address`."""
    host, _, port = config.transport.address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def _choose_port(name: str, host: str, port: int, taken: set[int]) -> int:
    """The port if it is free, or for 0 one that is free and that no other process of this machine was given."""
    try:
        found = free_port(host, port)
        while found in taken and port == 0:
            found = free_port(host)
        taken.add(found)
        return found
    except OSError as error:
        raise LaunchError(
            f"{name} cannot listen on {host}:{port} ({error.strerror}); choose another port, or 0 for a free one"
        ) from None


def _url(host: str, port: int) -> str:
    """Address at which a client reaches a server that binds `host`."""
    return http_url({"0.0.0.0": _HERE, "::": "::1"}.get(host, host), port)  # noqa: S104 - asks, does not bind
