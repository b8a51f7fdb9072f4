"""A verifiers environment: single turn, text, exact match."""

from collections.abc import Iterator

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def exact_match(self, task: SumData, trace: vf.Trace) -> float:
        return float(trace.last_reply.strip() == task.answer)


class SumConfig(vf.TasksetConfig):
    split: str = "train"
    num_tasks: int = 8


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self) -> Iterator[SumTask]:
        for i in range(self.config.num_tasks):
            first, second = i + (0 if self.config.split == "train" else 100), 2 * i + 1
            data = SumData(
                name=f"{self.config.split}-{i}", system_prompt="Reply with the number only.",
                prompt=f"What is {first} + {second}?", answer=str(first + second),
            )  # fmt: skip
            yield SumTask(data, self.config.task)


__all__ = ["SumTaskset"]
