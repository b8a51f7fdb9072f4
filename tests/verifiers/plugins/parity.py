"""A verifiers environment: single turn, a picture; any even digit is right, so that a policy at chance has rewards."""

import base64
import io
from collections.abc import Iterator

import verifiers.v1 as vf
from PIL import Image


class ParityTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def even(self, task: vf.TaskData, trace: vf.Trace) -> float:
        return float(trace.last_reply.strip() in {"0", "2", "4", "6", "8"})


class ParityConfig(vf.TasksetConfig):
    num_tasks: int = 8


class ParityTaskset(vf.Taskset[ParityTask, ParityConfig]):
    def load(self) -> Iterator[ParityTask]:
        for i in range(self.config.num_tasks):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(buffer, format="PNG")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            content = [
                vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url=url)),
                vf.TextContentPart(text="What digit?"),
            ]
            yield ParityTask(vf.TaskData(name=str(i), prompt=[vf.UserMessage(content=content)]), self.config.task)


__all__ = ["ParityTaskset"]
