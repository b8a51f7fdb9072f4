"""Config of the environment side: sessions, gateway, environments, and the orchestrator over them."""

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pointillist.config.base import Config
from pointillist.config.sampling import MAX_CHOICES, check_sampling_number
from pointillist.config.shared import ModelConfig, ProcessConfig, ServerConfig, TransportConfig


class EnvConfig(Config):
    """Which environment, and with which arguments."""

    id: str
    """Name of an entry point in group `pointillist.environments`, or an import path `module:Class`."""

    args: dict[str, object] = {}
    """Keyword arguments of the environment's class."""

    blank_images: bool = False
    """Control run: every image is replaced by a grey one of the same size before it is stored."""


class SamplingConfig(Config):
    """How training rollouts are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits, in the sampler and in the trainer alike; from 0.01 to 100."""

    top_p: float = 1.0
    """Nucleus, above 0 and at most 1; below 1 the trainer's distribution is wider than the sampler's."""

    top_k: int = -1
    """The k likeliest tokens; -1 is all."""

    max_tokens: int = 128
    """Longest completion of one turn, in tokens."""

    @field_validator("temperature", "top_p", "top_k", "max_tokens")
    @classmethod
    def _in_bounds(cls, value: float, info: ValidationInfo) -> float:
        check_sampling_number(str(info.field_name), value)
        return value


class AdvantageConfig(Config):
    """Group-relative advantages: reward minus the group's mean."""

    normalize_std: bool = True
    """Whether to divide by the group's standard deviation as well (GRPO); False is the mean baseline alone."""


class EvalConfig(Config):
    """Evaluation on held-out tasks, greedy, through the same renderer and wire as training."""

    interval: int = Field(50, gt=0)
    """Steps between evaluations; one is always made before the first step and one after the last."""

    max_tasks: int | None = Field(None, gt=0)
    """Held-out tasks to use; all by default."""


class ClientConfig(Config):
    """How the orchestrator reaches the inference servers."""

    base_url: list[str] = Field(["http://127.0.0.1:8000"], min_length=1)
    """Address of each server; the launcher sets it for the servers that it starts."""

    api_key_var: str | None = None
    """Name of the environment variable that holds the API key; the launcher sets it as the server's."""

    wire: Literal["mmraw", "content_parts"] = "mmraw"
    """How images are named to the server. `content_parts` is for a vLLM without Pointillist's plugin, which reads the
    files itself (`--allowed-local-media-path`): the lesser mode, in which pixels are the engine's own."""

    timeout: float = Field(600.0, gt=0)
    """Seconds that one request may take."""

    unreachable_timeout: float = Field(300.0, ge=0)
    """Seconds for which a request is tried again, at every server, while none can be reached: one that died is
    restarted meanwhile."""

    startup_timeout: float = Field(600.0, gt=0)
    """Seconds that the servers may take to become healthy."""

    @field_validator("base_url", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) and not value.startswith("[") else value


class GatewayConfig(ServerConfig):
    """The gateway: the face that sessions show to agents, an OpenAI and Anthropic API a session."""

    max_request_bytes: int = Field(256 * 1024 * 1024, gt=0)
    """Longest request body: a conversation with all its pictures as base64."""

    inflight_bytes: int = Field(128 * 1024 * 1024, gt=0)
    """Bytes of bodies that are held until they are turned into references, together with one body; what comes beyond
    it waits to be read."""

    max_choices: int = Field(128, gt=0, le=MAX_CHOICES)
    """Answers that one request may ask for (`n`)."""

    max_sessions: int = Field(10_000, gt=0)
    """Sessions that are open at once in a gateway by itself."""

    max_session_requests: int = Field(128, gt=0)
    """Requests of one session that are served at once; further ones are answered 429, so that one agent cannot take
    what the others need."""


class PolicyConfig(ProcessConfig):
    """What every process that holds sessions needs: the model, the store, and where the policy is served."""

    model: ModelConfig
    seq_len: int = Field(2048, gt=0)
    """Longest sample and length of a packed row, in tokens."""

    client: ClientConfig = ClientConfig()
    gateway: GatewayConfig = GatewayConfig()

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> Self:
        self.gateway.require_key("gateway")
        return self


class GatewayServerConfig(PolicyConfig):
    """A gateway by itself: `pointillist gateway @ gateway.toml`. Sessions are opened and closed over HTTP."""

    sampling: SamplingConfig = SamplingConfig()
    """How requests are sampled that ask for nothing else."""


class RolloutsConfig(PolicyConfig):
    """What a process needs that runs an environment."""

    env: EnvConfig
    rollout_timeout: float = Field(600.0, gt=0)
    """Seconds that one rollout may take."""

    max_concurrent: int = Field(256, gt=0, le=65_536)
    """Rollouts in flight."""


class EnvWorkerConfig(RolloutsConfig):
    """A process that runs an environment for the orchestrator: `pointillist env-worker @ env_worker.toml`."""

    address: str
    """Where the orchestrator waits for workers, `tcp://host:port`; the orchestrator sets it."""


class WorkersConfig(Config):
    """Environment workers: processes of their own, so that an environment that dies or hangs costs nothing else."""

    count: int = Field(0, ge=0)
    """Processes to start; 0 runs the environment in the orchestrator."""

    heartbeat_timeout: float = Field(30.0, gt=0)
    """Seconds without a sign of life after which a worker is replaced and its rollouts are tried again."""

    startup_timeout: float = Field(120.0, gt=0)
    """Seconds that a worker may take to load its environment."""


class OrchestratorConfig(RolloutsConfig):
    """The orchestrator: `pointillist orchestrator @ orchestrator.toml`."""

    max_steps: int = Field(100, gt=0)
    """Optimiser steps."""

    seed: int = 0
    """Order of tasks and sampling."""

    batch_size: int = Field(128, gt=0)
    """Rollouts that a step is made from."""

    group_size: int = Field(8, gt=1)
    """Rollouts of one task, compared with each other."""

    max_retries: int = Field(2, ge=0)
    """How often a failed rollout is tried again before it is dropped."""

    failed_reward: float = Field(0.0, ge=-1e9, le=1e9)
    """Reward of a training rollout that failed by what the policy did: its conversation has outgrown `seq_len` after at
    least one answer. Without one, only those that stay short would be compared."""

    solved_reward: float = Field(1.0, allow_inf_nan=False)
    """Reward of a task that is solved. If all rollouts have at least this, round after round, there is nothing left to
    learn and the run ends, as a success."""

    workers: WorkersConfig = WorkersConfig()
    transport: TransportConfig = TransportConfig()
    max_off_policy_steps: int = Field(0, ge=0)
    """How many weight versions a rollout may be older than the step it trains; 0 is strictly on policy."""

    num_train_workers: int = Field(1, gt=0)
    """Data-parallel trainer ranks to pack for; the launcher sets it."""

    resume_step: int | None = Field(None, ge=1)
    """Step of the checkpoint to continue from; the launcher sets it."""

    sampling: SamplingConfig = SamplingConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _a_port_for_each_worker(self) -> Self:
        if self.workers.count > 1 and self.gateway.port:
            raise ValueError(
                f"gateway.port = {self.gateway.port}, but each of workers.count = {self.workers.count} processes has a "
                "gateway of its own: set gateway.port = 0"
            )
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> "OrchestratorConfig":
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size = {self.batch_size} is not a multiple of group_size = {self.group_size}")
        return self
