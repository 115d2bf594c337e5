"""One place that turns errors into answers: OpenAI's error object, the right status, and the request's id."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from headrace import metrics
from headrace.errors import HeadraceError, LimitExceeded
from headrace.openai_objects import error_object
from schemas.events import ErrorInfo
from schemas.ids import new_request_id

log = structlog.get_logger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error"}


def error_response(error: ErrorInfo, request_id: str, more: Mapping[str, str] | None = None) -> Response:
    """An error before any part of an answer was sent, with `more` headers."""
    headers = {"x-request-id": request_id, **(more or {})}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error), status_code=error.status, headers=headers)


def install(app: FastAPI) -> None:
    """Register the handlers."""

    @app.exception_handler(HeadraceError)
    async def _ours(request: Request, error: HeadraceError) -> Response:
        metrics.REFUSED.labels(code=error.code).inc()
        return error_response(error.info(), request_id_of(request), _headers(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        kind = _TYPES.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
        message = f"{error.detail}: {request.method} {request.url.path}."
        return error_response(ErrorInfo(error.status_code, "http_error", message, kind), request_id_of(request))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        info = ErrorInfo(400, "invalid_request", f"{where}: {first['msg']}.", "invalid_request_error", where)
        return error_response(info, request_id_of(request))

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        request_id = request_id_of(request)
        log.error("unhandled", request_id=request_id, path=request.url.path, error=repr(error), exc_info=error)
        return error_response(ErrorInfo(500, "internal_error", "Something went wrong; see the log."), request_id)


def _headers(error: HeadraceError) -> Mapping[str, str]:
    """How the limits stand that refused a request; OpenAI's clients try a 429 again unless they are told not to."""
    if not isinstance(error, LimitExceeded):
        return {}
    return {**error.headers, **({"x-should-retry": "false"} if error.waits else {})}


def request_id_of(request: Request) -> str:
    """The id of an HTTP request that has no other; made once."""
    known = getattr(request.state, "request_id", None)
    if known is None:
        known = request.state.request_id = new_request_id()
    return str(known)
