"""Errors that a caller sees: each has a code, an HTTP status and a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from schemas.events import ErrorInfo


class HeadraceError(Exception):
    """Base of all errors with a face to the caller; subclasses fix status, code and type."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        """The error as events and answers carry it."""
        return ErrorInfo(
            status=self.status,
            code=self.code,
            message=self.message,
            type=self.type,
            param=self.param,
            retry_after_s=self.retry_after_s,
        )


class InvalidRequest(HeadraceError):
    """The body or a header is wrong."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A parameter that this model's provider, or Headrace, does not honour."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or prompt and completion together, do not fit the model's context."""

    code = "context_length_exceeded"


class BodyTooLarge(HeadraceError):
    """The body is over the limit."""

    status = 413
    code = "request_too_large"
    type = "invalid_request_error"


class Unauthorized(HeadraceError):
    """No key, or one that is not known, not enabled or expired."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class InvalidToken(Unauthorized):
    """An access or refresh token that is malformed, expired, or of a session that has ended."""

    code = "invalid_token"


class WrongPassword(Unauthorized):
    """The e-mail address or the password is wrong; which of them is not told."""

    code = "wrong_password"


class TooManyAttempts(HeadraceError):
    """Too many sign-ins failed, of this account or from this address."""

    status = 429
    code = "too_many_attempts"
    type = "rate_limit_error"


class Forbidden(HeadraceError):
    """The key is good, but not for this."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class ModelNotFound(HeadraceError):
    """No such model or alias for this key."""

    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class NotFound(HeadraceError):
    """No such request, or not this tenant's."""

    status = 404
    code = "not_found"
    type = "invalid_request_error"


class Conflict(HeadraceError):
    """What is asked for does not go together with how things are."""

    status = 409
    code = "conflict"
    type = "invalid_request_error"


class IdempotencyConflict(HeadraceError):
    """An Idempotency-Key was used again with another body."""

    status = 409
    code = "idempotency_key_reused"
    type = "invalid_request_error"


class LimitExceeded(HeadraceError):
    """A limit of a key, app or model is used up; subclasses say which, in `type`, as OpenAI does."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None, waits: bool = False
    ) -> None:
        """`waits` tells clients not to try again by themselves: the limit stands for long."""
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.waits = waits
        self.headers: Mapping[str, str] = {}
        """`x-ratelimit-*` of the answer."""


class RequestsLimited(LimitExceeded):
    """Too many requests in a minute."""

    type = "requests"


class TokensLimited(LimitExceeded):
    """Too many tokens in a minute."""

    type = "tokens"


class ConcurrencyLimited(LimitExceeded):
    """Too many requests at once."""

    type = "concurrency"


class InsufficientQuota(LimitExceeded):
    """The month's budget has too little left for what the request may cost."""

    code = "insufficient_quota"
    type = "insufficient_quota"


class Unavailable(HeadraceError):
    """A part is away or not ready; trying again later is right."""

    status = 503
    code = "service_unavailable"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = 2) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)


class DeadlineExceeded(HeadraceError):
    """The request's deadline passed before it was done."""

    status = 504
    code = "deadline_exceeded"


class ProviderError(HeadraceError):
    """The provider failed: down, hung, dead mid-stream, or sending garbage."""

    status = 502
    code = "provider_error"


class ProviderDown(Unavailable):
    """No worker can use the model's provider now; nothing was asked of it."""

    code = "provider_error"


class ProviderDeclined(ProviderError):
    """The provider answered, or lives, and did not serve this one request: no such model, too many requests, one of
    its engines died. It says nothing of its other models, so that circuit breakers do not count it."""


class ProviderRateLimited(ProviderDeclined):
    """The provider limits how much may be asked of it, and that was used up."""

    status = 429
    code = "provider_rate_limited"
    type = "rate_limit_error"


class ProviderUnavailable(ProviderError):
    """The provider says itself that it cannot take requests now: overloaded, in maintenance, or still loading."""

    status = 503
    code = "provider_unavailable"


class ProviderRefused(InvalidRequest):
    """The provider refused the request itself (a 4xx): asking again unchanged is of no use."""

    code = "provider_refused"


class WorkerLost(HeadraceError):
    """The worker died when part of the answer had been sent."""

    status = 502
    code = "worker_lost"
