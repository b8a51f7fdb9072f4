"""Errors as chat clients know them."""

from http import HTTPStatus
from typing import Any

from pointillist.errors import (
    ContextLengthError,
    HistoryError,
    ImageError,
    InferenceError,
    LayoutError,
    PointillistError,
    RenderError,
    RequestRefusedError,
    SourceError,
    StorageError,
    UnsupportedContentError,
)


class ApiError(PointillistError):
    """A request that is answered with an error."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code

    @property
    def kind(self) -> str:
        """The `type` that both APIs use for this status."""
        names = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            410: "not_found_error",
            429: "rate_limit_error",
        }
        return names.get(
            self.status, "api_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        )

    def openai(self) -> dict[str, Any]:
        """The body of OpenAI's APIs."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body of Anthropic's API."""
        return {"type": "error", "error": {"type": self.kind, "message": self.message}}


_CODES: tuple[tuple[type[PointillistError], str], ...] = (
    (ContextLengthError, "context_length_exceeded"),
    (HistoryError, "invalid_history"),
    (UnsupportedContentError, "unsupported_content"),
    (RenderError, "invalid_messages"),
    (SourceError, "invalid_image"),
    (ImageError, "invalid_image"),
    (LayoutError, "invalid_image"),
)


def api_error(error: PointillistError) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, RequestRefusedError):
        return ApiError(str(error), param=error.param and error.param.rpartition(".")[2], code="refused_by_server")
    if isinstance(error, InferenceError):
        return ApiError(str(error), status=502, code="inference_failed")
    if isinstance(error, StorageError):
        return ApiError(str(error), status=503, code="storage_unavailable")
    for kind, code in _CODES:
        if isinstance(error, kind):
            return ApiError(str(error), param="messages", code=code)
    return ApiError(str(error), status=500, code="internal_error")
