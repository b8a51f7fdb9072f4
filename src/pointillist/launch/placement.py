"""Which machine runs what, and where everybody is reached: the same for one machine and for many.

A run on one machine has one node with every role. In a SLURM job of several, the first `inference_nodes` serve and the
others train; the first of those is the head, which also has the orchestrator, the environments and the asset endpoint.
Every node chooses free ports of its own, so several runs can share a machine.
"""

import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from pointillist.base.net import free_port, http_url, key_from_environment
from pointillist.config import RUN_KEY, AssetServerConfig, RLConfig, write_toml
from pointillist.errors import LaunchError
from pointillist.launch.devices import gpu_shares
from pointillist.launch.supervisor import Spec
from pointillist.runs.image_dir import literal_dir
from pointillist.runs.paths import RunPaths


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of the run, and the ports that it has chosen."""

    index: int
    host: str
    """Address at which the other nodes reach it."""
    server_ports: list[int]
    transport_port: int
    assets_port: int
    rendezvous_port: int
    """Of torchrun, on the head."""


class Layout:
    """Who runs what."""

    def __init__(self, config: RLConfig) -> None:
        """Reads the numbers of nodes."""
        slurm = config.slurm
        serving, training = (slurm.inference_nodes, slurm.trainer_nodes) if slurm else (0, 0)
        self.num_nodes = max(1, serving + training)
        self.serving = range(serving) if serving else range(1)
        self.training = range(serving, serving + training) if training else range(1)
        self.head = self.training[0]


def choose_ports(config: RLConfig, layout: Layout, index: int, host: str) -> Node:
    """This machine's ports: those that the config names, and free ones.

    Args:
        config: Of the run.
        layout: Who runs what.
        index: Of this machine.
        host: Address at which it is reached.

    Raises:
        LaunchError: A port that the config names is taken.
    """
    server, assets = config.inference.server, config.multimodal.assets
    transport_port = int(config.transport.address.rpartition(":")[2])
    one_machine = layout.num_nodes == 1
    is_head = index == layout.head
    taken: set[int] = set()
    return Node(
        index=index,
        host=host,
        server_ports=[
            _port("inference.server", server.host if one_machine else host, server.port, taken)
            for _ in range(config.num_servers if index in layout.serving else 0)
        ],
        transport_port=_port("transport.address", host, transport_port, taken) if is_head else 0,
        assets_port=_port("multimodal.assets", assets.host if one_machine else host, assets.port, taken)
        if is_head
        else 0,
        rendezvous_port=_port("torchrun", host, 0, taken) if is_head else 0,
    )


def settle(config: RLConfig, layout: Layout, nodes: Sequence[Node]) -> None:
    """Writes into the config where everybody is reached, so that each process finds it in its own."""
    head = nodes[layout.head]
    server, client = config.inference.server, config.orchestrator.client
    if layout.num_nodes > 1:
        server.api_key_var = server.api_key_var or RUN_KEY
    if config.num_servers:
        client.api_key_var = server.api_key_var
        client.base_url = [
            _url(server.host if layout.num_nodes == 1 else node.host, port)
            for node in nodes
            for port in node.server_ports
        ]
    if config.transport.type == "zmq":
        host = config.transport.address.removeprefix("tcp://").rpartition(":")[0]
        address = f"tcp://{host if layout.num_nodes == 1 else head.host}:{head.transport_port}"
        for transport in (config.transport, config.orchestrator.transport, config.trainer.transport):
            transport.address = address
    if config.multimodal.assets.serve:
        for component in (config, config.inference, config.orchestrator, config.trainer):
            assets = component.multimodal.assets
            assets.host = assets.host if layout.num_nodes == 1 else head.host
            assets.port = head.assets_port
            assets.urls = [_url(assets.host, head.assets_port)]


def write_configs(config: RLConfig, layout: Layout, nodes: Sequence[Node], paths: RunPaths) -> None:
    """Writes the run's config and that of each process."""
    for component in (config.inference, config.orchestrator, config.trainer):
        component.output_dir = paths.output_dir
    # How this start was told to go on is no part of what the run is.
    write_toml(config.model_copy(update={"resume": False, "resume_with_changes": False}), paths.configs / "rl.toml")
    write_toml(config.orchestrator, paths.configs / "orchestrator.toml")
    write_toml(config.trainer, paths.configs / "trainer.toml")
    write_toml(
        AssetServerConfig(output_dir=paths.output_dir, multimodal=config.multimodal, log_level=config.log_level),
        paths.configs / "assets.toml",
    )
    for (node, port), name in _servers(nodes).items():
        one = config.inference.model_copy(deep=True)
        one.server.port = port
        if layout.num_nodes > 1:
            one.server.host = nodes[node].host
        write_toml(one, paths.configs / f"{name}.toml")


