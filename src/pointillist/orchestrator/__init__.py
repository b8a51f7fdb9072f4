"""Floor 4: rollouts become groups, groups advantages, advantages packed batches. One asyncio process, no torch."""
