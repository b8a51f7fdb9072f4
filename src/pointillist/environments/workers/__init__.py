"""Environments in processes of their own: one that dies, hangs or leaks costs its rollouts of the moment."""

from pointillist.environments.workers.pool import WorkerPool

__all__ = ["WorkerPool"]
