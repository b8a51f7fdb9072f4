"""The face that a session shows to agents that already exist: OpenAI's and Anthropic's chat APIs."""

from pointillist.sessions.gateway.server import Gateway

__all__ = ["Gateway"]
