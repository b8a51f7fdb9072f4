"""The one request of weight updates, `POST /update_weights`."""

from typing import Annotated, Final

from msgspec import Meta, Struct

MAX_WEIGHT_VERSION: Final = 2**53 - 1
"""The largest integer that JSON and the metrics hold exactly."""
_MAX_PATH: Final = 4096


class UpdateWeightsRequest(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Which weights to load."""

    weight_dir: Annotated[str, Meta(max_length=_MAX_PATH)]
    """Folder below the run's `broadcasts`, with a `model.safetensors`."""
    weight_version: Annotated[int, Meta(ge=0, le=MAX_WEIGHT_VERSION)]
    rewind: bool = False
    """Whether an older version than the one that serves is meant: a run goes on after a checkpoint. Otherwise an older
    one is refused, since it is a late message."""
