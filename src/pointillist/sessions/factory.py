"""What sessions of one process share: renderer, store, and the client of the inference server."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pointillist.config import PolicyConfig, SamplingConfig
from pointillist.families import ModelFiles, load_family, resolve_model_dir, write_layout_record
from pointillist.images import ImageStore, Sources
from pointillist.images.blank import blank_image
from pointillist.images.remote import RemoteImages
from pointillist.render import FolderTokenizer, RawRenderer, unsampleable_token_ids
from pointillist.runs.image_dir import writer_image_dir
from pointillist.sessions.client import InferenceClient
from pointillist.sessions.session import Sampling, Session


@dataclass(frozen=True, slots=True)
class SessionFactory:
    """Opens sessions."""

    model_name: str
    renderer: RawRenderer
    sources: Sources
    client: InferenceClient
    seq_len: int
    max_images: int
    """In one prompt."""

    @classmethod
    def from_config(cls, config: PolicyConfig, *, blank_images: bool = False) -> "SessionFactory":
        """Loads tokenizer and layout, and opens the store.

        Args:
            config: Model, store and server.
            blank_images: Whether every image is replaced by a grey one before it is stored.

        Raises:
            ConfigError: The model folder is unusable, or the API key is not set.
        """
        family = load_family(config.model.name)
        folder = resolve_model_dir(config.model.name)
        tokenizer = FolderTokenizer(folder)
        renderer = RawRenderer(family, tokenizer)
        store = ImageStore(
            writer_image_dir(config.multimodal, Path(config.output_dir).resolve(), os.environ),
            config.multimodal.limits.image_limits(),
        )
        write_layout_record(family, store.root)
        sources = Sources(
            store,
            transform=partial(blank_image, limits=store.limits) if blank_images else None,
            fetch=RemoteImages(store.limits.max_bytes).fetch if config.multimodal.allow_remote else None,
        )
        vocab_size = ModelFiles(folder).vocab_size
        unsampleable = unsampleable_token_ids(family, tokenizer, vocab_size)
        client = InferenceClient.from_config(config.client, unsampleable, vocab_size)
        max_images = config.multimodal.limits.max_images_per_request
        return cls(config.model.name, renderer, sources, client, config.seq_len, max_images)

    def open(self, sampling: Sampling, seed: int, affinity: str = "") -> Session:
        """A new session; see `Session`."""
        return Session(
            self.renderer,
            self.sources,
            self.client,
            sampling,
            seq_len=self.seq_len,
            max_images=self.max_images,
            seed=seed,
            affinity=affinity,
        )


def sampling_of(config: SamplingConfig) -> Sampling:
    """How training rollouts are sampled."""
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_tokens)
