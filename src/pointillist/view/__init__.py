"""Looking at a run."""
