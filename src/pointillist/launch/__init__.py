"""Starting a run, watching it, and saying what came of it."""
