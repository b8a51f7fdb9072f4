"""Floor 3: one conversation with the policy, the environments that hold it, and what is recorded of it."""

from pointillist.rollouts.answers import Completion
from pointillist.rollouts.client import InferenceClient
from pointillist.rollouts.environment import Environment, Task, load_environment
from pointillist.rollouts.session import Sampling, Session, Turn
from pointillist.rollouts.trace import Branch

__all__ = [
    "Branch",
    "Completion",
    "Environment",
    "InferenceClient",
    "Sampling",
    "Session",
    "Task",
    "Turn",
    "load_environment",
]
