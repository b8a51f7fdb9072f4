"""The API key of a server that other machines can reach; every server asks for it in the same way."""

import secrets

from fastapi import Request

from pointillist.inference.protocol import RequestError


def key_refusal(request: Request, key: str) -> RequestError | None:
    """The 401 for a request without the key; None for one that has it, and for `/health`, which needs none."""
    given = request.headers.get("authorization", "").encode()
    if request.url.path == "/health" or secrets.compare_digest(given, f"Bearer {key}".encode()):
        return None
    return RequestError("expected Authorization: Bearer <API key>", type="AuthenticationError", code=401)
