"""Who may look: everybody on this machine through a loopback address; from elsewhere, whoever has the token.

On loopback the danger is a page of the web whose name is made to point at 127.0.0.1 (DNS rebinding): a request must
name the loopback host itself. Elsewhere each request brings the token, as a bearer token or in the cookie that the
printed address (`?token=...`) sets once.
"""

import secrets
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, urlencode

from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from pointillist.base.http_errors import as_request_error
from pointillist.base.http_guard import HttpLimits, check_address, has_bearer, same_secret
from pointillist.errors import PointillistError, RequestError

LIMITS_OF_REQUESTS: Final = HttpLimits(body_bytes=0)
"""No request has a body."""
HEADERS: Final = {
    # No inline script, no inline style, nothing from elsewhere: text that gets out of its element can do nothing.
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Access:
    """The rule of one server."""

    token: str | None
    """That requests must bring; None: they must name a loopback host."""
    cookie: str = field(default_factory=lambda: f"pointillist_view_{secrets.token_hex(4)}")
    """Cookies do not tell ports apart, so every server has its own name."""
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    """What the cookie holds; the token itself stays out of the browser's store."""

    async def __call__(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Lets a request through, or answers it."""
        response = self._refusal(request) or await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def _refusal(self, request: Request) -> Response | None:
        if self.token is None:
            return None
        if (given := request.query_params.get("token")) is not None and same_secret(given, self.token):
            query = urlencode([pair for pair in request.query_params.multi_items() if pair[0] != "token"])
            path = "/" + quote(request.scope["path"].lstrip("/\\"))  # two slashes would name another host
            redirect = RedirectResponse(f"{path}?{query}" if query else path, 303)
            redirect.set_cookie(self.cookie, self.session, httponly=True, samesite="lax", path="/")
            return redirect
        if has_bearer(request, self.token) or same_secret(request.cookies.get(self.cookie, ""), self.session):
            return None
        message = "expected the token: open the address that `pointillist view` printed"
        return answer(request, RequestError(message, status=401))


def check(request: Request, token: str | None) -> None:
    """Checks what a request's first lines say: method, address, origin.

    Raises:
        RequestError: 400, 403 or 405.
    """
    if request.method not in ("GET", "HEAD"):
        raise RequestError("the viewer only reads: expected GET", status=405)
    check_address(request, loopback=token is None)


def answer(_: Request, error: PointillistError) -> Response:
    """A refusal as text."""
    return PlainTextResponse(str(error), as_request_error(error).status, HEADERS)
