"""Floor 5: starting a run, watching it, and saying what came of it."""
