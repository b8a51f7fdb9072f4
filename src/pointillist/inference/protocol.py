"""The inference wire: field names and meanings are those of vLLM's `/inference/v1/generate`.

Whatever a client sends that this server would silently treat otherwise is refused by name instead.
"""

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Parameters that clients of vLLM send with these values, which change nothing.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "min_p": (0, 0.0, None),
    "min_tokens": (0, None),
    "presence_penalty": (0, 0.0, None),
    "frequency_penalty": (0, 0.0, None),
    "repetition_penalty": (1, 1.0, None),
    "stop": ([], None),
    "bad_words": ([], None),
    "logit_bias": ({}, None),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (True, False, None),
    "spaces_between_special_tokens": (True, False, None),
    "detokenize": (True, False, None),
}


class PlaceholderRange(BaseModel):
    """Where an image's placeholder tokens lie in the prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    offset: int = Field(ge=0)
    length: int = Field(gt=0)


class MultiModalFeatures(BaseModel):
    """The images of a prompt; lists are parallel, one entry an image, in token order."""

    model_config = ConfigDict(extra="forbid")

    mm_hashes: dict[str, list[Any]]
    mm_placeholders: dict[str, list[PlaceholderRange]]
    kwargs_data: dict[str, list[Any]] | None = None
    """`mmraw:` references; that they are is checked where each can be named in the error."""


class SamplingParams(BaseModel):
    """How to sample; names and defaults are vLLM's."""

    model_config = ConfigDict(extra="forbid")

    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    """0 and -1 are all."""
    max_tokens: int | None = Field(None, gt=0)
    """None is as many as fit."""
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    n: int = Field(1, gt=0)
    seed: int | None = None
    """Choice i is sampled with seed + i."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Likeliest tokens to report beside the sampled one; None reports nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for key, value in data.items():
            if key in _NEUTRAL and any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[key]):
                continue
            kept[key] = value
        return kept


class PromptFields(BaseModel):
    """The part of a request that says what is read; other fields are somebody else's."""

    token_ids: list[int] = Field(min_length=1)
    """With `content_parts` the logical stream, one placeholder an image; else the effective one."""
    features: MultiModalFeatures | None = None
    content_parts: list[dict[str, Any]] | None = None
    """`{"type": "image_url", "url": "file://..."}` for every image, in token order."""


class GenerateRequest(PromptFields):
    """One prompt and how to sample."""

    model_config = ConfigDict(extra="forbid")

    request_id: str | None = None
    model: str | None = None
    sampling_params: SamplingParams = SamplingParams()
    stream: Literal[False] | None = False
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    """Accepted and not needed: nothing is cached between requests."""
    priority: Literal[0] = 0


class LogProb(BaseModel):
    """One candidate token."""

    token_id: int
    logprob: float
    rank: int


class LogProbsContent(LogProb):
    """The sampled token at one position and its likeliest alternatives."""

    top_logprobs: list[LogProb] = []


class LogProbs(BaseModel):
    """Per sampled token."""

    content: list[LogProbsContent]


class WeightVersionSpan(BaseModel):
    """Output tokens `[start, end)` were sampled by the weights of this version."""

    version: str
    start: int
    end: int


class Choice(BaseModel):
    """One completion."""

    index: int
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | None
    token_ids: list[int]
    logprobs: LogProbs | None
    weight_versions: list[WeightVersionSpan]


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateResponse(BaseModel):
    """All completions of one prompt."""

    request_id: str
    model: str
    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    mm_placeholders: dict[str, list[PlaceholderRange]] | None = None


class UpdateWeightsRequest(BaseModel):
    """Which weights to load."""

    model_config = ConfigDict(extra="forbid")

    weight_dir: str
    """Folder below the run's `broadcasts`, with a `model.safetensors`."""
    weight_version: int = Field(ge=0)


class ErrorInfo(BaseModel):
    """What went wrong, in vLLM's and OpenAI's shape."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(BaseModel):
    """Body of every answer that is not 200."""

    error: ErrorInfo


class RequestError(Exception):
    """A request that is answered by an `ErrorResponse`."""

    def __init__(
        self, message: str, *, type: str = "BadRequestError", param: str | None = None, code: int = 400
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(message=message, type=type, param=param, code=code)
