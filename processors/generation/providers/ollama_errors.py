"""What the official Ollama client raises, as our errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import ollama
import pydantic

from headrace.errors import HeadraceError, ProviderError, UnsupportedParameter
from processors.generation.providers.refusals import from_fault, is_transient, read_fault


def translate(where: str, problem: Exception) -> HeadraceError:
    """The error that a caller or operator sees for what the client raised."""
    if isinstance(problem, ollama.ResponseError):
        fault = read_fault(problem.error.encode())
        if "does not support tools" in fault.message:
            return UnsupportedParameter(fault.message, param="tools")
        if problem.status_code < 400:
            # An error line inside a stream carries no status of its own.
            return ProviderError(f"{where} failed in the middle of the answer: {fault.message}")
        return from_fault(where, problem.status_code, fault)
    if isinstance(problem, httpx.TimeoutException):
        return ProviderError(f"{where} sent nothing for its idle timeout ({type(problem).__name__})")
    if isinstance(problem, ConnectionError | httpx.TransportError):
        return ProviderError(f"{where} cannot be reached, or broke off: {problem or type(problem).__name__}")
    return ProviderError(f"{where} sent what is not its API: {type(problem).__name__}: {problem}")


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise `translate` of whatever the client raises inside."""
    try:
        yield
    except CLIENT_ERRORS as problem:
        raise translate(where, problem) from problem


def may_retry(problem: Exception) -> bool:
    """Whether a request that failed so, before its first byte, may be sent again."""
    if isinstance(problem, ollama.ResponseError):
        return problem.status_code >= 400 and is_transient(problem.status_code)
    return isinstance(problem, ConnectionError | httpx.ConnectError | httpx.ConnectTimeout | httpx.RemoteProtocolError)


CLIENT_ERRORS = (
    ollama.ResponseError,
    ConnectionError,
    httpx.HTTPError,
    httpx.StreamError,
    pydantic.ValidationError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
)
"""All that the client raises, garbage in an answer included (it indexes and decodes without looking)."""
