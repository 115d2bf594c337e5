"""The answer of `GET /v1/usage` and `GET /admin/usage`, as OpenAPI describes it.

Money is written as decimal strings, moments as ISO 8601 in UTC. Durations are means in milliseconds, over the requests
that have them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_MOMENT: dict[str, Any] = {"format": "date-time"}


def _without_defaults(schema: dict[str, Any]) -> None:
    """Fields that may be missing have no default: they are not sent then."""
    for field in schema["properties"].values():
        field.pop("default", None)


class UsageRow(BaseModel):
    """What one group used in one step of time; without what it is not grouped by, and without `start` if no bucket."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra=_without_defaults)

    start: str = Field(default="", json_schema_extra=_MOMENT)
    """When the step begins."""
    tenant: str = ""
    app: str = ""
    """The tenant, by another name."""
    key: str = ""
    user: str = ""
    """Owner of the key; empty where nobody owns it."""
    model: str = ""
    alias: str = ""
    """The model name as the caller wrote it."""
    provider: str = ""
    worker: str = ""
    status: str = ""
    """`completed`, `failed`, `cancelled`, `rejected` or `expired`."""
    error: str = ""
    """Code of the error; empty where there was none."""
    currency: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    """Part of `prompt_tokens`."""
    completion_tokens: int
    reasoning_tokens: int
    """Part of `completion_tokens`."""
    images: int
    audio_seconds: str
    """A decimal string."""
    estimated_requests: int
    """Whose tokens were counted here, since the provider did not tell."""
    cost: str
    """A decimal string, in `currency`."""
    queue_ms: float
    """From acceptance to the start of the generation."""
    load_ms: float
    """Part of `queue_ms` in which the model was being loaded."""
    ttft_ms: float
    """From acceptance to the first token."""
    generation_ms: float
    total_ms: float


class UsageRows(BaseModel):
    """The answer: by time, and in each step the dearest first."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    object: Literal["list"] = "list"
    begin: str = Field(alias="from", json_schema_extra=_MOMENT)
    end: str = Field(alias="to", json_schema_extra=_MOMENT)
    """It does not belong to the range."""
    bucket: Literal["none", "minute", "hour", "day", "month"]
    has_more: bool
    """Whether there are rows beyond the limit."""
    last_id: str | None
    """`after` of the next page; null where there are no rows."""
    data: list[UsageRow]
