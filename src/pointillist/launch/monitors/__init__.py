"""Where a run can be watched from outside: Weights & Biases and TensorBoard, fed by the launcher from the run's files.

The processes know nothing of it: they write `metrics/*.jsonl` and `rollouts/`, and a thread of the launcher reads what
is new and hands it to every monitor. Neither library is imported unless the config asks for it.
"""

from pointillist.launch.monitors.interface import Monitor, Row, RowImage
from pointillist.launch.monitors.watching import Watching, check_monitors

__all__ = ["Monitor", "Row", "RowImage", "Watching", "check_monitors"]
