"""The launcher's console: what `pointillist rl` says on the terminal, or in the log of a job."""

from rich.console import Console

console = Console()


def say(text: str) -> None:
    """Prints a line as it is; rich's markup holds in it."""
    console.print(text, highlight=False, soft_wrap=True)
