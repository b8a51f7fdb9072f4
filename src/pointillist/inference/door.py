"""Who may ask an inference server for what, and how much a request may bring; the same for every server."""

from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from pointillist.base.http_guard import HttpLimits, check_address, check_bearer, check_json
from pointillist.config import RUN_KEY
from pointillist.errors import RequestError
from pointillist.inference.prompt import longest_body

ADMIN_PATHS: Final = ("/update_weights", "/pause", "/resume")
"""Routes that change what all clients get."""
OWN_PATHS: Final = ("/inference/v1/generate", *ADMIN_PATHS)
"""Our routes with bodies; a server may have others."""
_INFLIGHT_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Door:
    """The rule of one server."""

    loopback: bool
    """Whether it listens on a loopback address only."""
    key: str | None
    """API key that requests must bring; None asks for none."""
    run_key: str | None
    """The run's own key, which the admin routes ask for; a server outside of a run has none: `key` does there."""

    def check(self, request: Request) -> None:
        """Looks at a request's headers.

        Raises:
            RequestError: 400 or 403: meant for another server, or sent by a page of another site. 401: without the key.
                415: a body that is not JSON.
        """
        check_address(request, loopback=self.loopback)
        path = request.scope["path"]  # `request.url` is made with what the client says in Host
        admin = path in ADMIN_PATHS
        key = (admin and self.run_key) or self.key
        if key is not None and path != "/health":
            check_bearer(request, key)
        if admin and key is None and not self.loopback:
            raise RequestError(f"other machines can reach this server: set {RUN_KEY}", status=401)
        if path in OWN_PATHS:
            check_json(request)


def http_limits(seq_len: int, max_images: int) -> HttpLimits:
    """Limits of a server.

    Args:
        seq_len: Longest sequence, in tokens.
        max_images: Images in one prompt.
    """
    longest = longest_body(seq_len, max_images)
    return HttpLimits(body_bytes=longest, inflight_bytes=max(_INFLIGHT_BYTES, 2 * longest))
