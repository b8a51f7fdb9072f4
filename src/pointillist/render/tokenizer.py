"""A model folder's fast tokenizer, loaded in milliseconds and without transformers.

`renderers` accepts any object with a small set of methods. `FolderTokenizer` has these methods over the library
`tokenizers`, which the fast tokenizers of Hugging Face are made of.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pointillist.base.json_types import JsonValue
from pointillist.errors import ConfigError


class FolderTokenizer:
    """The tokenizer of a model folder, with the methods of `renderers.Tokenizer`."""

    def __init__(self, folder: Path) -> None:
        """Loads `tokenizer.json` and the special tokens of `tokenizer_config.json`.

        Raises:
            ConfigError: The folder has no readable `tokenizer.json`.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model folder {folder} has no tokenizer.json (a fast tokenizer is needed)")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ConfigError(f"{path} cannot be read as a tokenizer ({error})") from None
        self.name_or_path = str(folder)
        settings = _settings(folder / "tokenizer_config.json")
        self.eos_token_id = self._named(settings, "eos_token")
        self.unk_token_id = self._named(settings, "unk_token")

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, list[int] | list[tuple[int, int]]]:
        """Encodes one text; with character offsets if asked.

        Example:
            Two tokens for `"a b"`: `{"input_ids": [5, 9], "offset_mapping": [(0, 1), (1, 3)]}`.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        result: dict[str, list[int] | list[tuple[int, int]]] = {"input_ids": encoding.ids}
        if return_offsets_mapping:
            result["offset_mapping"] = encoding.offsets
        return result

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: int | Iterable[int], *, skip_special_tokens: bool = False, **_: object) -> str:
        """Text of one token id or several."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Text that each token adds to the tokens before it; all of them together are the decoded text.

        A character that several tokens make up stands at the last of them. A character that never ends becomes a
        replacement character.

        Example:
            Three tokens that are the three bytes of one character give `["", "", "\u20ac"]`.
        """
        stream = DecodeStream(skip_special_tokens=False)
        added = [stream.step(self._tokenizer, token_id) for token_id in token_ids]
        texts = [text or "" for text in added]
        if added and added[-1] is None:
            texts[-1] = "\N{REPLACEMENT CHARACTER}"
        return texts

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """Id of a token, or ids of a list of tokens; None for an unknown one."""
        if isinstance(tokens, str):
            return self._tokenizer.token_to_id(tokens)
        return [self._tokenizer.token_to_id(token) for token in tokens]

    def _named(self, settings: dict[str, JsonValue], key: str) -> int | None:
        token = settings.get(key)
        if isinstance(token, dict):  # older folders write the token with its flags
            token = token.get("content")
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None


def _settings(path: Path) -> dict[str, JsonValue]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error})") from None
