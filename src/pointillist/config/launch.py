"""Config of the launcher: supervision of a run's processes, and the SLURM job that a run becomes."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pointillist.config.base import Config


class SupervisionConfig(Config):
    """What the launcher does about processes that die or hang."""

    max_restarts: int = Field(3, ge=0)
    """How often in a row an inference server or asset endpoint is restarted within the run; one that was healthy for
    `stable_seconds` begins to count anew. 0 ends the run with it."""

    max_resumes: int = Field(0, ge=0)
    """How often the launcher takes the run back to its last checkpoint by itself when trainer or orchestrator die; 0
    ends the run with them. One that ends by itself three times in a row after the same step ends the run at once. In a
    SLURM job of several nodes, how often the job is requeued for it."""

    backoff: float = Field(1.0, ge=0)
    """Seconds before the first restart; doubled at each further one in a row, up to a minute."""

    health_interval: float = Field(2.0, gt=0)
    """Seconds between questions for a server's health."""

    health_timeout: float = Field(120.0, gt=0)
    """Seconds without an answer after which a server that was healthy is killed, and so restarted."""

    stable_seconds: float = Field(300.0, ge=0)
    """Seconds of health after which earlier restarts are forgotten."""

    phase_timeout: float = Field(1800.0, gt=0)
    """Seconds for which a phase of trainer or orchestrator may stand still: nothing in it moves, or, where it waits for
    the other process, that one does not move either."""

    on_stall: Literal["kill", "report"] = "kill"
    """What happens then: the process is killed, and `max_resumes` decides, or it is only said which phase stands still
    since when."""

    stop_grace: float = Field(120.0, ge=0)
    """Seconds that the trainer has for a checkpoint when the run is stopped, before it is killed."""


class SlurmConfig(Config):
    """The SLURM job that runs everything: `pointillist rl @ rl.toml --slurm.job_name x`.

    With `inference_nodes` and `trainer_nodes` both 0 the job has one node, with everything on it.
    """

    job_name: str
    """Name of the job; setting it makes a run a job."""

    inference_nodes: int = Field(0, ge=0)
    """Nodes with inference servers (`num_servers` on each)."""

    trainer_nodes: int = Field(0, ge=0)
    """Nodes with trainer ranks (`trainer.num_workers` in all); the first also has the orchestrator."""

    partition: str | None = None
    """Partition, as sbatch takes it; so are the following."""

    account: str | None = None
    """Account that pays for the job."""

    qos: str | None = None
    """Quality of service."""

    time: str | None = None
    """Time limit, as sbatch takes it."""

    nodelist: str | None = None
    """Nodes that the job must have."""

    exclude: str | None = None
    """Nodes that the job must not have."""

    gpus_per_node: int | None = Field(None, gt=0)
    """GPUs of each node."""

    cpus_per_task: int | None = Field(None, gt=0)
    """Cores of each node's one task."""

    mem: str | None = None
    """Memory a node, as sbatch takes it."""

    options: dict[str, str | int | bool] = {}
    """Further sbatch options by name; true is a flag."""

    pre_run: list[str] = []
    """Shell commands before the run, such as `module load cuda`."""

    requeue: bool = True
    """Whether a preempted job goes back to the queue; it resumes from its last checkpoint."""

    grace: int = Field(60, ge=0)
    """Seconds before a time limit or preemption at which the processes get SIGTERM."""

    startup_timeout: float = Field(600.0, gt=0)
    """Seconds that nodes wait for each other."""

    template: Path | None = None
    """A Jinja template instead of Pointillist's own."""

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return max(1, self.inference_nodes + self.trainer_nodes)

    @field_validator("job_name", "partition", "account", "qos", "time", "nodelist", "exclude", "mem")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        """These become lines of a script."""
        if value is not None and (not value or any(character.isspace() for character in value)):
            raise ValueError(f"{value!r} should be one word without spaces")
        return value

    @field_validator("options")
    @classmethod
    def _words(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, setting in value.items():
            if not name.replace("-", "").isalnum() or any(character.isspace() for character in str(setting)):
                raise ValueError(f"{name} = {setting!r} should be the name of an sbatch option and one word")
        return value

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if bool(self.inference_nodes) != bool(self.trainer_nodes):
            raise ValueError(
                f"inference_nodes = {self.inference_nodes} and trainer_nodes = {self.trainer_nodes}: give both, or "
                "neither for one node with everything"
            )
        return self
