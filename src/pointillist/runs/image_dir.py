"""Where a run's images live and what one may be: one resolution, used by all writers and readers.

`multimodal.offload_dir` is the one setting. Precedence, first that is set:

1. `multimodal.offload_dir` (`~`, `$VAR` and `${VAR}` expanded, `$$` is a dollar sign; an unset variable is an error);
2. `RUN_ID` in the environment: `/data/outputs/run_<id without a leading "run_">/assets/images`;
3. `<output_dir>/assets/images`.

The environment variable `VF_RENDERER_IMAGE_OFFLOAD_DIR` is only the carrier by which the launcher tells the
processes that write images; it never decides. `POINTILLIST_IMAGE_LIMITS` carries what they accept beside it.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from pointillist.base.image_limits import STORED_LIMITS, ImageLimits
from pointillist.config.base import validated
from pointillist.config.shared import CARRIER, LIMITS_CARRIER, LimitsConfig, MultimodalConfig
from pointillist.errors import ConfigError
from pointillist.runs.config_files import recorded_table
from pointillist.runs.paths import RunPaths

_VARIABLE: Final = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>\w+)\}|(?P<plain>\w+))")


def resolve_image_dir(multimodal: MultimodalConfig, output_dir: Path, environ: Mapping[str, str]) -> Path:
    """The run's image folder, absolute, by the precedence above.

    Raises:
        ConfigError: `offload_dir` names a variable that is not set.
    """
    if multimodal.offload_dir is not None:
        return Path(_expand(multimodal.offload_dir, environ)).expanduser().absolute()
    if run_id := environ.get("RUN_ID"):
        return Path(f"/data/outputs/run_{run_id.removeprefix('run_')}/assets/images")
    return own_image_dir(output_dir)


def literal_dir(folder: Path) -> str:
    """An absolute folder as a value of `offload_dir` that stands for exactly this folder: nothing in it is expanded."""
    return str(folder).replace("$", "$$")


def own_image_dir(output_dir: Path) -> Path:
    """The image folder inside a run's own folder, where images lie unless a setting says otherwise."""
    return output_dir.expanduser().absolute() / "assets" / "images"


def writer_image_dir(multimodal: MultimodalConfig, output_dir: Path, environ: Mapping[str, str]) -> Path:
    """The image folder as a writer process finds it: from the launcher's variable, else by its own resolution.

    Raises:
        ConfigError: As `resolve_image_dir`.
    """
    if carried := environ.get(CARRIER):
        return Path(carried)
    return resolve_image_dir(multimodal, output_dir, environ)


def writer_limits(environ: Mapping[str, str]) -> ImageLimits:
    """What a writer process accepts as an image: from the launcher's variable, else the defaults.

    Raises:
        ConfigError: The variable holds something else than `multimodal.limits` as JSON.
    """
    try:
        limits: LimitsConfig = LimitsConfig.model_validate_json(environ.get(LIMITS_CARRIER) or "{}")
    except ValidationError as error:
        raise ConfigError(f"{LIMITS_CARRIER} does not hold multimodal.limits as JSON ({error})") from None
    return limits.image_limits()


def image_dir_of(paths: RunPaths) -> Path:
    """The image store of a run that exists: below its folder, or where its config says.

    Raises:
        ConfigError: It is in neither place, or the config cannot be read.
    """
    own = own_image_dir(paths.output_dir)
    if own.is_dir():
        return own
    if (multimodal := _multimodal_of(paths)) is not None:
        configured = resolve_image_dir(multimodal, paths.output_dir, os.environ)
        if configured.is_dir():
            return configured.resolve()
    raise ConfigError(f"{paths.output_dir} has no image store at {own} nor where its config says")


def limits_of(*runs: RunPaths) -> ImageLimits:
    """What a reader of the folders of runs accepts as an image: at least what each run itself accepted.

    Each limit is the largest of `STORED_LIMITS` and those in the runs' own configs: a store may be shared by runs, and
    a run may be resumed with smaller limits than it began with. A run without a readable config adds nothing.
    """
    known = [STORED_LIMITS]
    for paths in runs:
        with suppress(ConfigError, OSError):
            if (multimodal := _multimodal_of(paths)) is not None:
                known.append(multimodal.limits.image_limits())
    return ImageLimits(
        max_bytes=max(limits.max_bytes for limits in known),
        max_pixels=max(limits.max_pixels for limits in known),
        max_side=max(limits.max_side for limits in known),
    )


def _multimodal_of(paths: RunPaths) -> MultimodalConfig | None:
    """Where a run's config says that its images lie, and what they may be; None if it has no config."""
    config = paths.configs / "orchestrator.toml"
    if not config.is_file():
        return None
    table = recorded_table(config, "multimodal")
    return validated(MultimodalConfig, {key: table[key] for key in ("offload_dir", "limits") if key in table})


def _expand(text: str, environ: Mapping[str, str]) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name = match["braced"] or match["plain"]
        if name not in environ:
            raise ConfigError(f"multimodal.offload_dir = {text!r} names the variable {name}, which is not set")
        return environ[name]

    return _VARIABLE.sub(value_of, text)
