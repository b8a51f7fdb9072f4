"""The raw renderer: messages with stored images in, tokens and descriptors out; no pixel is touched.

The chat template is `renderers`' affair: with `process_multimodal=False` it writes one placeholder an image. Growing
each placeholder to its image's token count is then a list operation that the family does from the image's header.

Two streams are kept apart. The **logical** stream has one placeholder an image; turns are bridged in it, because the
template counts placeholders. The **effective** stream is what the model reads; it is always expanded as a whole.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from renderers import create_renderer
from renderers.configs import config_from_name

from pointillist.errors import ConfigError, RenderError
from pointillist.families.base import Family, place_image
from pointillist.images.store import StoredImage
from pointillist.refs.mm_refs import MMImageRef
from pointillist.render.tokenizer import FolderTokenizer

Message = dict[str, Any]
"""OpenAI chat shape."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """Where logical tokens come from, as `renderers` says; see the properties of `RenderedPrompt`."""

    message_indices: list[int]
    sampled_mask: list[bool]
    is_content: list[bool]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation as tokens.

    Properties run along `token_ids`; they are made when they are asked for: an image may be thousands of tokens.
    """

    logical_ids: list[int]
    """One placeholder an image; bridge from these."""
    token_ids: list[int]
    """What the model reads."""
    images: list[MMImageRef]
    """At their places in `token_ids`."""
    source: "array[int]"
    """Per token of `token_ids`: the index of the logical token it came from."""
    attribution: Attribution

    @property
    def message_indices(self) -> list[int]:
        """Index of the message that each token came from, -1 for the template's own."""
        return [self.attribution.message_indices[index] for index in self.source]

    @property
    def sampled_mask(self) -> list[bool]:
        """Tokens that a model samples when it writes the conversation's assistant messages."""
        return [self.attribution.sampled_mask[index] for index in self.source]

    @property
    def is_content(self) -> list[bool]:
        """Tokens of message bodies, not of the template around them."""
        return [self.attribution.is_content[index] for index in self.source]


class RawRenderer:
    """Renders conversations of one model."""

    def __init__(self, family: Family, tokenizer: FolderTokenizer) -> None:
        """Finds the chat-template renderer of the family.

        Raises:
            ConfigError: There is no renderer for this model, or the tokenizer lacks the template's special tokens.
        """
        self.family = family
        self.tokenizer = tokenizer
        if family.renderer_name is None:
            raise ConfigError(f"no chat-template renderer is known for the model in {tokenizer.name_or_path}")
        try:
            self._renderer = create_renderer(tokenizer, config_from_name(family.renderer_name))
        except (AssertionError, ValueError) as error:
            raise ConfigError(
                f"tokenizer of {tokenizer.name_or_path} does not fit the {family.renderer_name} chat template: {error}"
            ) from None
        self.stop_token_ids: list[int] = list(self._renderer.get_stop_token_ids())
        self._media_tokens = [tokenizer.decode(token) for token in sorted(family.vision_token_ids)]

    def render(
        self,
        messages: Sequence[Message],
        images: Sequence[StoredImage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """Renders a whole conversation.

        Args:
            messages: OpenAI chat messages whose images are already stored (`normalize_images`).
            images: Those images, in order.
            tools: OpenAI tool specifications.
            add_generation_prompt: Whether the tokens end where an assistant's answer begins.

        Raises:
            RenderError: A message that the template has no place for, or text with a media token in it.
        """
        self._refuse_media_tokens(messages)
        try:
            rendered = self._renderer.render(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                process_multimodal=False,
            )
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError) as error:
            raise RenderError(f"conversation can not be rendered: {error}") from error
        return self._expand(rendered, images)

    def bridge(
        self,
        logical_ids: Sequence[int],
        completion_ids: Sequence[int],
        new_messages: Sequence[Message],
        images: Sequence[StoredImage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedPrompt | None:
        """Extends a turn by new messages without touching the tokens that were read and sampled.

        Args:
            logical_ids: The last turn's prompt, one placeholder an image.
            completion_ids: What was sampled from it.
            new_messages: User or tool messages that follow, images already stored.
            images: All images of the conversation, old and new, in order.
            tools: OpenAI tool specifications.

        Returns:
            The next prompt, or None where the template can not be extended (render the whole conversation instead).

        Raises:
            RenderError: A message that the template has no place for, or text with a media token in it.

        Example: the prompt `[1, 7, 2]` with the placeholder 7 of an image of 4 tokens, the completion `[50, 3]` and a
        message that renders to `[4, 60, 5]` give the logical stream `[1, 7, 2, 50, 3, 4, 60, 5]` and the effective one
        `[1, 7, 7, 7, 7, 2, 50, 3, 4, 60, 5]`, with the image at offset 1.
        """
        self._refuse_media_tokens(new_messages)
        try:
            rendered = self._renderer.bridge_to_next_turn(
                list(logical_ids),
                list(completion_ids),
                list(new_messages),
                tools=list(tools) if tools else None,
                process_multimodal=False,
            )
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError) as error:
            raise RenderError(f"messages can not be rendered: {error}") from error
        return None if rendered is None else self._expand(rendered, images)

    def parse(self, completion_ids: Sequence[int], prompt: RenderedPrompt) -> Any:
        """The assistant message in a completion: a `renderers.ParsedResponse`."""
        return self._renderer.parse_response(list(completion_ids), prompt_ids=prompt.logical_ids)

    def _expand(self, rendered: Any, images: Sequence[StoredImage]) -> RenderedPrompt:
        layouts = [self.family.layout(image.header.width, image.header.height) for image in images]
        expansion = self.family.expand(rendered.token_ids, layouts)
        content = rendered.is_content or [False] * len(rendered.token_ids)
        return RenderedPrompt(
            logical_ids=list(rendered.token_ids),
            token_ids=expansion.token_ids,
            source=array("I", expansion.source),
            attribution=Attribution(list(rendered.message_indices), list(rendered.sampled_mask), list(content)),
            images=[
                place_image(self.family, image, layout, offset)
                for image, layout, (offset, _) in zip(images, layouts, expansion.spans, strict=True)
            ],
        )

    def _refuse_media_tokens(self, value: Any) -> None:
        """A media token written as text would become a placeholder without an image."""
        if isinstance(value, str):
            for token in self._media_tokens:
                if token in value:
                    raise RenderError(f"message text contains the media token {token!r}: send an image part instead")
        elif isinstance(value, Mapping):
            for item in value.values():
                self._refuse_media_tokens(item)
        elif isinstance(value, list | tuple):
            for item in value:
                self._refuse_media_tokens(item)
