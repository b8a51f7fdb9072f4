"""One conversation with the policy, recorded exactly.

A session takes new messages, stores their images, renders them to tokens, samples the policy, and keeps what was
read and what was sampled: token for token, with the sampler's logprobs and weight versions. Later turns extend that
record; sampled tokens are never tokenised again. Where the template can not be extended, the conversation is
rendered anew and a new branch begins; every branch is a training sample of its own.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pointillist.errors import RenderError
from pointillist.images.sources import Sources, normalize_images
from pointillist.images.store import StoredImage
from pointillist.render.raw import Message, PromptImage, RawRenderer, RenderedPrompt
from pointillist.rollouts.client import Completion, InferenceClient

# Turns of one session draw from seeds this far apart, so that they never meet those of a neighbouring rollout.
_SEEDS_PER_TURN: Final = 1_000_003


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a session samples."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of the policy."""

    message: Message
    """OpenAI chat shape: role, content, tool_calls and reasoning_content if there are any."""
    completion: Completion

    @property
    def text(self) -> str:
        """The answer's text."""
        return str(self.message["content"])


@dataclass(slots=True)
class Branch:
    """A token stream that was read and sampled from left to right. Lists run along `token_ids`."""

    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """The sampler's; 0 for tokens that were read."""
    weight_versions: list[int] = field(default_factory=list)
    """-1 for tokens that were read."""
    images: list[PromptImage] = field(default_factory=list)


class Session:
    """One conversation.

    Example:
        >>> turn = await session.generate([{"role": "user", "content": [
        ...     {"type": "image", "image": "chart.png"}, {"type": "text", "text": "What is the highest bar?"}]}])
        >>> turn.text
        'May'
    """

    def __init__(
        self,
        renderer: RawRenderer,
        sources: Sources,
        client: InferenceClient,
        sampling: Sampling,
        *,
        seq_len: int,
        seed: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Opens a conversation.

        Args:
            renderer: Of the policy's model.
            sources: Stores images.
            client: Of the inference server.
            sampling: For every turn.
            seq_len: Longest conversation, in tokens.
            seed: Of the first turn.
            tools: OpenAI tool specifications.
        """
        self._renderer = renderer
        self._sources = sources
        self._client = client
        self._sampling = sampling
        self._seq_len = seq_len
        self._seed = seed
        self._tools = tools
        self._images: list[StoredImage] = []
        self._prompt: RenderedPrompt | None = None
        self.messages: list[Message] = []
        """The conversation so far; images are `file://` URLs of the store."""
        self.turns: list[Turn] = []
        self.branches: list[Branch] = []
        """What to train on."""

    @property
    def temperature(self) -> float:
        """Of every turn."""
        return self._sampling.temperature

    async def generate(self, messages: Sequence[Message]) -> Turn:
        """Adds messages to the conversation and samples the policy's answer.

        Args:
            messages: What is new since the last turn: system, user and tool messages, images in any accepted shape.

        Raises:
            SourceError: An image is named in a way that is not accepted.
            ImageError: An image is not decodable or over a limit.
            RenderError: The messages do not fit the template, or the conversation has outgrown `seq_len`.
            InferenceError: The server refused or failed the request.
        """
        # Decoding and hashing, and fetching where that is allowed, would hold up every other rollout of the event loop.
        new, images = await asyncio.to_thread(self._store_images, list(messages))
        prompt = self._next_prompt(new, images)
        room = self._seq_len - len(prompt.token_ids)
        if room < 1:
            raise RenderError(f"conversation has {len(prompt.token_ids)} tokens, seq_len is {self._seq_len}")
        completion = await self._client.generate(
            prompt.token_ids,
            prompt.features(),
            self._sampling_params(room),
            self._seed + _SEEDS_PER_TURN * len(self.turns),
        )
        self._refuse_sampled_media(completion)
        self.messages += new
        self._images += images
        self._prompt = prompt
        self._record(prompt, completion)
        turn = Turn(_assistant_message(self._renderer.parse(completion.token_ids, prompt)), completion)
        self.messages.append(turn.message)
        self.turns.append(turn)
        return turn

    def _store_images(self, messages: list[Message]) -> tuple[list[Message], list[StoredImage]]:
        images: list[StoredImage] = []
        return [normalize_images(message, self._sources, images) for message in messages], images

    def _next_prompt(self, new: list[Message], images: list[StoredImage]) -> RenderedPrompt:
        everything = [*self._images, *images]
        if self._prompt is not None:
            completion = self.turns[-1].completion.token_ids
            bridged = self._renderer.bridge(self._prompt, completion, new, everything, tools=self._tools)
            if bridged is not None:
                return bridged
        return self._renderer.render([*self.messages, *new], everything, tools=self._tools)

    def _sampling_params(self, room: int) -> dict[str, Any]:
        return {
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": self._sampling.top_k,
            "max_tokens": min(self._sampling.max_tokens, room),
            "stop_token_ids": self._renderer.stop_token_ids,
            "logprobs": 0,
        }

    def _refuse_sampled_media(self, completion: Completion) -> None:
        forbidden = self._renderer.family.vision_token_ids
        for index, token in enumerate(completion.token_ids):
            if token in forbidden:
                raise RenderError(f"the policy sampled the vision token {token} at {index}: the server must mask it")

    def _record(self, prompt: RenderedPrompt, completion: Completion) -> None:
        branch = self.branches[-1] if self.branches else Branch()
        if prompt.token_ids[: len(branch.token_ids)] != branch.token_ids:
            branch = Branch()  # the template rewrote the past: what was read then and what is read now differ
        if not self.branches or branch is not self.branches[-1]:
            self.branches.append(branch)
        read = len(prompt.token_ids) - len(branch.token_ids)
        branch.token_ids = [*prompt.token_ids, *completion.token_ids]
        branch.sampled += [False] * read + [True] * len(completion.token_ids)
        branch.logprobs += [0.0] * read + completion.logprobs
        branch.weight_versions += [-1] * read + completion.weight_versions
        branch.images = list(prompt.images)


def _assistant_message(parsed: Any) -> Message:
    message: Message = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning_content:
        message["reasoning_content"] = parsed.reasoning_content
    calls = [call for call in parsed.tool_calls if call.status == "ok"]
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(calls)
        ]
    return message