def specs(
    config: RLConfig,
    layout: Layout,
    nodes: Sequence[Node],
    index: int,
    paths: RunPaths,
    environ: Mapping[str, str],
) -> list[Spec]:
    """The processes of one machine, in the order in which they are started."""
    shares = gpu_shares(
        environ,
        servers=len(nodes[index].server_ports),
        ranks=_ranks(config, layout) if index in layout.training else 0,
    )
    found = []
    for (node, port), name in _servers(nodes).items():
        if node == index:
            host = config.inference.server.host if layout.num_nodes == 1 else nodes[index].host
            own = {**environ, **shares.server(nodes[index].server_ports.index(port))}
            found.append(_spec(name, "inference", paths, own, url=_url(host, port)))
    if index == layout.head and config.multimodal.assets.serve:
        assets = config.multimodal.assets
        found.append(_spec("assets", "assets", paths, environ, url=_url(assets.host, assets.port)))
    if index in layout.training:
        found.append(_trainer_spec(config, layout, nodes, index, paths, {**environ, **shares.trainer()}))
    if index == layout.head:
        found.append(_spec("orchestrator", "orchestrator", paths, environ, beats=True))
    return found


def image_dir_everywhere(config: RLConfig, image_dir: Path) -> None:
    """Writes the one resolution of the image folder into every component, in a form that no reader expands again."""
    for component in (config, config.inference, config.orchestrator, config.trainer):
        component.multimodal.offload_dir = literal_dir(image_dir)


def host_of(address: str) -> str:
    """Address at which a server on `address` is asked from its own machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - asks, does not bind


def address_towards(other: str) -> str:
    """This machine's address on the way to another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def check_keys(config: RLConfig) -> None:
    """Makes sure that the keys that a config names are there.

    Raises:
        ConfigError: One is not set.
    """
    for name, server in (
        ("inference server", config.inference.server),
        ("gateway", config.orchestrator.gateway),
        ("metrics endpoint", config.metrics),
    ):
        if server.api_key_var not in (None, RUN_KEY):
            key_from_environment(str(server.api_key_var), f"the {name}'s API key")


def _trainer_spec(
    config: RLConfig,
    layout: Layout,
    nodes: Sequence[Node],
    index: int,
    paths: RunPaths,
    environ: Mapping[str, str],
) -> Spec:
    """One machine's trainer ranks, under torchrun if there are several."""
    torchrun: list[str] = []
    if config.trainer.num_workers > 1:
        head = nodes[layout.head]
        torchrun = [
            "torch.distributed.run",
            f"--nnodes={len(layout.training)}",
            f"--nproc-per-node={_ranks(config, layout)}",
            f"--node-rank={layout.training.index(index)}",
            f"--master-addr={head.host}",
            f"--master-port={head.rendezvous_port}",
            "-m",
        ]
    name = "trainer" if len(layout.training) == 1 else f"trainer_{layout.training.index(index)}"
    return _spec(name, "trainer", paths, environ, before=torchrun, beats=True)


def _spec(
    name: str,
    command: str,
    paths: RunPaths,
    environ: Mapping[str, str],
    *,
    url: str | None = None,
    before: Sequence[str] = (),
    beats: bool = False,
) -> Spec:
    # The trainer's nodes have one config; their logs are apart.
    toml = "trainer" if command == "trainer" else name
    line = [sys.executable, "-m", *before, "pointillist", command, "@", str(paths.configs / f"{toml}.toml")]
    return Spec(
        name,
        line,
        environ,
        paths.logs / f"{name}.log",
        health_url=f"{url}/health" if url else None,
        metrics_url=f"{url}/metrics" if url and command == "inference" else None,
        state=paths.state if beats else None,
        saves=command == "trainer",
    )


def _servers(nodes: Sequence[Node]) -> dict[tuple[int, int], str]:
    """Name of each inference server, by node and port."""
    places = [(node.index, port) for node in nodes for port in node.server_ports]
    return {place: "inference" if len(places) == 1 else f"inference_{i}" for i, place in enumerate(places)}


def _ranks(config: RLConfig, layout: Layout) -> int:
    return config.trainer.num_workers // len(layout.training)


def _port(name: str, host: str, port: int, taken: set[int]) -> int:
    """The port if it is free, or for 0 one that is and was not given to another process of this machine before."""
    try:
        found = free_port(host, port)
        while found in taken and port == 0:
            found = free_port(host)
        taken.add(found)
        return found
    except OSError as error:
        raise LaunchError(
            f"{name} can not listen on {host}:{port} ({error.strerror}); choose another port, or 0 for a free one"
        ) from None


def _url(host: str, port: int) -> str:
    return http_url(host_of(host), port)
