"""The named queries of `headrace sql`: what operators and analysts ask most."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class UnknownQuery(KeyError):
    """No query of that name."""


class BadParameter(ValueError):
    """A parameter that the query does not have, or one that is missing."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query over the deduplicated views; `{name:Type}` in it are ClickHouse's own parameters."""

    name: str
    about: str
    sql: str
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters in the text."""
        return frozenset(re.findall(r"\{(\w+):[^}]+\}", self.sql))

    def bind(self, given: dict[str, str]) -> dict[str, str]:
        """The value of every parameter. Raises `BadParameter` on one too many or one missing."""
        unknown = sorted(set(given) - self.parameters)
        if unknown:
            have = ", ".join(sorted(self.parameters)) or "none"
            raise BadParameter(f"{self.name} has no parameter {unknown[0]!r}; it has: {have}")
        bound = self.defaults | given
        missing = sorted(self.parameters - set(bound))
        if missing:
            raise BadParameter(f"{self.name} needs --param {missing[0]}=…")
        return bound


_SINCE = {"days": "30"}

QUERIES: tuple[Query, ...] = (
    Query(
        "usage-by-model",
        "Requests, tokens and cost of each model over the last `days` (30).",
        """
        SELECT model, count() AS requests, sum(prompt_tokens) AS prompt_tokens, sum(cached_tokens) AS cached_tokens,
            sum(completion_tokens) AS completion_tokens, currency, sum(cost) AS cost
        FROM usage WHERE accepted_at >= now() - toIntervalDay({days:UInt32})
        GROUP BY model, currency ORDER BY requests DESC, model
        """,
        _SINCE,
    ),
    Query(
        "cost-by-model",
        "What each model earned and did, beside the memory it held and for how long, over the last `days` (30).",
        """
        WITH now64(3, 'UTC') AS until, until - toIntervalDay({days:UInt32}) AS since
        SELECT model, requests, prompt_tokens, completion_tokens, currency, cost,
            round(lease_seconds, 3) AS lease_seconds, round(gib_seconds, 3) AS gib_seconds,
            round((prompt_tokens + completion_tokens) / nullIf(lease_seconds, 0), 3) AS tokens_per_lease_second,
            round(toFloat64(cost) * 3600 / nullIf(lease_seconds, 0), 9) AS cost_per_lease_hour,
            round(1 - least(busy_seconds, lease_seconds) / nullIf(lease_seconds, 0), 4) AS idle
        FROM (SELECT model FROM usage WHERE accepted_at >= since
            UNION DISTINCT SELECT model FROM lease_spans WHERE ended_at > since) AS named
        LEFT JOIN (
            SELECT model, currency, count() AS requests, sum(usage.prompt_tokens) AS prompt_tokens,
                sum(usage.completion_tokens) AS completion_tokens, sum(usage.cost) AS cost
            FROM usage WHERE accepted_at >= since GROUP BY model, currency
        ) AS paid USING (model)
        LEFT JOIN (
            SELECT model, sum(seconds) AS lease_seconds, sum(seconds * bytes) / 1073741824 AS gib_seconds
            FROM (
                SELECT model, bytes, dateDiff('millisecond', greatest(began_at, since), ended_at) / 1000 AS seconds
                FROM lease_spans WHERE ended_at > since AND state NOT IN ('free', 'lost')
            ) GROUP BY model
        ) AS held USING (model)
        LEFT JOIN (
            SELECT model, sum(greatest(0, dateDiff('millisecond', greatest(began, reached), ended))) / 1000
                AS busy_seconds
            FROM (
                SELECT model, began, ended, max(ended) OVER (PARTITION BY worker, model ORDER BY began, ended
                    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reached
                FROM (
                    SELECT worker, model, finished_at AS ended,
                        greatest(finished_at - toIntervalMillisecond(generation_ms), since) AS began
                    FROM usage WHERE finished_at > since AND generation_ms > 0
                )
            ) GROUP BY model
        ) AS busy USING (model)
        ORDER BY cost DESC, model, currency
        """,
        _SINCE,
    ),
    Query(
        "spend-by-tenant",
        "Requests, tokens and cost of each tenant in each month (UTC), over the last `days` (30).",
        """
        SELECT tenant, toStartOfMonth(accepted_at) AS month, count() AS requests,
            sum(prompt_tokens + completion_tokens) AS tokens, currency, sum(cost) AS cost
        FROM usage WHERE accepted_at >= now() - toIntervalDay({days:UInt32})
        GROUP BY tenant, month, currency ORDER BY month DESC, cost DESC, tenant
        """,
        _SINCE,
    ),
    Query(
        "spend-by-key",
        "Requests and cost of each API key of one `tenant`, over the last `days` (30).",
        """
        SELECT key_id, model, count() AS requests, currency, sum(cost) AS cost
        FROM usage WHERE tenant = {tenant:String} AND accepted_at >= now() - toIntervalDay({days:UInt32})
        GROUP BY key_id, model, currency ORDER BY cost DESC, key_id, model
        """,
        _SINCE,
    ),
    Query(
        "latency-by-model",
        "Quantiles in ms of time to first token, queueing and total time of completed requests, last `days` (1).",
        """
        SELECT model, count() AS requests,
            round(quantile(0.5)(ttft_ms)) AS ttft_p50, round(quantile(0.95)(ttft_ms)) AS ttft_p95,
            round(quantile(0.99)(ttft_ms)) AS ttft_p99, round(quantile(0.95)(queue_ms)) AS queue_p95,
            round(quantile(0.5)(total_ms)) AS total_p50, round(quantile(0.95)(total_ms)) AS total_p95,
            round(sum(completion_tokens) * 1000 / nullIf(sum(generation_ms), 0), 1) AS tokens_per_second
        FROM requests WHERE status = 'completed' AND accepted_at >= now() - toIntervalDay({days:UInt32})
        GROUP BY model ORDER BY requests DESC, model
        """,
        {"days": "1"},
    ),
    Query(
        "errors",
        "How requests ended, by model, status and error code, over the last `days` (1).",
        """
        SELECT model, status, error_code, count() AS requests, max(finished_at) AS last_at
        FROM requests WHERE accepted_at >= now() - toIntervalDay({days:UInt32})
        GROUP BY model, status, error_code ORDER BY requests DESC, model, status, error_code
        """,
        {"days": "1"},
    ),
    Query(
        "slowest-requests",
        "The `limit` (20) slowest requests of the last `days` (1), and where their time went, in ms.",
        """
        SELECT request_id, tenant, model, worker, status, queue_ms, ttft_ms, generation_ms, total_ms, completion_tokens
        FROM requests WHERE accepted_at >= now() - toIntervalDay({days:UInt32})
        ORDER BY total_ms DESC, request_id LIMIT {limit:UInt32}
        """,
        {"days": "1", "limit": "20"},
    ),
    Query(
        "recent-requests",
        "The `limit` (20) newest requests.",
        """
        SELECT accepted_at, request_id, tenant, model, status, error_code, prompt_tokens, completion_tokens, total_ms
        FROM requests ORDER BY accepted_at DESC, request_id LIMIT {limit:UInt32}
        """,
        {"limit": "20"},
    ),
    Query(
        "lifecycle",
        "Each step of one request, with the ms since the step before; needs `id`, the 32 hex digits.",
        """
        SELECT attempt, stage, role, instance, at,
            dateDiff('millisecond', lagInFrame(at, 1, at) OVER (ORDER BY attempt, stage_rank, at
                ROWS BETWEEN 1 PRECEDING AND CURRENT ROW), at) AS ms, detail
        FROM request_events WHERE request_id = {id:String}
        ORDER BY attempt, stage_rank, at
        """,
    ),
    Query(
        "requests-by-hour",
        "Requests, failures and tokens of each hour (UTC) of the last `days` (1).",
        """
        SELECT toStartOfHour(accepted_at) AS hour, count() AS requests, countIf(status = 'failed') AS failed,
            sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens
        FROM requests WHERE accepted_at >= now() - toIntervalDay({days:UInt32})
        GROUP BY hour ORDER BY hour
        """,
        {"days": "1"},
    ),
)

_BY_NAME = {query.name: query for query in QUERIES}


def named(name: str) -> Query:
    """The query of that name. Raises `UnknownQuery`."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnknownQuery(name) from None
