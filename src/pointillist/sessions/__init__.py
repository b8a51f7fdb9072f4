"""A conversation with the policy: the session that holds it, what is recorded of it, and the client of the servers."""

from pointillist.sessions.answers import Completion
from pointillist.sessions.client import InferenceClient
from pointillist.sessions.session import Sampling, Session, Turn
from pointillist.sessions.trace import Branch

__all__ = ["Branch", "Completion", "InferenceClient", "Sampling", "Session", "Turn"]
