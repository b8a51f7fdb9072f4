"""A verifiers environment: several turns, a picture in the prompt and one from a tool; both must be named."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NAMES = list(COLOURS)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").point(lambda level: level).save(buffer, format="PNG")
    noise = Image.open(buffer).convert("RGB")
    noise.paste(COLOURS[colour], (0, 32, 96, 96))
    out = io.BytesIO()
    noise.save(out, format="PNG")
    return out.getvalue()


class ViewTools(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    async def view(self, name: str) -> Any:
        """Look at the picture of this name."""
        from mcp.server.mcpserver import Image as Picture

        return [f"picture {name}:", Picture(data=png(name), format="png")]


class LookData(vf.TaskData):
    first: str
    second: str


class LookTask(vf.Task[LookData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def names_both(self, task: LookData, trace: vf.Trace) -> float:
        return float(trace.last_reply.strip() == f"{task.first} {task.second}")


class LookConfig(vf.TasksetConfig):
    num_tasks: int = 4


class LookTaskset(vf.Taskset[LookTask, LookConfig]):
    def load(self) -> Iterator[LookTask]:
        for i in range(self.config.num_tasks):
            first, second = NAMES[i % 3], NAMES[(i + 1) % 3]
            url = "data:image/png;base64," + base64.b64encode(png(first)).decode()
            content = [
                vf.TextContentPart(text=f"View {second}, then name both colours."),
                vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url=url)),
            ]
            data = LookData(name=str(i), prompt=[vf.UserMessage(content=content)], first=first, second=second)
            yield LookTask(data, self.config.task)

    @classmethod
    def toolsets(cls, config: LookConfig) -> list[vf.Toolset]:
        return [ViewTools(vf.SharedToolsetConfig())]


__all__ = ["LookTaskset"]

if __name__ == "__main__":
    ViewTools.run()
