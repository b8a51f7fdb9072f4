"""Environments of the verifiers library (0.4) train as they are: their own tasks, rollouts and rewards.

    [env]
    id = "verifiers"
    args = { taskset = "my-environment", args = { split = "train" }, eval_args = { split = "eval" } }

verifiers runs each rollout; its chat client is pointed at our gateway, so the record that is trained on is a session's,
token for token. Only public surfaces of the unmodified library are used. Pictures become `file://` URLs of the run's
store before verifiers' trace sees them: those of a prompt when the task is handed over, those of tool results by the
harness in this module, or by an `@vf.intercept` hook where an environment brings a harness of its own.

This one module is also the plugin that verifiers loads by its name, in this process and in the ZMQ environment server:
it exports one harness and one `Env`.
"""

import asyncio
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import httpx
import mcp
import verifiers.v1 as vf
from pydantic import BaseModel
from verifiers.v1.serve import EnvClient, env_config_data

from pointillist.base.json_types import JsonObject
from pointillist.config.shared import CARRIER
from pointillist.environments import Task
from pointillist.errors import EnvironmentLoadError, Fault, PointillistError
from pointillist.images import ImageStore, Sources, normalize_images
from pointillist.runs.image_dir import writer_limits
from pointillist.sessions import Session

__all__ = ["OffloadingEnv", "PointillistHarness", "VerifiersEnvironment"]

_PLUGIN = "pointillist_verifiers"
# verifiers reads keys from the environment only, and keeps variables with API_KEY in their name from tool servers.
_KEY_VARIABLE = "POINTILLIST_GATEWAY_API_KEY"
_SERVED_VARIABLE = "POINTILLIST_VERIFIERS_SERVED"
_SERVER_SECONDS = 120.0
# argv: address, workers, config as JSON. The server ends with whoever holds its standard input.
_SERVE = """
import json, sys
from multiprocessing.connection import Connection
from verifiers.v1.serve import serve_env
serve_env(max_workers=int(sys.argv[2]), elastic=False, address=sys.argv[1],
          config_data=json.loads(sys.argv[3]), death_pipe=Connection(0))
"""


class _Block(Protocol):
    """A block of an MCP tool's result; which attributes it has besides its type depends on that."""

    type: str
    text: str
    mime_type: str
    data: str


class _Error(Protocol):
    type: str
    message: str


class _Agent(Protocol):
    trainable: bool


class _Trace(Protocol):
    agent: _Agent | None
    errors: Sequence[_Error]
    reward: float


class _Episode(Protocol):
    """What verifiers says of a rollout."""

    ok: bool
    errors: Sequence[_Error]
    traces: Sequence[_Trace]


class RolloutError(PointillistError):
    """verifiers could not finish a rollout."""

    retryable = True
    fault: Fault = "environment"


