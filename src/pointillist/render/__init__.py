"""Conversations to tokens, without an image processor."""

from pointillist.render.raw import RawRenderer, RenderedPrompt
from pointillist.render.tokenizer import FolderTokenizer
from pointillist.render.vocabulary import unsampleable_token_ids

__all__ = ["FolderTokenizer", "RawRenderer", "RenderedPrompt", "unsampleable_token_ids"]
