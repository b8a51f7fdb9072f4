"""The door: `pointillist rl`, the processes of a run; `view`, `store`, `transcript` to look at it; `doctor`.

Every command takes `@ file.toml` and dotted overrides, such as `--trainer.optim.lr 3e-4`; `--help` lists the keys.
"""

import asyncio
import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import click
from click.shell_completion import CompletionItem, get_completion_class

from pointillist import PointillistError, __version__
from pointillist.base.logs import set_up_logging
from pointillist.cli.options import help_of, options_of, parse_cli
from pointillist.config import (
    AssetServerConfig,
    EnvWorkerConfig,
    GatewayServerConfig,
    InferenceConfig,
    OrchestratorConfig,
    RLConfig,
    TrainerConfig,
)
from pointillist.config.base import Config, ConfigT
from pointillist.config.shared import ProcessConfig

ProcessT = TypeVar("ProcessT", bound=ProcessConfig)

_NAME = "pointillist"
# Arguments go to the config parser as they are.
_HELP = {"--help", "-h"}
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@click.group()
@click.version_option(__version__, prog_name=_NAME)
def cli() -> None:
    """Reinforcement learning of vision-language models in which images travel as references."""


@cli.command("store", context_settings=_PASS_THROUGH, short_help="Look after the images of runs.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def store(arguments: tuple[str, ...]) -> None:
    """Look after the images of runs: ls, verify, gc, export, import."""
    from pointillist.upkeep.commands import store as commands

    def run(given: list[str]) -> int:
        commands.main(given, prog_name="pointillist store")

    sys.exit(_guarded(run, list(arguments)))


@cli.command("transcript", short_help="Write one rollout with its pictures as a Markdown page.")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("rollout")
@click.argument("page", type=click.Path(dir_okay=False, path_type=Path))
def transcript(run: Path, rollout: str, page: Path) -> None:
    """Write ROLLOUT (<step>.<group>.<member>) of RUN with its pictures as a Markdown PAGE."""
    from pointillist.view.transcript import write_transcript

    def write(_: list[str]) -> int:
        click.echo(f"wrote {page} with {write_transcript(run, rollout, page)} pictures")
        return 0

    sys.exit(_guarded(write, []))


@cli.command("view", short_help="Look at runs in the browser, or at one rollout in the terminal.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option("--port", default=0, show_default=True, help="Port to bind; 0 is a free one.")
@click.option("--api-key-var", help="Environment variable with the token; off loopback one is made up without it.")
@click.option("--text", is_flag=True, help="Show one rollout in the terminal instead.")
@click.option("--rollout", help="Its id; by default the best of the last step.")
@click.option(
    "--images",
    type=click.Choice(["auto", "kitty", "sixel", "blocks", "none"]),
    default="auto",
    show_default=True,
    help="How pictures are drawn in the terminal.",
)
def view(
    runs: tuple[Path, ...],
    host: str,
    port: int,
    api_key_var: str | None,
    *,
    text: bool,
    rollout: str | None,
    images: str,
) -> None:
    """Look at RUNS in the browser: metrics side by side, rollouts with their pictures, the image store."""

    def look(_: list[str]) -> int:
        if text:
            from pointillist.view.terminal import show_rollout

            show_rollout(runs[0], rollout, images)
        else:
            from pointillist.view.serve import serve

            serve(runs, host, port, api_key_var)
        return 0

    sys.exit(_guarded(look, []))


@cli.command("doctor", short_help="Say what works on this machine: libraries, devices, the file system.")
@click.option(
    "--run-folder",
    type=click.Path(path_type=Path),
    default=Path("outputs"),
    show_default=True,
    help="Where runs are to lie; need not exist yet.",
)
def doctor(run_folder: Path) -> None:
    """Say what works on this machine; the exit code is 1 if a run would fail."""
    from rich.console import Console

    from pointillist.launch.doctor import examine

    sys.exit(examine(run_folder, Console()))


@cli.command("completion", short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands in SHELL; for bash: `source <(pointillist completion bash)`."""
    maker = get_completion_class(shell)
    assert maker is not None  # noqa: S101 - click has these three
    click.echo(maker(cli, {}, _NAME, f"_{_NAME.upper()}_COMPLETE").source())


class _ConfigCommand(click.Command):
    """A command whose options are the keys of a config class; `cli.options` reads and lists them."""

    def __init__(self, name: str, config_class: type[Config], text: str, callback: Callable[..., None]) -> None:
        arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
        super().__init__(
            name, context_settings=_PASS_THROUGH, params=[arguments], help=text, short_help=text, callback=callback
        )
        self._config_class = config_class

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Shows the help where it is asked for, and leaves the words to the config's parser."""
        if _HELP & set(args):
            ctx.exit(_guarded(partial(self._show_help, ctx.command_path), args))
        return super().parse_args(ctx, args)

    def _show_help(self, command: str, args: list[str]) -> int:
        """Shows the help, with a word after `--help` that of one key or table."""
        key = args[1].replace("-", "_") if args[0] in _HELP and len(args) > 1 else ""
        click.echo(help_of(command, str(self.help), self._config_class, key))
        return 0

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Keys of the config that begin as what was typed."""
        flags = {option.flag for option in options_of(self._config_class) if option.table is None}
        return [CompletionItem(flag) for flag in sorted(flags) if flag.startswith(incomplete.replace("_", "-"))]


def _command(
    name: str, config_class: type[ConfigT], text: str
) -> Callable[[Callable[[ConfigT], int | None]], Callable[[ConfigT], int | None]]:
    """A command that takes a config; the function's return value is its exit code, None is 0."""

    def register(function: Callable[[ConfigT], int | None]) -> Callable[[ConfigT], int | None]:
        def run(words: list[str]) -> int:
            return function(parse_cli(config_class, words)) or 0

        def command(arguments: tuple[str, ...]) -> None:
            sys.exit(_guarded(run, list(arguments)))

        cli.add_command(_ConfigCommand(name, config_class, text, command))
        return function

    return register


def _process(name: str, config_class: type[ProcessT], text: str) -> Callable[[Callable[[ProcessT], None]], None]:
    """A command that is one process of a run: its config, its log, and then what the function does."""

    def register(function: Callable[[ProcessT], None]) -> None:
        @_command(name, config_class, text)
        def run(config: ProcessT) -> None:
            set_up_logging(config.log_level)
            function(config)

    return register


@_command("rl", RLConfig, "Run everything: inference server, trainer, orchestrator and environment.")
def rl(config: RLConfig) -> int:
    """Runs everything."""
    from pointillist.launch.rl import run_rl

    return run_rl(config)


@_command("slurm-node", RLConfig, "Run one node's part of a SLURM job, which `pointillist rl` submits.")
def slurm_node(config: RLConfig) -> int:
    """Runs one node's part."""
    from pointillist.launch.slurm import run_node

    return run_node(config)


@_process("inference", InferenceConfig, "Serve a model: tokens and image references in, tokens and logprobs out.")
def inference(config: InferenceConfig) -> None:
    """Serves a model."""
    if config.backend == "vllm":
        from pointillist.inference.vllm.serve import serve
    else:
        from pointillist.inference.embedded.server import serve

    serve(config)


@_process("orchestrator", OrchestratorConfig, "Roll out, compare, pack and ship batches to the trainer.")
def orchestrator(config: OrchestratorConfig) -> None:
    """Rolls out and ships."""
    from pointillist.environments.loop import run_process
    from pointillist.orchestrator.orchestrator import orchestrate

    run_process(orchestrate(config))


@_process("env-worker", EnvWorkerConfig, "Run an environment for an orchestrator, which starts this by itself.")
def env_worker(config: EnvWorkerConfig) -> None:
    """Runs an environment."""
    from pointillist.environments.loop import run_process
    from pointillist.environments.workers.worker import serve

    run_process(serve(config))


@_process(
    "gateway", GatewayServerConfig, "Serve sessions over HTTP as OpenAI and Anthropic APIs, without a run around them."
)
def gateway(config: GatewayServerConfig) -> None:
    """Serves sessions."""
    from pointillist.sessions.gateway.standalone import serve

    asyncio.run(serve(config))


@_process("assets", AssetServerConfig, "Serve images and weights to machines that share no file system with the run.")
def assets(config: AssetServerConfig) -> None:
    """Serves what lies in the run's folder."""
    from pointillist.assets.server import serve

    serve(config)


@_process("trainer", TrainerConfig, "Train on the orchestrator's batches.")
def trainer(config: TrainerConfig) -> None:
    """Trains."""
    from pointillist.trainer.train import train

    train(config)


def _guarded(function: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Errors that Pointillist raises on purpose are one message, not a traceback."""
    try:
        return function(arguments)
    except PointillistError as error:
        click.echo(f"error: {error}", err=True)
    except OSError as error:  # a full disk, a folder that may not be written, a path that the system does not take
        if error.errno in (None, errno.EPIPE):  # click ends quietly where the reader of a pipe has gone
            raise
        click.echo(f"error: {_text(error)}", err=True)
    except KeyboardInterrupt:
        click.echo("stopped by SIGINT", err=True)
        return 130
    except BaseExceptionGroup as group:  # from a TaskGroup
        expected, unexpected = group.split((PointillistError, OSError))
        if unexpected is not None or expected is None:
            raise
        click.echo(f"error: {_text(_first(expected))}", err=True)
    return 1


def _text(error: BaseException) -> str:
    """An error in one line; of the system's, what happened to which file, whatever the encoding of its name."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if not isinstance(error.filename, str | bytes):
        return error.strerror
    return f"{error.strerror}: {os.fsencode(error.filename).decode(errors='backslashreplace')}"


def _first(error: BaseException | None) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert error is not None  # noqa: S101 - what was split off holds one
    return error


def main() -> None:
    """Entry point of the `pointillist` command."""
    cli(prog_name=_NAME)
