"""Rollouts become groups, groups advantages, advantages packed batches. One asyncio process, no torch."""
