"""Objects of S3 by signed URLs: obstore signs, and the bytes come by HTTP into the caller's memory.

obstore hands out bodies in pieces of its own, which take a copy each, and hides Retry-After. A GB
of an S3 server on loopback took 1.0 to 1.2 s of CPU by obstore, and 0.5 s this way. What a signed
URL cannot say is left to obstore: see `can_be_signed`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ..config import object_store_settings
from . import loop
from .dial import Dialer
from .http import HttpTransport
from .objects import CLIENT_OPTIONS, asked
from .retry import Failure, Flight, Limits
from .transport import Body, Place
from .urls import HttpUrl, parse_http

__all__ = ["SignedTransport", "can_be_signed"]

_VALID = timedelta(hours=1)
_USED_S = 1800.0  # then it is signed anew: the clocks of both sides may differ
_REFUSED = (400, 401, 403)  # also when the signature, or the session that signed, has expired
_YOUNG_S = 60.0  # a signature that is refused so early has not expired

_SIGNED_WITH = frozenset(
    (
        *("access_key_id", "secret_access_key", "session_token", "token", "region"),
        *("default_region", "endpoint", "endpoint_url", "bucket", "bucket_name"),
        *("virtual_hosted_style_request", "allow_http", "imdsv1_fallback", "metadata_endpoint"),
        *("container_credentials_relative_uri", "container_credentials_full_uri"),
        *("container_authorization_token_file", "web_identity_token_file", "role_arn"),
        *("role_session_name", "endpoint_url_sts", "endpoint_url_s3"),
    )
)
"""Options that a signature takes into account, and that change nothing else."""

_IN_HEADERS = ("request_payer", "s3_express", "skip_signature", "sse_customer_key_base64")


def can_be_signed(options: Mapping[str, object]) -> bool:
    """Whether a signed URL and our own client do all that the options of a store ask for.

    Args:
        options: as for `make_store`; obstore's variables of the environment count, too.
    """
    given = {_plain(name) for name in options} - {"credential_provider"}
    others = (CLIENT_OPTIONS - {"allow_http"}) | {*_IN_HEADERS}
    return given <= _SIGNED_WITH and not object_store_settings("aws_").keys() & others


def allows_http(options: Mapping[str, object]) -> bool:
    """Whether ``allow_http`` is set, there or in the environment."""
    named = {_plain(name): value for name, value in options.items()}
    value = named.get("allow_http", object_store_settings("aws_").get("allow_http"))
    return str(value).lower() in ("1", "true", "on", "yes", "y")


def _plain(name: object) -> str:
    return str(name).lower().removeprefix("aws_")


class SignedTransport:
    """One object of S3: see `Transport`.

    Args:
        store: of obstore, which signs.
        key: of the object.
        place: for errors.
        plain: whether a URL of ``http://`` is allowed.
    """

    def __init__(self, store: Any, key: str, place: Place, plain: bool) -> None:
        loop.acquire()
        self._store = store
        self._key = key
        self._place = place
        self._plain = plain
        self._http: HttpTransport | None = None
        self._signed = -_USED_S  # when (`time.monotonic`)

    @property
    def place(self) -> Place:
        """Where the object is."""
        return self._place

    def get(
        self, span: tuple[int, int] | None, if_match: str | None, flight: Flight, limits: Limits
    ) -> Body:
        """Send one request: see `Transport`. A URL that is refused is signed once more."""
        http, age = self._http, time.monotonic() - self._signed
        if http is not None and age < _USED_S:
            try:
                return http.get(span, if_match, flight, limits)
            except Failure as failure:
                if failure.status not in _REFUSED or age < _YOUNG_S or flight.aborted:
                    raise
        return self._sign(flight, limits).get(span, if_match, flight, limits)

    def _sign(self, flight: Flight, limits: Limits) -> HttpTransport:
        url = self._signed_url(flight, limits)
        if self._http is None:
            self._http = HttpTransport(url, {}, "fastst-patch", Dialer(), self._place)
        else:
            self._http.sign(url)
        self._signed = time.monotonic()
        return self._http

    def _signed_url(self, flight: Flight, limits: Limits) -> HttpUrl:
        import obstore

        store = self._store
        if store is None:
            raise Failure("cancelled")

        async def sign() -> str:
            return await obstore.sign_async(store, "GET", self._key, _VALID)

        url = parse_http(asked(sign, flight, limits.stall, "no credentials in time"))
        if url.scheme == "http" and not self._plain:
            raise Failure(
                "the endpoint is http, which is not allowed", remedy="pass allow_http=True for it"
            )
        return url

    def close(self) -> None:
        """Let go of the connections, the store and the thread."""
        if self._http is not None:
            self._http.close()
        if self._store is not None:
            self._store = None
            loop.release()
