"""Where a run's images live: one resolution, used by everyone.

`multimodal.offload_dir` is the one setting. Precedence, first that is set:

1. `multimodal.offload_dir` (`~`, `$VAR` and `${VAR}` expanded, `$$` is a dollar sign; an unset variable is an error);
2. `RUN_ID` in the environment: `/data/outputs/run_<id without a leading "run_">/assets/images`;
3. `<output_dir>/assets/images`.

The environment variable `VF_RENDERER_IMAGE_OFFLOAD_DIR` is only the carrier by which the launcher tells the
processes that write images; it never decides. `POINTILLIST_IMAGE_LIMITS` carries what they accept beside it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from pointillist.base.image_limits import ImageLimits
from pointillist.config.shared import CARRIER, LIMITS_CARRIER, LimitsConfig, MultimodalConfig
from pointillist.errors import ConfigError

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
    """The image folder as a writer process finds it: what the launcher told it, else its own resolution.

    Raises:
        ConfigError: As `resolve_image_dir`.
    """
    if told := environ.get(CARRIER):
        return Path(told)
    return resolve_image_dir(multimodal, output_dir, environ)


def writer_limits(environ: Mapping[str, str]) -> ImageLimits:
    """What a writer process accepts as an image: what it was told, else the defaults.

    Raises:
        ConfigError: The variable holds something else than `multimodal.limits` as JSON.
    """
    try:
        limits: LimitsConfig = LimitsConfig.model_validate_json(environ.get(LIMITS_CARRIER) or "{}")
    except ValidationError as error:
        raise ConfigError(f"{LIMITS_CARRIER} does not hold multimodal.limits as JSON ({error})") from None
    return limits.image_limits()


def _expand(text: str, environ: Mapping[str, str]) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name = match["braced"] or match["plain"]
        if name not in environ:
            raise ConfigError(f"multimodal.offload_dir = {text!r} names the variable {name}, which is not set")
        return environ[name]

    return _VARIABLE.sub(value_of, text)