class VerifiersEnvironment:
    """Any installed verifiers environment as one of ours."""

    def __init__(
        self,
        taskset: str,
        args: Mapping[str, object] | None = None,
        *,
        eval_args: Mapping[str, object] | None = None,
        env: Mapping[str, object] | None = None,
        harness: Mapping[str, object] | None = None,
        max_tasks: int = 100_000,
        max_eval_tasks: int = 200,
        server_workers: int = 0,
    ) -> None:
        """Loads the tasks.

        Args:
            taskset: Its id: the name of an installed package or module.
            args: Fields of the taskset's config.
            eval_args: Those that differ for held-out tasks; verifiers knows no split, so without them there are none.
            env: Further fields of the environment's config: its `id`, timeouts, roles.
            harness: Config of the harness, such as `{id = "bash"}`. By default the one in this module: chat and tools
                in this process, without network. `{}` takes the environment's own.
            max_tasks: Tasks to take; tasksets may be endless.
            max_eval_tasks: Held-out tasks to take.
            server_workers: Processes of verifiers' ZMQ environment server; 0 runs rollouts in this process.

        Raises:
            EnvironmentLoadError: verifiers cannot load the environment.
        """
        chosen = {"id": _PLUGIN} if harness is None else dict(harness)
        try:
            self._config = _config(taskset, dict(args or {}), dict(env or {}), chosen)
            self._tasks = _tasks(self._config, "train", max_tasks)
            if eval_args is not None:
                held_out = _config(taskset, {**(args or {}), **eval_args}, dict(env or {}), chosen)
                self._tasks |= _tasks(held_out, "eval", max_eval_tasks)
        except Exception as error:
            raise EnvironmentLoadError(f"verifiers environment {taskset!r}: {type(error).__name__}: {error}") from error
        self._server_workers = server_workers
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._handle: Any = None

    def train_tasks(self) -> Sequence[Task]:
        """The taskset's rows."""
        return [Task(name) for name in self._tasks if name.startswith("train-")]

    def eval_tasks(self) -> Sequence[Task]:
        """Rows of the taskset with `eval_args`."""
        return [Task(name) for name in self._tasks if name.startswith("eval-")]

    async def rollout(self, task: Task, session: Session) -> float:
        """The environment's own reward for its own rollout.

        Raises:
            RolloutError: It could not be finished, or not be scored.
        """
        handle = await self._opened(session.api_key)
        # One address for all sessions: verifiers keeps a client, and a connection, for each it has seen.
        client = vf.EvalClientConfig(base_url=f"{session.gateway_url}/v1", api_key_var=_KEY_VARIABLE)
        sampling = vf.SamplingConfig(pointillist_session=session.key)
        given = await asyncio.to_thread(_offload_prompt, self._tasks[task.id])
        if self._server_workers:
            episode = await handle.run(client, "policy", sampling, given.data.model_dump(mode="json"))
        else:
            (slot,) = handle.slots(given)
            context = vf.ModelContext(model="policy", client=client, sampling=sampling)
            episode = await handle.run_slot(slot, context)
        return _reward(episode)

    async def aclose(self) -> None:
        """Ends tool servers and the environment server."""
        await self._stack.aclose()

    async def _opened(self, api_key: str) -> Any:
        """What runs rollouts; made at the first one, when the gateway and its key are there."""
        async with self._opening:
            if self._handle is None:
                os.environ[_KEY_VARIABLE] = api_key
                self._handle = await (self._served() if self._server_workers else self._in_process())
        return self._handle

    async def _in_process(self) -> Any:
        base = vf.environment_class(self._config.taskset.id, self._config.id)
        environment = _offloading(base)(self._config)
        await self._stack.enter_async_context(environment.serving())
        return environment

    async def _served(self) -> EnvClient:
        config = env_config_data(self._config)
        environ = {**os.environ, _SERVED_VARIABLE: json.dumps([config["taskset"]["id"], config["id"]])}
        config["id"] = _PLUGIN
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vf-"))
        address = f"ipc://{folder}/env"
        command = [sys.executable, "-c", _SERVE, address, str(self._server_workers), json.dumps(config)]
        process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE)  # noqa: ASYNC220 - returns at once
        self._stack.push_async_callback(asyncio.to_thread, process.wait, 30)
        self._stack.callback(process.terminate)
        client = EnvClient(address)
        self._stack.push_async_callback(client.close)
        starting = asyncio.ensure_future(client.wait_for_server_startup(timeout=_SERVER_SECONDS, interval=0.5))
        ending = asyncio.ensure_future(asyncio.to_thread(process.wait))
        await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            raise EnvironmentLoadError(f"verifiers' environment server ended with exit code {process.returncode}")
        await starting
        return client


class _HarnessConfig(vf.HarnessConfig):
    """Settings of the harness."""

    max_turns: int = 64
    """Model calls of one rollout."""


