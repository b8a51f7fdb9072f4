"""One rollout's dealings with the policy, recorded exactly.

A session stores the images of messages, renders them to tokens, samples the policy, and keeps what was read and what
was sampled: token for token, with the sampler's logprobs and weight versions. Later turns extend that record; sampled
tokens are never tokenised again. There are two ways in, to the same record:

- `generate` adds messages to the session's own conversation: for environments written for Pointillist;
- `chat` takes a whole conversation each time, as chat APIs do: for the gateway and every agent behind it. The
  conversation is recognised in the record; an edited one, or a new one beside it, becomes a branch of its own.

Where the template can not be extended, the conversation is rendered anew and a new branch begins. Every branch is a
training sample.
"""

import asyncio
import dataclasses
import json
import math
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Final

import msgspec

from pointillist.base.pools import READING, WRITING
from pointillist.errors import ContextLengthError, HistoryError, RenderError
from pointillist.images.sources import Sources, normalize_images
from pointillist.images.store import StoredImage
from pointillist.render.chat_template import ParsedResponse, ParsedToolCall
from pointillist.render.raw import Message, RawRenderer, RenderedPrompt
from pointillist.sessions.answers import Completion
from pointillist.sessions.client import InferenceClient
from pointillist.sessions.history import call_key, canonical, check_tool_results, first_key, next_key
from pointillist.sessions.trace import Branch, Node, Trace

