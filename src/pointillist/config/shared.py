"""Config that several components share; set once at the top of an `rl` config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, get_args

from pydantic import Field, field_validator, model_validator

from pointillist.base.image_limits import ImageFormat, ImageLimits
from pointillist.base.net import LOOPBACK
from pointillist.config.base import Config

CARRIER: Final = "VF_RENDERER_IMAGE_OFFLOAD_DIR"
"""Environment variable with the image folder, which the launcher sets for the processes that write images."""
LIMITS_CARRIER: Final = "POINTILLIST_IMAGE_LIMITS"
"""Environment variable with `multimodal.limits` as JSON, for the same processes."""
RUN_KEY: Final = "POINTILLIST_RUN_KEY"
"""Environment variable with the secret that the processes of one run share; the launcher makes it up."""


LogLevel = Literal["debug", "info", "warning"]


class ModelConfig(Config):
    """Which model."""

    name: str
    """A folder as `save_pretrained` writes it, or a hub name."""


class LimitsConfig(Config):
    """What an image may be at most; checked before it is decoded."""

    max_bytes: int = Field(32 * 1024 * 1024, gt=0)
    """Size of an image file, in bytes."""

    max_pixels: int = Field(64_000_000, gt=0)
    """Width times height."""

    max_side: int = Field(16_384, gt=0)
    """The longer side, in pixels."""

    formats: list[ImageFormat] = Field(list(get_args(ImageFormat)), min_length=1)
    """Formats that are accepted."""

    max_images_per_request: int = Field(256, gt=0)
    """Images in one prompt."""

    def image_limits(self) -> ImageLimits:
        """The limits on one image."""
        return ImageLimits(self.max_bytes, self.max_pixels, self.max_side, tuple(self.formats))


class ServerConfig(Config):
    """Where a server listens."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs an API key."""

    port: int = Field(0, ge=0, le=65_535)
    """Port to bind; 0 is a free one."""

    api_key_var: str | None = None
    """Name of the environment variable that holds the API key; clients send it as a bearer token."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    def require_key(self, name: str) -> None:
        """Checks that a server which other machines can reach asks for a key.

        Args:
            name: Of the server's table, for the message.

        Raises:
            ValueError: It does not.
        """
        if not self.is_loopback and self.api_key_var is None:
            raise ValueError(
                f"{name}.host = {self.host!r} is reachable from other machines: set {name}.api_key_var to the name of "
                "an environment variable that holds an API key, or bind 127.0.0.1"
            )


class AssetsConfig(ServerConfig):
    """Images and weights over HTTP, for readers that share no file system with the writers."""

    serve: bool = False
    """Whether the launcher starts the asset endpoint (`pointillist assets`) beside the orchestrator."""

    api_key_var: str = RUN_KEY
    """Name of the environment variable that holds the endpoint's key, which every request must bring; by default the
    run's own."""

    urls: list[str] = []
    """Endpoints from which a reader fetches, by hash, what it does not find in the run's folder; the launcher adds its
    own."""

    cache_dir: Path | None = None
    """The reader's own store of fetched images; default `<output_dir>/assets/fetched`."""

    cache_bytes: int = Field(16 * 1024**3, gt=0)
    """Size of that store; those that were not used for longest go first."""

    timeout: float = Field(30.0, gt=0)
    """Seconds that one answer of an endpoint may take, headers included, beside one for each MiB that has come."""


class ReaderConfig(Config):
    """How fast one process reads images, and the memory that it may use for them; results do not depend on it."""

    threads: int | None = Field(None, gt=0)
    """Images that are decoded at once; one a core by default."""

    cache_bytes: int = Field(256 * 1024 * 1024, ge=0)
    """Decoded images that are kept, in bytes of uint8 pixels: groups and turns bring the same ones again."""

    inflight_bytes: int = Field(1024 * 1024 * 1024, gt=0)
    """Decoded images that may wait, in bytes of uint8 pixels: those of requests in the inference server, those of rows
    in the trainer. One that is larger by itself is served alone."""


_MOVED: Final = {
    "materialize_threads": "threads", "cache_bytes": "cache_bytes", "inflight_bytes": "inflight_bytes",
}  # fmt: skip
"""Former keys of `multimodal`, and what each is called in a `reader` table."""


class MultimodalConfig(Config):
    """Images: where they lie, who may read them, what they may be."""

    offload_dir: str | None = None
    """Folder of the run's image store; may contain ~, $VAR and ${VAR}. Default: see docs/contract.md, section 7."""

    allowed_roots: list[Path] = []
    """Further folders that references may point into; the run's own image store always is one."""

    limits: LimitsConfig = LimitsConfig()
    allow_remote: bool = False
    """Whether http(s) URLs in messages are fetched, once, with limits on size, time and address."""

    assets: AssetsConfig = AssetsConfig()
    missing_image_policy: Literal["placeholder_zero_loss", "error"] = "placeholder_zero_loss"
    """What the trainer does with a sample one of whose images is not there: train the others and give this one zero
    images and no loss, or stop."""

    missing_image_retries: int = Field(3, ge=0)
    """How often a file that is not there is looked for again, after 50, 100, 200 ... ms: network file systems lag."""

    missing_image_max_fraction: float = Field(0.05, ge=0, le=1)
    """Part of a step's images that may be missing, and part that may be corrupt, before the trainer stops."""

    overlong_policy: Literal["drop", "error"] = "drop"
    """What the orchestrator does with a sample that is longer than `seq_len`; it is never cut."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_new_place(cls, data: object) -> object:
        for key in _MOVED.keys() & set(data if isinstance(data, Mapping) else ()):
            raise ValueError(
                f"multimodal.{key} belongs to each reader now: set inference.reader.{_MOVED[key]} and "
                f"trainer.reader.{_MOVED[key]}"
            )
        return data

    @field_validator("offload_dir")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("offload_dir is empty, expected a folder")
        return value


class TransportConfig(Config):
    """How packed batches go from the orchestrator to the trainer's ranks."""

    type: Literal["filesystem", "zmq"] = "filesystem"
    """Files in the run's folder, or messages, which only processes with the same `POINTILLIST_RUN_KEY` can exchange
    (the launcher sets it)."""

    address: str = "tcp://127.0.0.1:0"
    """Where the orchestrator listens with `zmq`; port 0 lets the launcher choose a free one."""


class ProcessConfig(Config):
    """What every process of a run has in its config."""

    output_dir: Path = Path("outputs/run")
    """The run's folder."""

    multimodal: MultimodalConfig = MultimodalConfig()
    """Images: folder, limits and where else to look for them."""

    log_level: LogLevel = "info"
    """Least important messages that are logged."""


class ReadingConfig(ProcessConfig):
    """What a process has in its config that reads images as tensors."""

    reader: ReaderConfig = ReaderConfig()