class PointillistHarness(vf.Harness[_HarnessConfig]):
    """A chat and tool loop in this process; pictures are stored before they are sent."""

    APPENDS_SYSTEM_PROMPT: ClassVar[bool] = True
    SUPPORTS_MCP: ClassVar[bool] = True
    SUPPORTS_TOOL_INTERCEPTION: ClassVar[bool] = True
    SUPPORTS_RESUME: ClassVar[bool] = True
    EXECUTES_CODE: ClassVar[bool] = False
    NEEDS_CONTAINER: ClassVar[bool] = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
        tool_interception_url: str | None = None,
    ) -> vf.ProgramResult:
        """Holds one conversation; verifiers calls this."""
        system, prompt = self.resolve_prompt(data)
        messages: list[JsonObject] = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else map(_wire, prompt or [])
        async with AsyncExitStack() as stack:
            headers = {"Authorization": f"Bearer {secret}"}
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=None, headers=headers, trust_env=False))  # noqa: S113 - the rollout has a limit
            tools = await _Tools.connect(stack, mcp_urls, http, tool_interception_url)
            for _ in range(self.config.max_turns):
                offered = {"tools": tools.specifications} if tools.specifications else {}
                body = {"model": ctx.model, "messages": messages, **offered}
                answer = await http.post(f"{endpoint}/chat/completions", json=body)
                if trace.stop_condition is not None:  # a limit or a stop refused the turn: a normal end
                    break
                if answer.status_code != httpx.codes.OK:
                    raise vf.HarnessError(f"model call failed: {answer.status_code} {answer.text[:500]}")
                message = answer.json()["choices"][0]["message"]
                messages.append({key: value for key, value in message.items() if value is not None or key == "content"})
                if not message.get("tool_calls"):
                    break
                results = [await tools.call(call) for call in message["tool_calls"]]
                messages += await asyncio.to_thread(_offload, results)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


class _Tools:
    """The tools of a rollout, on MCP servers."""

    def __init__(self, http: httpx.AsyncClient, gate: str | None) -> None:
        self._http = http
        self._gate = gate
        self._owners: dict[str, tuple[Any, str]] = {}
        self.specifications: list[JsonObject] = []

    @classmethod
    async def connect(
        cls, stack: AsyncExitStack, urls: Mapping[str, str], http: httpx.AsyncClient, gate: str | None
    ) -> "_Tools":
        """Asks all servers for their tools."""
        tools = cls(http, gate)
        for server, url in urls.items():
            client = await stack.enter_async_context(mcp.Client(url))
            for tool in (await client.list_tools()).tools:
                name = f"{server}_{tool.name}" if server else tool.name
                tools._owners[name] = (client, tool.name)
                function = {"name": name, "description": tool.description or "", "parameters": tool.input_schema}
                tools.specifications.append({"type": "function", "function": function})
        return tools

    async def call(self, call: JsonObject) -> JsonObject:
        """The message with the result of one call; a call that cannot be made has that for a result."""
        function = call["function"]
        result = {"role": "tool", "tool_call_id": call["id"], "name": function["name"]}
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except ValueError as error:
            return {**result, "content": f"arguments are not JSON: {error}"}
        if self._gate is not None:
            asked = {"tool_call_id": call["id"], "name": function["name"], "arguments": arguments}
            verdict = (await self._http.post(self._gate, json=asked)).json()
            if verdict.get("action") != "allow":
                return dict(verdict.get("message") or {**result, "content": str(verdict)})
        if function["name"] not in self._owners:
            return {**result, "content": f"no such tool: {function['name']}"}
        client, name = self._owners[function["name"]]
        return {**result, "content": _content((await client.call_tool(name, arguments)).content)}


def _offloading(base: type[vf.Env]) -> type[vf.Env]:
    """The environment's class, whose tasks bring a hook that stores pictures of whatever harness runs them."""

    class Offloading(base):
        async def run(self, task: vf.Task, agents: vf.Agents) -> None:
            hooked = copy.copy(await asyncio.to_thread(_offload_prompt, task))
            hooked.__class__ = _hooked(type(task))  # type: ignore[arg-type]
            await super().run(hooked, agents)

    Offloading.__name__ = f"Offloading{base.__name__}"
    return Offloading


