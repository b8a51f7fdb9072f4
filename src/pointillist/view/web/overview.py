"""The overview: what each run is and how it went, and their metrics over each other."""

from collections.abc import Sequence
from typing import Final

from pointillist.view.metrics import Column
from pointillist.view.queries import outcomes
from pointillist.view.run import ViewedRun
from pointillist.view.web.charts import Chart, Line, line_chart, number

# key, component, metric, title, what it means
_METRICS: Final = (
    ("reward", "orchestrator", "reward/mean", "Training reward", "mean reward of a step's rollouts, sampled"),
    ("accuracy", "eval", "eval/accuracy", "Held-out accuracy", "mean reward on held-out tasks, failed ones 0; greedy"),
    ("failed", "eval", "eval/failed", "Failed held-out tasks", "held-out tasks whose rollout failed"),
    ("loss", "trainer", "loss", "Loss", "policy-gradient loss of a step"),
    ("entropy", "trainer", "entropy", "Entropy", "mean entropy of the policy at trained tokens, in nats"),
    ("mismatch", "trainer", "mismatch/mean_abs", "Mismatch", "trainer's logprobs less the sampler's, mean absolute"),
    ("staleness", "trainer", "off_policy/mean", "Staleness", "mean age of a trained token, in weight versions"),
    ("flat", "orchestrator", "groups/dropped_zero_variance", "Groups without variance", "groups that taught nothing"),
    ("dropped", "orchestrator", "errors/dropped", "Dropped rollouts", "rollouts that failed and are in no group"),
    ("counted", "orchestrator", "errors/by_policy", "Failed by the policy", "rollouts that failed, and count as that"),
    ("images", "trainer", "mm/images_total", "Images", "image spans that were trained on, a step"),
    ("hits", "trainer", "mm/hit_rate", "Image cache hits", "part of the image spans that was in the trainer's cache"),
    ("missing", "trainer", "mm/images_missing", "Missing images", "image spans whose file was not there"),
    ("quarantined", "trainer", "mm/samples_quarantined", "Quarantined samples", "samples with a corrupt image"),
    ("bytes", "orchestrator", "mm/bytes_per_image", "Bytes an image", "bytes that an image takes in a batch"),
)  # fmt: skip


def metric_charts(runs: Sequence[ViewedRun]) -> list[Chart]:
    """A chart a metric with a line a run; metrics that no run has recorded are left out."""
    charts = []
    for key, component, metric, title, about in _METRICS:
        lines = [_line(run.name, run.column(component, metric)) for run in runs]
        charts.append(line_chart(key, title, about, lines))
    return [chart for chart in charts if chart is not None]


def phase_charts(runs: Sequence[ViewedRun]) -> list[Chart]:
    """Two charts a run: where the trainer's and the orchestrator's seconds go."""
    charts = []
    for index, run in enumerate(runs):
        for component in ("trainer", "orchestrator"):
            columns = {
                name.removeprefix("time/"): column
                for name, column in run.columns(component).items()
                if name.startswith("time/") and name != "time/checkpoint"
            }
            title = f"Phase times: {component}" + (f" of {run.name}" if len(runs) > 1 else "")
            lines = [_line(name, column) for name, column in columns.items()]
            charts.append(line_chart(f"time-{component}-{index}", title, f"seconds a step, {component}", lines))
    return [chart for chart in charts if chart is not None]


def summary(run: ViewedRun) -> list[tuple[str, str]]:
    """What a run is and how far it is, in words and numbers."""
    settings = {name: str(value) for name, value in run.settings().items() if value is not None}
    accuracy = run.column("eval", "eval/accuracy")
    trained, planned = run.trained_steps, settings.pop("steps", "")
    counts = outcomes(run)
    return [
        *settings.items(),
        ("steps trained", f"{trained} of {planned}" if planned else str(trained)),
        ("newest reward", number(run.column("orchestrator", "reward/mean").last)),
        (
            "held-out accuracy",
            f"{number(accuracy.values[0])} at first, {number(accuracy.last)} now" if accuracy.values else "",
        ),
        ("held-out tasks that failed", _last_failed(run)),
        ("solved", f"at step {trained}" if run.column("orchestrator", "solved").last else ""),
        ("rollouts", f"{sum(counts.values()):,}"),
        *((f"rollouts: {_WORDS.get(name, name)}", f"{count:,}") for name, count in counts.items()),
    ]


def _last_failed(run: ViewedRun) -> str:
    """Of the newest evaluation, by kind; a kind that it does not name has not occurred in it."""
    newest = run.column("eval", "step").last
    return ", ".join(
        f"{column.values[-1]:.0f} {name.removeprefix('eval/failed/')}"
        for name, column in run.columns("eval").items()
        if name.startswith("eval/failed/") and column.steps[-1] == newest
    )


def side_by_side(runs: Sequence[ViewedRun]) -> list[tuple[str, list[str]]]:
    """The summaries of all runs as rows with a cell a run."""
    summaries: list[dict[str, str]] = [dict(summary(run)) for run in runs]
    names = list(dict.fromkeys(name for each in summaries for name in each))
    return [(name, [each.get(name, "") for each in summaries]) for name in names]


_WORDS: Final = {"sent": "sent to the trainer", "zero_variance": "group without variance"}


def _line(label: str, column: Column) -> Line:
    return Line(label, column.steps, column.values)
