"""The learning curve of a run as a picture."""

from pathlib import Path

from pointillist.base.json_types import JsonObject


def draw_curve(orchestrator: list[JsonObject], evals: list[JsonObject], path: Path, *, title: str) -> None:
    """Draws training reward and held-out accuracy over steps.

    Args:
        orchestrator: Records of `metrics/orchestrator.jsonl`.
        evals: Records of `metrics/eval.jsonl`.
        path: PNG to write.
        title: Above the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    training = [record["reward/mean"] for record in orchestrator]
    held_out = [record["eval/accuracy"] for record in evals]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    axes.plot(
        [record["step"] for record in orchestrator],
        training,
        color="#9ab8d8",
        linewidth=1,
        label="training reward (sampled)",
    )
    axes.plot(
        [record["step"] for record in evals],
        held_out,
        color="#c2410c",
        linewidth=2,
        marker="o",
        label="held-out accuracy (greedy)",
    )
    axes.set(xlabel="optimiser step", ylabel="mean reward", title=title)
    values = [*training, *held_out]
    if values and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