@cache
def _hooked(base: type[vf.Task]) -> type[vf.Task]:
    """The task's class with one hook; verifiers looks for hooks there."""

    class Hooked(base):
        @vf.intercept(priority=-1000)  # after the environment's own
        async def store_pictures(self, request: vf.Request) -> vf.Request | None:
            messages = await asyncio.to_thread(_offload_typed, request.messages)
            return None if messages == request.messages else request.model_copy(update={"messages": messages})

    Hooked.__name__, Hooked.__qualname__, Hooked.__module__ = base.__name__, base.__qualname__, base.__module__
    return Hooked


def _served_class() -> type[vf.Env]:
    """In the environment server: the class of the one environment that it serves."""
    taskset, ident = json.loads(os.environ[_SERVED_VARIABLE])
    return _offloading(vf.environment_class(taskset, ident))


OffloadingEnv: type[vf.Env] | None = _served_class() if _SERVED_VARIABLE in os.environ else None


def _offload_prompt(task: vf.Task) -> vf.Task:
    prompt = task.data.prompt
    return task if not isinstance(prompt, list) else task.with_data(prompt=_offload_typed(prompt))


def _offload_typed(messages: list[Any]) -> list[Any]:
    stored = _offload([message.model_dump(include={"role", "content"}) for message in messages])
    return [
        type(message).model_validate({**message.model_dump(), "content": new["content"]})
        if isinstance(message.content, list)
        else message
        for message, new in zip(messages, stored, strict=True)
    ]


def _offload(messages: list[JsonObject]) -> list[JsonObject]:
    """Messages whose pictures are in the run's store."""
    return list(normalize_images(messages, _sources(os.environ[CARRIER]), []))


@cache
def _sources(root: str) -> Sources:
    return Sources(ImageStore(Path(root), writer_limits(os.environ)))


def _config(taskset: str, args: JsonObject, env: JsonObject, harness: JsonObject) -> vf.EnvConfig:
    """Verifiers' config, every role of which runs on this machine, in the harness."""
    base = vf.env_config_type(taskset, env.get("id", ""))
    roles = [name for name, field in base.model_fields.items() if isinstance(field.default, vf.AgentConfig)]
    seat = {"runtime": {"type": "subprocess"}, **({"harness": harness} if harness else {})}
    raw = {**env, "taskset": {"id": taskset, **args}, **{role: {**seat, **env.get(role, {})} for role in roles}}
    return vf.resolve_env_config(raw)


def _tasks(config: vf.EnvConfig, split: str, count: int) -> dict[str, vf.Task]:
    return {f"{split}-{index}": task for index, task in enumerate(islice(iter(vf.load_taskset(config.taskset)), count))}


def _reward(episode: _Episode) -> float:
    traces = [trace for trace in episode.traces if trace.agent is None or trace.agent.trainable]
    if not episode.ok or not traces:  # without a score verifiers' reward is 0
        errors = [*episode.errors, *(error for trace in traces for error in trace.errors)]
        raise RolloutError("; ".join(f"{error.type}: {error.message}" for error in errors) or "no trace to train on")
    return float(sum(trace.reward for trace in traces) / len(traces))


def _wire(message: BaseModel) -> JsonObject:
    """OpenAI's shape of a message of verifiers."""
    shaped: JsonObject = message.model_dump(exclude_none=True, exclude={"provider_state"})
    if shaped.get("tool_calls"):
        shaped["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in shaped["tool_calls"]
        ]
    return shaped


def _content(blocks: Sequence[_Block]) -> str | list[JsonObject]:
    """OpenAI's shape of an MCP tool's result."""
    if all(block.type == "text" for block in blocks):
        return "\n".join(block.text for block in blocks)
    return [_part(block) for block in blocks]


def _part(block: _Block) -> JsonObject:
    if block.type == "image":
        return {"type": "image_url", "image_url": {"url": f"data:{block.mime_type};base64,{block.data}"}}
    return {"type": "text", "text": getattr(block, "text", str(block))}
