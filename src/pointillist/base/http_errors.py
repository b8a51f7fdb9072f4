"""How an error is worded over HTTP: one function for every server, in the shape of the API that was asked."""

from http import HTTPStatus
from typing import Final, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pointillist.errors import PointillistError, RequestError

Api = Literal["vllm", "openai", "anthropic"]
"""Whose shape an answer has."""

_KINDS: Final[dict[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    410: "not_found_error",
    429: "rate_limit_error",
}
"""By status, the `type` of OpenAI's and Anthropic's errors."""


def as_request_error(error: Exception, param: str | None = None) -> RequestError:
    """What a client is told of an error.

    Args:
        error: Any exception; of one that is not ours only the type is told.
        param: The field to name where the request is at fault and the error names none.
    """
    if isinstance(error, RequestError):
        return error
    if not isinstance(error, PointillistError):
        return RequestError(type(error).__name__, status=500, code="internal_error")
    if error.fault == "request":
        return RequestError(str(error), param=error.param or param, code=error.code)
    return RequestError(str(error), status=_status_of(error), code=error.code)


def error_body(error: RequestError, api: Api = "vllm") -> dict[str, object]:
    """The body of an answer, as JSON.

    Example:
        error_body(RequestError("n is 0", param="n")) ==
            {"error": {"message": "n is 0", "type": "BadRequestError", "param": "n", "code": 400}}
    """
    if api == "vllm":
        content = {"message": str(error), "type": error.type, "param": error.param, "code": error.status}
        return {"error": content}
    kind = _KINDS.get(error.status) or ("api_error" if error.fault == "server" else "invalid_request_error")
    if api == "anthropic":
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def answer_json(_: Request, error: Exception, api: Api = "vllm") -> Response:
    """The response to a request that is not served.

    Args:
        error: Why.
        api: Whose shape the body has.
    """
    refusal = as_request_error(error)
    return JSONResponse(error_body(refusal, api), refusal.status)


def _status_of(error: PointillistError) -> HTTPStatus:
    """The status of an error that is not the request's fault."""
    if error.fault == "server":
        return HTTPStatus.BAD_GATEWAY
    return HTTPStatus.SERVICE_UNAVAILABLE if error.retryable else HTTPStatus.INTERNAL_SERVER_ERROR
