"""The one error tree. Every error Pointillist raises on purpose descends from `PointillistError`.

Whoever handles an error asks its fields; its text is for people. Messages say what was expected, what came, and where.
Messages that can reach a client never say what a file contains (no actual hashes) and never tell whether a path outside
the allowed roots exists. docs/errors.md draws the tree.
"""

import copy
from http import HTTPStatus
from typing import Final, Literal, Self

Fault = Literal["config", "request", "environment", "policy", "server", "system"]
"""Whose fault an error is: that of the config, of whoever asked (a message, a request, a reference), of the
environment's code, of what the policy did, of a server, or of a machine, a disk or a process of the run."""

_LONG_BITS: Final = 128


def shown(value: object, limit: int = 80) -> str:
    """The beginning of a value, for an error; it costs little, whatever the value is.

    Args:
        value: Anything that JSON can hold.
        limit: Characters of it that are shown.

    Example:
        shown("abc") == "'abc'", shown([1, 2]) == "a list of 2", shown(10**5000) == "an integer of 16610 bits"
    """
    if isinstance(value, str):
        return repr(value[:limit])
    if isinstance(value, int) and value.bit_length() > _LONG_BITS:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print one of 5,000 digits
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return str(value)[:limit]


class PointillistError(Exception):
    """Root of all errors that Pointillist raises on purpose.

    Attributes:
        where: What the error is about, such as `messages[2]` or a URL. The text begins with it.
        image_index: Number of the image among those of the request or sample. The text then begins with `image[i]`.
        uri: `file://` URL of the image.
        sha256: Hash by which the image was asked for, 64 hex digits.
        param: The field of a request that is at fault, such as `sampling_params.n`.
        retryable: Whether asking again may succeed.
        fault: Whose fault it is.
        code: The error's name in the answers of the chat APIs.
    """

    retryable: bool = False
    fault: Fault = "system"
    code: str | None = "internal_error"

    def __init__(
        self,
        message: str = "",
        *,
        where: str = "",
        image_index: int | None = None,
        uri: str | None = None,
        sha256: str | None = None,
        param: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        """Describes what went wrong.

        Args:
            message: What was expected and what came.
            where: What the error is about; the text begins with it.
            image_index: Number of the image; the text begins with `image[i]`.
            uri: `file://` URL of the image.
            sha256: Hash by which the image was asked for.
            param: The field of a request that is at fault.
            retryable: Whether asking again may succeed; by default what the class says.
        """
        super().__init__(message)
        self.where = where
        self.image_index = image_index
        self.uri = uri
        self.sha256 = sha256
        self.param = param
        if retryable is not None:
            self.retryable = retryable

    @property
    def message(self) -> str:
        """What went wrong, without where."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        image = "" if self.image_index is None else f"image[{self.image_index}]"
        return ": ".join(filter(None, (self.where, image, self.message)))

    def at(
        self,
        *,
        where: str = "",
        image_index: int | None = None,
        uri: str | None = None,
        sha256: str | None = None,
        param: str | None = None,
    ) -> Self:
        """The same error with more that is known of it; a field that is set already stays.

        Args:
            where: Goes before the `where` that is there.
            image_index: Number of the image.
            uri: `file://` URL of the image.
            sha256: Hash by which the image was asked for.
            param: The field of a request that is at fault.

        Returns:
            A copy, since one error may be that of several images.

        Example:
            str(ImageError("image is animated").at(image_index=2)) == "image[2]: image is animated"
        """
        error = copy.copy(self)
        error.where = ": ".join(filter(None, (where, self.where)))
        error.image_index = image_index if self.image_index is None else self.image_index
        error.uri, error.sha256, error.param = self.uri or uri, self.sha256 or sha256, self.param or param
        return error.with_traceback(self.__traceback__)


class ConfigError(PointillistError):
    """A configuration that cannot work; raised before any process starts."""

    fault: Fault = "config"


class FieldError(PointillistError, ValueError):
    """A field whose value is not accepted.

    It is a `ValueError` too, since pydantic and msgspec turn those of their validators into errors of their own.
    """

    fault: Fault = "request"


class SourceError(PointillistError):
    """An image part of a message that names its image in a way that is not accepted."""

    fault: Fault = "request"
    code = "invalid_image"


class ImageError(PointillistError):
    """Bytes that cannot be accepted as an image: undecodable, animated, or over a limit."""

    fault: Fault = "request"
    code = "invalid_image"


class RecordError(PointillistError):
    """A line of a run's folder that is not the record it should be."""


class LayoutError(PointillistError):
    """An image whose size has no layout in the model's family, or a layout that does not fit the tokens."""

    fault: Fault = "request"
    code = "invalid_image"


class StorageError(PointillistError):
    """An image folder that cannot be written now (full, read-only, failing). The image is good; try again."""

    retryable = True
    code = "storage_unavailable"


class RefError(PointillistError):
    """A reference that is malformed or does not fit what it points to (never absence)."""

    fault: Fault = "request"
    code = "invalid_reference"


class CorruptImageError(RefError):
    """A stored image whose bytes are not what its hash says."""

    fault: Fault = "system"


class MissingFileError(PointillistError):
    """A file of the run that is not there, or cannot be read now."""

    retryable = True
    code = "file_unavailable"


class MissingImageError(MissingFileError):
    """A well-formed reference whose image is not there, or cannot be read now."""


class AssetError(MissingFileError):
    """A file that no asset endpoint has, or that none can be asked for now."""


class RenderError(PointillistError):
    """A conversation that cannot be turned into tokens."""

    fault: Fault = "request"
    code = "invalid_messages"


class ContextLengthError(RenderError):
    """A conversation that has outgrown `seq_len`."""

    code = "context_length_exceeded"


class HistoryError(RenderError):
    """A conversation that contradicts itself or the record."""

    code = "invalid_history"


class UnsupportedContentError(RenderError):
    """Content that no policy here can read: video, audio, files."""

    code = "unsupported_content"


class InferenceError(PointillistError):
    """The inference server refused or failed a request."""

    retryable = True
    fault: Fault = "server"
    code = "inference_failed"


class RequestRefusedError(InferenceError):
    """The inference server refused what a request asks for; asking again gives the same."""

    retryable = False
    fault: Fault = "request"
    code = "refused_by_server"


class UnreachableError(InferenceError):
    """A server that cannot be reached, or ended in the middle of an answer."""


class RequestError(PointillistError):
    """A request over HTTP that its server does not serve.

    Attributes:
        status: HTTP status code.
        type: Name of the fault, in OpenAI's and vLLM's manner.
        code: Name of the error in the answers of the chat APIs; None for none.
    """

    fault: Fault = "request"

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Describes the answer.

        Args:
            message: What was expected and what came.
            status: HTTP status code; it decides whether asking again may succeed, and whose fault it is.
            type: Name of the fault; by default what the status is called.
            param: The field of the request that is at fault.
            code: Name of the error in the answers of the chat APIs.
        """
        super().__init__(message, param=param, retryable=status in _RETRYABLE)
        self.status = int(status)
        self.type = type or _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self.code = code
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.fault = "server"


_RETRYABLE: Final = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
_TYPES: Final[dict[int, str]] = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.REQUEST_TIMEOUT: "RequestTimeout",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLarge",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailable",
}


class EnvironmentLoadError(PointillistError):
    """An environment that cannot be found, imported or built."""

    fault: Fault = "environment"


class RewardError(PointillistError):
    """A rollout's reward that is not a real number, not finite, or out of bounds."""

    retryable = True
    fault: Fault = "environment"


class RolloutTimeoutError(PointillistError):
    """A rollout that took longer than `rollout_timeout`."""

    retryable = True
    fault: Fault = "environment"


class TransportError(PointillistError):
    """A message between processes that is malformed or not allowed on the wire."""


class TrainingError(PointillistError):
    """A trainer that cannot go on: a packing leak, non-finite loss, an unusable checkpoint."""


class LaunchError(PointillistError):
    """A run that cannot start, or one of whose processes died."""
