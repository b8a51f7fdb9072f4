"""The one error tree. Every error Pointillist raises on purpose descends from `PointillistError`.

Messages say what was expected, what came, and where. Messages that can reach a client never say what a file
contains (no actual hashes) and never tell whether a path outside the allowed roots exists.
"""


class PointillistError(Exception):
    """Root of all errors that Pointillist raises on purpose."""


class ConfigError(PointillistError):
    """A configuration that can not work; raised before any process starts."""


class ImageError(PointillistError):
    """Bytes that can not be accepted as an image: undecodable, animated, or over a limit."""


class StorageError(PointillistError):
    """An image folder that cannot be written now (full, read-only, failing). The image is good; try again."""


class SourceError(PointillistError):
    """An image part of a message that names its image in a way that is not accepted."""


class RefError(PointillistError):
    """A reference that is malformed or does not fit what it points to (corruption, never absence)."""


class MissingImageError(PointillistError):
    """A well-formed reference whose file is not there, or cannot be read now."""


class RecordError(PointillistError):
    """A line of a run's folder that is not the record it should be."""


class LayoutError(PointillistError):
    """An image whose size has no layout in the model's family, or a layout that does not fit the tokens."""


class RenderError(PointillistError):
    """A conversation that can not be turned into tokens."""


class ContextLengthError(RenderError):
    """A conversation that has outgrown `seq_len`."""


class HistoryError(RenderError):
    """A conversation that contradicts itself or the record."""


class UnsupportedContentError(RenderError):
    """Content that no policy here can read: video, audio, files."""


class InferenceError(PointillistError):
    """The inference server refused or failed a request."""


class RequestRefusedError(InferenceError):
    """The inference server refused what a request asks for; asking again gives the same.

    Attributes:
        param: The field that it named, if any.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EnvironmentLoadError(PointillistError):
    """An environment that can not be found, imported or built."""


class RewardError(PointillistError):
    """A rollout's reward that is not a real number, not finite, or out of bounds."""


class RolloutTimeoutError(PointillistError):
    """A rollout that took longer than `rollout_timeout`."""


class TransportError(PointillistError):
    """A message between processes that is malformed or not allowed on the wire."""


class TrainingError(PointillistError):
    """A trainer that can not go on: a packing leak, non-finite loss, an unusable checkpoint."""


class LaunchError(PointillistError):
    """A run that can not start, or one of whose processes died."""
