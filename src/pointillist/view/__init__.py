"""Floor 5: looking at a run."""
