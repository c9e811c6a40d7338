"""``s3://``, ``gs://`` and ``az://`` URLs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

from ..config import object_store_settings
from ..errors import OptionError
from . import loop
from .attempts import Attempts
from .base import Entry, RemoteNotFoundError, Source, scheme_of
from .objects import ObjectTransport, list_objects, make_store
from .ranged import RangedSource
from .retry import Failure, Limits, limits_of
from .signed import SignedTransport, allows_http, can_be_signed
from .transport import Place, Transport
from .urls import bucket_place, hidden
from .web import warn_unprotected

__all__ = ["list_files", "local_path", "open_source"]

_T = TypeVar("_T")
_BUCKET = {"s3": "bucket", "gs": "bucket", "az": "container"}


def local_path(url: str, options: dict[str, object]) -> None:
    """Nothing: what a bucket has is not here."""


def open_source(url: str, options: dict[str, object], head_bytes: int) -> Source:
    """Open an object; see `base.open_source`."""
    scheme, limits = _scheme(url), _limits(options)
    place, bucket, key = bucket_place(scheme, url, _BUCKET[scheme])
    store = make_store(scheme, bucket, options)
    _warn_if_unprotected(options)

    def transport() -> Transport:
        if scheme == "s3" and can_be_signed(options):
            return SignedTransport(store, key, place, allows_http(options))
        return ObjectTransport(store, key, place)

    return RangedSource.open(_or_error(place, transport), limits, head_bytes)


def list_files(url: str, options: dict[str, object]) -> Sequence[Entry]:
    """The objects below a key; see `base.list_files`."""
    scheme, limits = _scheme(url), _limits(options)
    what = _BUCKET[scheme]
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        bucket_place(scheme, url, what)  # raises
    prefix = key.strip("/") + "/" if key.strip("/") else ""
    place = Place(scheme, bucket, "/" + prefix, f"{scheme}://{bucket}/{prefix}")
    store = make_store(scheme, bucket, options)
    _warn_if_unprotected(options)
    _or_error(place, loop.acquire)
    try:
        entries: Sequence[Entry] = Attempts(place, limits).run(
            0,
            lambda flight, progress: list_objects(
                store, prefix, lambda path: f"{scheme}://{bucket}/{path}", progress.limits, flight
            ),
        )
    finally:
        loop.release()
    if not entries:
        raise RemoteNotFoundError(
            bucket, "/" + prefix, "there is no such folder, or nothing in it", tries=1,
            remedy=f"check the URL, and that the credentials may list this {what}",
        )  # fmt: skip
    return entries


def _scheme(url: str) -> str:
    scheme = scheme_of(url)
    assert scheme is not None
    return scheme


def _limits(options: dict[str, object]) -> Limits:
    """Our own limits; obstore's ``retry_config`` sets them, too.

    Raises:
        OptionError: one of them has a bad value.
    """
    given = options.pop("retry_config", None) or {}
    if not isinstance(given, dict) or not set(given) <= {"max_retries", "retry_timeout"}:
        raise OptionError(
            "option retry_config of storage_options: allowed are max_retries and retry_timeout"
        )
    if "max_retries" in given:
        retries = given["max_retries"]
        if not isinstance(retries, int) or retries < 0:
            raise OptionError("option max_retries of storage_options: allowed are 0 and above")
        options.setdefault("max_tries", retries + 1)
    if "retry_timeout" in given:
        timeout = given["retry_timeout"]
        if not isinstance(timeout, timedelta):
            raise OptionError("option retry_timeout of storage_options: allowed is a timedelta")
        options.setdefault("deadline", timeout.total_seconds())
    return limits_of(options)


def _or_error(place: Place, act: Callable[[], _T]) -> _T:
    try:
        return act()
    except Failure as error:
        failure = error
    raise failure.error(place.host, place.path, tries=0)


def _warn_if_unprotected(options: Mapping[str, object]) -> None:
    """Warn where the endpoint is http, and requests are signed."""
    given = {str(name).lower(): str(value) for name, value in options.items()}
    named = [value for name, value in given.items() if name.rpartition("_")[2] == "endpoint"]
    aws, azure = object_store_settings("aws_"), object_store_settings("azure_storage_")
    named += [aws.get(name, "") for name in ("endpoint_url_s3", "endpoint_url", "endpoint")]
    endpoint = next(filter(None, [*named, azure.get("endpoint", "")]), "")
    signed = not any("skip_signature" in name for name in given)
    if endpoint.lower().startswith("http://") and signed:
        warn_unprotected(hidden(endpoint).rpartition("://")[2])
