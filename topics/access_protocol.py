"""The two requests of Kafka's protocol that aiokafka lacks: credentials of users, and quotas of clients."""

from __future__ import annotations

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    Array,
    Boolean,
    CompactArray,
    CompactBytes,
    CompactString,
    Float64,
    Int8,
    Int16,
    Int32,
    Schema,
    String,
    TaggedFields,
)

SCRAM_SHA_512 = 2


class _QuotasResponse(Response):  # type: ignore[misc]  # aiokafka has no types
    API_KEY = 49
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "entries",
            Array(
                ("error_code", Int16),
                ("error_message", String("utf-8")),
                ("entity", Array(("entity_type", String("utf-8")), ("entity_name", String("utf-8")))),
            ),
        ),
    )


class _Quotas(RequestStruct):  # type: ignore[misc]
    API_KEY = 49
    API_VERSION = 0
    RESPONSE_TYPE = _QuotasResponse
    SCHEMA = Schema(
        (
            "entries",
            Array(
                ("entity", Array(("entity_type", String("utf-8")), ("entity_name", String("utf-8")))),
                ("ops", Array(("key", String("utf-8")), ("value", Float64), ("remove", Boolean))),
            ),
        ),
        ("validate_only", Boolean),
    )


class AlterUserQuota(Request[_Quotas]):  # type: ignore[misc]
    """Set a quota of a user, or remove it where `value` is None."""

    API_KEY = 49

    def __init__(self, user: str, key: str, value: float | None) -> None:
        self._entry = ([("user", user)], [(key, value or 0.0, value is None)])

    def build(self, request_struct_class: type[_Quotas]) -> _Quotas:
        """The request on the wire."""
        return request_struct_class([self._entry], False)


class _CredentialsResponse(Response):  # type: ignore[misc]
    API_KEY = 51
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("error_code", Int16),
                ("error_message", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _Credentials(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 51
    API_VERSION = 0
    RESPONSE_TYPE = _CredentialsResponse
    SCHEMA = Schema(
        ("deletions", CompactArray(("name", CompactString("utf-8")), ("mechanism", Int8), ("tags", TaggedFields))),
        (
            "upsertions",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class AlterUserCredentials(Request[_Credentials]):  # type: ignore[misc]
    """Set the SCRAM-SHA-512 password of a user, by what is kept of it."""

    API_KEY = 51

    def __init__(self, user: str, iterations: int, salt: bytes, salted_password: bytes) -> None:
        no_tags: dict[int, bytes] = {}
        self._upsertion = (user, SCRAM_SHA_512, iterations, salt, salted_password, no_tags)

    def build(self, request_struct_class: type[_Credentials]) -> _Credentials:
        """The request on the wire."""
        return request_struct_class([], [self._upsertion], {})
