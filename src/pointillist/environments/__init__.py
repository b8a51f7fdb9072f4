"""Environments: the protocol, the executor that runs their rollouts, workers, and the environments in the box."""

from pointillist.environments.protocol import Environment, Task, load_environment

__all__ = ["Environment", "Task", "load_environment"]