# Turns of one session draw from seeds this far apart, so that they never meet those of a neighbouring rollout.
_SEEDS_PER_TURN: Final = 1_000_003
_LONG_CHARACTERS: Final = 50_000
"""Text of a conversation from which on it is rendered in a thread: about 10 ms. Below it a thread would only spread the
requests of a group, which are sent as one if they are made within a moment."""
_MESSAGE_CHARACTERS: Final = 100
"""What a message costs beside its text, in characters."""
_IMAGE_CHARACTERS: Final = 1000
"""What an image costs, in characters."""
_LONG_READ: Final = 100_000
"""Tokens that a turn's answers have read together, from which on they are recorded in a thread."""
_LONG_TOKEN: Final = 32
"""Characters: a text of longer tokens on average (white space, say) is nothing that an agent has a use for."""
_MORE_CHARACTERS: Final = 16_384
"""What the text of a conversation may have besides, however short `seq_len` is."""
_LONG_ANSWER: Final = 2_000
"""Tokens of a turn's answers from which on they are read in a thread."""
Tools = Sequence[Mapping[str, object]]
"""OpenAI tool specifications."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a session samples."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages whose images are stored."""

    messages: list[Message]
    """Canonical; images are `file://` URLs of the store."""
    images: list[StoredImage]
    """In the order in which they stand in `messages`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of the policy."""

    message: Message
    """OpenAI chat shape: role, content, tool_calls and reasoning_content if there are any."""
    completion: Completion
    prompt_tokens: int
    """Tokens that were read, images expanded."""
    stopped_by: str | None = None
    """The text that ended the answer, of those that the caller named."""

    @property
    def text(self) -> str:
        """The answer's text."""
        return str(self.message["content"])


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A conversation that is ready to be answered."""

    parent: Node | None
    """The turn that it continues."""
    key: bytes
    """Of the conversation (`next_key`)."""
    prompt: RenderedPrompt


class Session:
    """One rollout's conversations.

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
        max_images: int = 256,
        affinity: str = "",
        tools: Tools | None = None,
    ) -> None:
        """Opens a session.

        Args:
            renderer: Of the policy's model.
            sources: Stores images.
            client: Of the inference server.
            sampling: For every turn that asks for nothing else.
            seq_len: Longest conversation, in tokens.
            seed: Of the first turn.
            max_images: Images that one request of an agent may bring.
            affinity: Sessions with the same word are served by the same server; by default each has its own.
            tools: What the policy may call in the session's own conversation; an environment may set it.
        """
        self._renderer = renderer
        self._sources = sources
        self._client_sources = sources.for_clients()
        self._client = client
        self._seq_len = seq_len
        self._seed = seed
        self._affinity = affinity or f"{seed}"
        self._requests = 0
        self._own = Conversation([], [])
        self._trace = Trace()
        self._issued_calls: dict[str, str] = {}
        self._recording = threading.Lock()
        """Held while the record is written or read as a whole, which may be in a thread."""
        self.sampling = sampling
        self.max_images = max_images
        self.tools = tools
        self.gateway_url = ""
        """The gateway that serves this session."""
        self.key = ""
        """What the gateway knows this session by."""
        self.api_key = "none"
        """What the gateway asks for."""
        self.outgrown = False
        """Whether the last conversation that was to be answered had no room left in `seq_len`."""
        self.turns: list[Turn] = []
        """All answers, of all conversations, in the order in which they were sampled."""

    @property
    def messages(self) -> list[Message]:
        """The session's own conversation so far; images are `file://` URLs of the store."""
        return self._own.messages

    @property
    def base_url(self) -> str:
        """Where the gateway serves this session: the base URL of an OpenAI client."""
        return f"{self.gateway_url}/s/{self.key}/v1"

    @property
    def anthropic_base_url(self) -> str:
        """Where the gateway serves this session: the base URL of an Anthropic client."""
        return f"{self.gateway_url}/s/{self.key}"

    @property
    def branches(self) -> list[Branch]:
        """What to train on."""
        with self._recording:
            return self._trace.branches()

    async def generate(self, messages: Sequence[Mapping[str, object]]) -> Turn:
        """Adds messages to the session's own conversation and samples the policy's answer.

        Args:
            messages: What is new since the last turn: system, user and tool messages, images in any accepted shape.

        Raises:
            SourceError: An image is named in a way that is not accepted.
            ImageError: An image is not decodable or over a limit.
            RenderError: The messages do not fit the template, or the conversation has outgrown `seq_len`.
            InferenceError: The server refused or failed the request.
        """
        own = self._own
        new = await self.read(messages, first=len(own.messages))
        conversation = Conversation([*own.messages, *new.messages], [*own.images, *new.images])
        (turn,) = await self._sample(conversation, self.tools, self.sampling, 1, (), from_client=False)
        self._own = Conversation([*conversation.messages, turn.message], conversation.images)
        return turn

    async def read(
        self, messages: Sequence[Mapping[str, object]], *, first: int = 0, from_client: bool = False
    ) -> Conversation:
        """`read_now` in a thread: what it does would hold up every other rollout of the event loop."""
        messages = await self._sources.fetch_remote(messages)  # first: fetching would hold a thread that reads
        return await READING.run(self.read_now, messages, first=first, from_client=from_client)

    def read_now(
        self, messages: Sequence[Mapping[str, object]], *, first: int = 0, from_client: bool = False
    ) -> Conversation:
        """Stores the images of messages and brings the messages into one form.

        Args:
            messages: Images in any accepted shape.
            first: Number of the first message, for errors.
            from_client: Whether they came over a wire: then no file of this machine is read but those of the store.

        Raises:
            HistoryError: Not messages.
            UnsupportedContentError: Content that is neither text nor image.
            SourceError: An image is named in a way that is not accepted.
            ImageError: An image is not decodable or over a limit.
        """
        images: list[StoredImage] = []
        sources = self._client_sources if from_client else self._sources
        stored = [
            normalize_images(message, sources, images, f"messages[{number}]")
            for number, message in enumerate(messages, start=first)
        ]
        numbered = enumerate(stored, start=first)
        return Conversation([canonical(message, f"messages[{number}]") for number, message in numbered], images)

    def decode(self, token_ids: int | list[int]) -> str:
        """Text of one token or several."""
        return str(self._renderer.tokenizer.decode(token_ids))

    async def chat(
        self,
        conversation: Conversation,
        *,
        tools: Tools | None = None,
        sampling: Sampling | None = None,
        n: int = 1,
        stop: Sequence[str] = (),
    ) -> list[Turn]:
        """Samples answers to a whole conversation; the session's own is left alone.

        Args:
            conversation: From its beginning (`read`), ending in a user's or a tool's message.
            tools: What the policy may call.
            sampling: Other than the session's.
            n: Answers to sample; each begins a branch.
            stop: Texts that end an answer and are cut off it. The tokens up to there are what is recorded.

        Raises:
            HistoryError: The conversation contradicts itself or the record.
            RenderError: The messages do not fit the template, or the conversation has outgrown `seq_len`.
            InferenceError: The server refused or failed the request.
        """
        return await self._sample(conversation, tools, sampling or self.sampling, n, stop, from_client=True)

    def compact_images(self, keep_last: int, replacement: str = "[image removed]") -> int:
        """Drops old pictures from the session's own conversation, for agents on long tasks.

        The next turn reads the shorter conversation and begins a new branch; the turns before it are trained on the
        tokens and images that they saw.

        Args:
            keep_last: Pictures that stay, counted from the end.
            replacement: Text that takes the place of each other one; empty leaves nothing.

        Returns:
            How many were dropped.
        """
        images = self._own.images
        drop = max(0, len(images) - keep_last)
        if drop:
            dropped = iter([True] * drop + [False] * keep_last)
            messages = [_without_images(message, dropped, replacement) for message in self.messages]
            self._own = Conversation(messages, images[drop:])
        return drop

    async def _sample(
        self,
        conversation: Conversation,
        tools: Tools | None,
        sampling: Sampling,
        n: int,
        stop: Sequence[str],
        *,
        from_client: bool,
    ) -> list[Turn]:
        more = _MESSAGE_CHARACTERS * len(conversation.messages) + _IMAGE_CHARACTERS * len(conversation.images)
        long = more + _characters(conversation.messages, tools, _LONG_CHARACTERS - more) > _LONG_CHARACTERS
        prepare = partial(self._prepare, conversation, tools, from_client=from_client)
        prepared = await WRITING.run(prepare) if long else prepare()
        prompt = prepared.prompt
        room = self._seq_len - len(prompt.token_ids)
        self.outgrown = room < 1
        if self.outgrown:
            raise ContextLengthError(f"conversation has {len(prompt.token_ids)} tokens, seq_len is {self._seq_len}")
        parameters = self._sampling_params(sampling, room)
        seed = self._seed + _SEEDS_PER_TURN * self._requests
        self._requests += 1
        # The rollouts of a group ask the same at about the same time; agents behind the gateway hardly ever do.
        generate = partial(self._client.generate, affinity=self._affinity, wait=not from_client)
        completions = await asyncio.gather(*(generate(prompt, parameters, seed + index) for index in range(n)))
        long = (
            sum(len(sampled.token_ids) for sampled in completions) > _LONG_ANSWER
            or n * len(prompt.token_ids) > _LONG_READ
        )
        record = partial(self._record, conversation.messages, prepared, completions, sampling, stop)
        return await WRITING.run(record) if long or self._recording.locked() else record()

    def _prepare(self, conversation: Conversation, tools: Tools | None, *, from_client: bool) -> "_Prepared":
        """Finds a conversation in the record and renders it; long ones in a thread.

        Raises:
            HistoryError: There is nothing to answer, or the conversation contradicts itself or the record.
            RenderError: The messages do not fit the template, or are far longer than `seq_len`.
        """
        messages, images = conversation.messages, conversation.images
        if from_client:
            check_tool_results(messages, self._issued_calls)
        if not messages or messages[-1]["role"] == "assistant":
            raise HistoryError("messages must end with a user or tool message for the policy to answer")
        # What is far too long is refused before it is turned into tokens: that takes 200 bytes for each byte of text.
        characters = _characters(messages, tools)
        if characters > self._seq_len * _LONG_TOKEN + _MORE_CHARACTERS:
            self.outgrown = True
            raise ContextLengthError(
                f"conversation has {characters} characters, more text than seq_len = {self._seq_len} tokens can hold"
            )
        _, *keys = accumulate(messages, next_key, initial=first_key(tools))
        parent, seen = self._trace.find(keys)
        prompt: RenderedPrompt | None = None
        if parent is not None:
            read, sampled = parent.logical_prompt(), parent.completion.token_ids
            prompt = self._renderer.bridge(read, sampled, messages[seen:], images, tools=tools)
        if prompt is None:
            prompt = self._renderer.render(messages, images, tools=tools)
        return _Prepared(parent, keys[-1], prompt)

    def _record(
        self,
        history: list[Message],
        prepared: "_Prepared",
        completions: Sequence[Completion],
        sampling: Sampling,
        stop: Sequence[str],
    ) -> list[Turn]:
        """Reads what was sampled and puts it on record; long answers in a thread.

        Raises:
            RenderError: The policy sampled what it must not, or what can not be read.
        """
        prompt, read, turns = prepared.prompt, [], []
        for sampled in completions:
            self._refuse_sampled_media(sampled)
            completion, stopped_by = self._cut(sampled, stop)
            try:
                read.append((completion, stopped_by, self._renderer.parse(completion.token_ids, prompt.logical_ids)))
            except RecursionError:
                raise RenderError("the policy's answer is nested too deeply to be read") from None
        with self._recording:
            for completion, stopped_by, parsed in read:
                message = self._message(parsed, stopped_by)
                self._trace.record(
                    prepared.parent,
                    prompt,
                    completion,
                    temperature=sampling.temperature,
                    key=next_key(prepared.key, message),
                    messages=[*history, message],
                )
                turns.append(Turn(message, completion, len(prompt.token_ids), stopped_by))
            self.turns += turns
        return turns

    def _sampling_params(self, sampling: Sampling, room: int) -> dict[str, object]:
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_tokens, room),
            "stop_token_ids": self._renderer.stop_token_ids,
            "logprobs": 0,
        }

    def _refuse_sampled_media(self, completion: Completion) -> None:
        forbidden = self._renderer.family.vision_token_ids
        for index, token in enumerate(completion.token_ids):
            if token in forbidden:
                raise RenderError(f"the policy sampled the vision token {token} at {index}: the server must mask it")

    def _cut(self, completion: Completion, stop: Sequence[str]) -> tuple[Completion, str | None]:
        """The completion up to the token that completes one of the texts, and that text.

        Example: tokens `["Thought", ":", " Ob", "servation", ": I"]` with the stop text `"Observation:"` are cut after
        the fifth. Once a text is complete it stays so in every longer prefix, so the token is found by halving.
        """
        tokens = completion.token_ids
        text = self.decode(tokens) if stop else ""
        if not any(each in text for each in stop):
            return completion, None

        def stopped(count: int) -> bool:
            prefix = self.decode(tokens[:count])
            return any(each in prefix for each in stop)

        end = bisect_left(range(len(tokens)), True, lo=1, key=stopped)
        prefix = self.decode(tokens[:end])
        stopped_by = next(each for each in stop if each in prefix)
        cut = dataclasses.replace(
            completion,
            token_ids=tokens[:end],
            logprobs=completion.logprobs[:end],
            weight_versions=completion.weight_versions[:end],
            finish_reason="stop",
        )
        return cut, stopped_by

    def _message(self, parsed: ParsedResponse, stopped_by: str | None) -> Message:
        content = parsed.content if stopped_by is None else parsed.content.partition(stopped_by)[0]
        message: Message = {"role": "assistant", "content": content}
        if parsed.reasoning_content:
            message["reasoning_content"] = parsed.reasoning_content
        if calls := [call for call in parsed.tool_calls if call.status == "ok" and isinstance(call.arguments, dict)]:
            message["tool_calls"] = [self._tool_call(call, index) for index, call in enumerate(calls)]
        elif parsed.tool_calls:  # what the policy wrote, for the agent to see
            message["content"] = "\n".join(filter(None, [content, *(call.raw for call in parsed.tool_calls)]))
        return canonical(message, "answer")

    def _tool_call(self, call: ParsedToolCall, index: int) -> Message:
        call_id = call.id or f"call_{len(self._trace.nodes)}_{index}"
        function = {"name": call.name, "arguments": json.dumps(call.arguments)}
        made = {"id": call_id, "type": "function", "function": function}
        if call.id is None:  # ids of the policy's own making may repeat
            self._issued_calls[call_id] = call_key(made)
        return made


def _characters(messages: Sequence[Message], tools: Tools | None, enough: float = math.inf) -> int:
    """Text of canonical messages and tools; what lies behind the message at which it is more than `enough` is left out.

    Example: messages of 30, 40 and 50 characters without tools have 120; with `enough=60` the first two are counted.
    """
    characters = len(msgspec.json.encode(list(tools))) if tools else 0
    for message in messages:
        if characters > enough:
            break
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        texts += [call["function"]["arguments"] for call in message.get("tool_calls", [])]
        characters += sum(map(len, texts)) + len(message.get("reasoning_content", ""))
    return characters


def _without_images(message: Message, drop: Iterator[bool], replacement: str) -> Message:
    """The message without those of its images for which `drop` says so, in order."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "image_url" and next(drop):
            parts += [{"type": "text", "text": replacement}] if replacement else []
        else:
            parts.append(part)
    return canonical({**message, "content": parts}, "compacted message")
