"""The `renderers` library as this project uses it: the one module that imports it.

Its own `Renderer` protocol lacks what its multimodal renderers take (`process_multimodal`), and its messages are typed
dicts that leave out parts of the OpenAI shape. `chat_template` says once what it returns.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from renderers import ParsedResponse, ParsedToolCall, RenderedTokens, RendererConfig, create_renderer
from renderers.configs import config_from_name

from pointillist.errors import ConfigError
from pointillist.render.tokenizer import FolderTokenizer

__all__ = ["ChatTemplate", "ParsedResponse", "ParsedToolCall", "RenderedTokens", "chat_template"]


class ChatTemplate(Protocol):
    """A chat template that renders images as one placeholder each (`process_multimodal=False`)."""

    def get_stop_token_ids(self) -> list[int]:
        """Tokens that end an assistant's message."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None,
        add_generation_prompt: bool,
        process_multimodal: bool,
    ) -> RenderedTokens:
        """A whole conversation as tokens."""
        ...

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None,
        process_multimodal: bool,
    ) -> RenderedTokens | None:
        """The tokens of a turn and of the messages that follow it; None where the template cannot be extended."""
        ...

    def parse_response(self, token_ids: list[int], *, prompt_ids: list[int]) -> ParsedResponse:
        """The assistant message in a completion."""
        ...


def chat_template(name: str, tokenizer: FolderTokenizer) -> ChatTemplate:
    """The chat template of a name, over a model's tokenizer.

    Raises:
        ConfigError: The tokenizer lacks the template's special tokens, or there is no such template.
    """
    try:
        return cast(ChatTemplate, create_renderer(tokenizer, cast(RendererConfig, config_from_name(name))))
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"tokenizer of {tokenizer.name_or_path} does not fit the {name} chat template: {error}"
        ) from None
