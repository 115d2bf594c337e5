"""Migration 7: views that analysts ask most, under names that stay."""

from clickhouse.migration import Migration

MIGRATION = Migration(
    number=7,
    name="analysts_views",
    reason=(
        "Spend, errors, fairness, what a second of a device earns, and the ledger, each as one view whose name and "
        "columns are documented and stay."
    ),
    up=(
        """
        CREATE OR REPLACE VIEW spend_by_tenant_daily AS
        SELECT toDate(day) AS day, tenant, currency, sum(part.requests) AS requests,
            sum(part.prompt_tokens) AS prompt_tokens, sum(part.cached_tokens) AS cached_tokens,
            sum(part.completion_tokens) AS completion_tokens, sum(part.cost) AS cost
        FROM usage_by_day AS part GROUP BY day, tenant, currency
        """,
        """
        CREATE OR REPLACE VIEW errors_by_model AS
        SELECT hour, model, status, error_code, sum(part.requests) AS requests
        FROM usage_by_hour AS part WHERE status != 'completed' GROUP BY hour, model, status, error_code
        """,
        """
        CREATE OR REPLACE VIEW fairness_by_tenant AS
        SELECT hour, model, tenant, requests, tokens,
            tokens / nullIf(sum(tokens) OVER (PARTITION BY hour, model), 0) AS token_share,
            queue_sum / requests AS queue_mean_ms, queue_max AS queue_max_ms,
            pow(sum(tokens) OVER (PARTITION BY hour, model), 2)
                / nullIf(count() OVER (PARTITION BY hour, model)
                    * sum(pow(tokens, 2)) OVER (PARTITION BY hour, model), 0) AS jain
        FROM (
            SELECT hour, model, tenant, sum(part.requests) AS requests,
                sum(part.prompt_tokens + part.completion_tokens) AS tokens, sum(part.queue_ms) AS queue_sum,
                max(part.longest_queue_ms) AS queue_max
            FROM usage_by_hour AS part GROUP BY hour, model, tenant
        )
        """,
        """
        CREATE OR REPLACE VIEW cost_per_gpu_second AS
        SELECT day, model, currency, requests, tokens, cost, gpu_seconds, gib_seconds,
            toFloat64(cost) / nullIf(gpu_seconds, 0) AS cost_per_gpu_second,
            tokens / nullIf(gpu_seconds, 0) AS tokens_per_gpu_second
        FROM (
            SELECT toDate(day) AS day, model, currency, sum(part.requests) AS requests,
                sum(part.prompt_tokens + part.completion_tokens) AS tokens, sum(part.cost) AS cost
            FROM usage_by_day AS part GROUP BY day, model, currency
        ) AS paid
        FULL JOIN (
            SELECT day, model, sum(held_ms) / 1000 AS gpu_seconds, sum(held_ms * bytes) / 1000 / 1073741824
                AS gib_seconds
            FROM (
                SELECT model, bytes,
                    arrayJoin(arrayMap(n -> toDate(began_at) + n, range(toUInt32(
                        dateDiff('day', began_at, ended_at) + 1)))) AS day,
                    dateDiff('millisecond', greatest(began_at, toDateTime64(day, 3, 'UTC')),
                        least(ended_at, toDateTime64(day + 1, 3, 'UTC'))) AS held_ms
                FROM lease_spans WHERE state NOT IN ('free', 'lost')
            ) GROUP BY day, model
        ) AS held USING (day, model)
        """,
        """
        CREATE OR REPLACE VIEW ledger AS
        SELECT day, tenant, sum(ended) + sum(waiting) AS accepted, sum(ended) AS terminal, sum(waiting) AS in_flight,
            sum(lines) AS usage_rows, toInt64(terminal) - toInt64(usage_rows) AS without_usage,
            sumMap(money) AS cost
        FROM (
            SELECT toDate(accepted_at) AS day, toString(tenant) AS tenant, toUInt64(1) AS ended,
                toUInt64(0) AS waiting, toUInt64(0) AS lines, CAST(map() AS Map(String, Decimal(38, 18))) AS money
            FROM requests
            UNION ALL
            SELECT toDate(min(at)), toString(tenant), 0, 1, 0, CAST(map() AS Map(String, Decimal(38, 18)))
            FROM request_events WHERE (tenant, request_id) NOT IN (SELECT tenant, request_id FROM requests)
            GROUP BY tenant, request_id
            UNION ALL
            SELECT toDate(part.day), toString(tenant), 0, 0, sum(part.requests),
                map(toString(currency), CAST(sum(part.cost) AS Decimal(38, 18)))
            FROM usage_by_day AS part GROUP BY part.day, tenant, currency
        )
        GROUP BY day, tenant
        """,
    ),
    down=(
        "DROP VIEW IF EXISTS ledger",
        "DROP VIEW IF EXISTS cost_per_gpu_second",
        "DROP VIEW IF EXISTS fairness_by_tenant",
        "DROP VIEW IF EXISTS errors_by_model",
        "DROP VIEW IF EXISTS spend_by_tenant_daily",
    ),
)
