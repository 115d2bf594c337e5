"""Migration 6: usage added up by minute, hour and day, right under duplicates and late rows."""
# ruff: noqa: S608  (only names of columns and tables of this file stand in the statements)

from clickhouse.migration import Migration

_MINUTE_LABELS = ("tenant", "model", "status", "currency")
_LABELS = ("tenant", "key_id", "user_id", "model", "alias", "provider", "status", "error_code", "currency")
"""Not the worker: with it there would be a sum for nearly every request. Which worker did what is asked of the rows."""
_COUNTS = (
    "requests", "answered", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "images",
    "queue_ms", "load_ms", "ttft_ms", "generation_ms", "total_ms",
)  # fmt: skip
_COLUMNS = ("estimated_requests", "audio_seconds", "cost", "longest_queue_ms")
_MEASURES = ", ".join((*_COUNTS, *_COLUMNS))
_LIVE = """
    count() AS requests, countIf(line.ttft_ms > 0) AS answered,
    sum(line.prompt_tokens) AS prompt_tokens, sum(line.cached_tokens) AS cached_tokens,
    sum(line.completion_tokens) AS completion_tokens, sum(line.reasoning_tokens) AS reasoning_tokens,
    sum(line.images) AS images, sum(line.queue_ms) AS queue_ms, sum(line.load_ms) AS load_ms,
    sum(line.ttft_ms) AS ttft_ms, sum(line.generation_ms) AS generation_ms,
    sum(toUInt64(greatest(0, dateDiff('millisecond', line.accepted_at, line.finished_at)))) AS total_ms,
    countIf(line.estimated) AS estimated_requests,
    CAST(sum(line.audio_seconds) AS Decimal(38, 3)) AS audio_seconds, sum(line.cost) AS cost,
    max(line.queue_ms) AS longest_queue_ms
"""
_AGAIN = ", ".join(
    [f"sum(part.{name}) AS {name}" for name in (*_COUNTS, "estimated_requests", "audio_seconds", "cost")]
    + ["max(part.longest_queue_ms) AS longest_queue_ms"]
)
_NUMBERS = (
    ", ".join(f"{name} UInt64" for name in (*_COUNTS, "estimated_requests"))
    + ", audio_seconds Decimal(38, 3), cost Decimal(38, 18), longest_queue_ms UInt64"
)
_LATENCY = """
    count() AS requests,
    quantilesExact(0.5, 0.95, 0.99)(ttft_ms) AS ttft, quantilesExact(0.5, 0.95, 0.99)(queue_ms) AS queue,
    quantilesExact(0.5, 0.95, 0.99)(toUInt64(greatest(0, dateDiff('millisecond', accepted_at, finished_at)))) AS total,
    sum(completion_tokens) AS completion_tokens, sum(generation_ms) AS generation_ms
"""


def _table(name: str, time: str, labels: tuple[str, ...], numbers: str, order: str) -> str:
    columns = ", ".join(f"{label} LowCardinality(String)" for label in labels)
    return f"""
        CREATE TABLE IF NOT EXISTS {name} (
            {time} DateTime('UTC') CODEC(DoubleDelta, ZSTD), {columns}, {numbers},
            computation UInt64 CODEC(DoubleDelta, ZSTD) COMMENT 'which adding up of its window it belongs to'
        )
        ENGINE = MergeTree PARTITION BY toYYYYMM({time}) ORDER BY ({order})
    """


def _live(name: str, time: str, function: str, labels: tuple[str, ...]) -> str:
    names = ", ".join(labels)
    return f"""
        CREATE VIEW IF NOT EXISTS {name} AS
        SELECT {function}(accepted_at) AS {time}, {names}, {_LIVE}
        FROM usage_lines_raw AS line FINAL GROUP BY {time}, {names}
    """


MIGRATION = Migration(
    number=6,
    name="usage_rollups",
    reason=(
        "Charts over months must not read every request. Each window is added up from the deduplicated rows, as a "
        "whole, and again whenever a row of it comes later, twice, or at another price. What was added up counts only "
        "while nothing touched its window since; all other windows are read from the rows themselves, so that a "
        "rollup can be late but never wrong."
    ),
    up=(
        """
        CREATE TABLE IF NOT EXISTS usage_touched (
            hour DateTime('UTC'),
            touched SimpleAggregateFunction(sum, UInt64) COMMENT
                'rows written, repetitions too: it only has to grow with every write',
            last_at SimpleAggregateFunction(max, DateTime('UTC'))
        )
        ENGINE = AggregatingMergeTree ORDER BY hour
        """,
        """
        CREATE TABLE IF NOT EXISTS usage_rolled (
            grain LowCardinality(String) COMMENT 'hour or day',
            window DateTime('UTC'),
            seen UInt64 COMMENT 'sum of touched of its hours before they were read',
            computation UInt64 COMMENT 'Unix ns'
        )
        ENGINE = MergeTree ORDER BY (grain, window)
        """,
        """
        CREATE VIEW IF NOT EXISTS usage_windows AS
        SELECT grain, window, touched, last_at, seen, computation, seen = touched AS clean
        FROM (
            SELECT 'hour' AS grain, hour AS window, sum(touched) AS touched, max(last_at) AS last_at
            FROM usage_touched GROUP BY hour
            UNION ALL
            SELECT 'day' AS grain, toStartOfDay(hour) AS window, sum(touched) AS touched, max(last_at) AS last_at
            FROM usage_touched GROUP BY window
        ) AS written
        LEFT JOIN (
            SELECT kind AS grain, window, newest.1 AS seen, newest.2 AS computation
            FROM (
                SELECT toString(grain) AS kind, window, max((seen, computation)) AS newest
                FROM usage_rolled GROUP BY kind, window
            )
        ) AS rolled USING (grain, window)
        """,
        _table("usage_minutes_raw", "minute", _MINUTE_LABELS, _NUMBERS, "minute, tenant, model, status, currency"),
        _table("usage_hours_raw", "hour", _LABELS, _NUMBERS, "hour, " + ", ".join(_LABELS)),
        _table("usage_days_raw", "day", _LABELS, _NUMBERS, "tenant, day, " + ", ".join(_LABELS[1:])),
        _table(
            "latency_hours_raw",
            "hour",
            ("model",),
            "requests UInt64, ttft Array(UInt64), queue Array(UInt64), total Array(UInt64), completion_tokens UInt64, "
            "generation_ms UInt64",
            "model, hour",
        ),
        _live("usage_minutes_live", "minute", "toStartOfMinute", _MINUTE_LABELS),
        _live("usage_hours_live", "hour", "toStartOfHour", _LABELS),
        f"""
        CREATE VIEW IF NOT EXISTS latency_hours_live AS
        SELECT toStartOfHour(accepted_at) AS hour, model, {_LATENCY}
        FROM usage_lines_raw FINAL WHERE status = 'completed' GROUP BY hour, model
        """,
        f"""
        CREATE VIEW IF NOT EXISTS usage_by_minute AS
        SELECT minute, {", ".join(_MINUTE_LABELS)}, {_MEASURES} FROM usage_minutes_raw
        WHERE (toStartOfHour(minute), computation) IN
            (SELECT window, computation FROM usage_windows WHERE grain = 'hour' AND clean)
        UNION ALL
        SELECT minute, {", ".join(_MINUTE_LABELS)}, {_MEASURES} FROM usage_minutes_live
        WHERE toStartOfHour(minute) IN (SELECT window FROM usage_windows WHERE grain = 'hour' AND NOT clean)
        """,
        f"""
        CREATE VIEW IF NOT EXISTS usage_by_hour AS
        SELECT hour, {", ".join(_LABELS)}, {_MEASURES} FROM usage_hours_raw
        WHERE (hour, computation) IN (SELECT window, computation FROM usage_windows WHERE grain = 'hour' AND clean)
        UNION ALL
        SELECT hour, {", ".join(_LABELS)}, {_MEASURES} FROM usage_hours_live
        WHERE hour IN (SELECT window FROM usage_windows WHERE grain = 'hour' AND NOT clean)
        """,
        f"""
        CREATE VIEW IF NOT EXISTS usage_days_live AS
        SELECT toStartOfDay(hour) AS day, {", ".join(_LABELS)}, {_AGAIN}
        FROM usage_by_hour AS part GROUP BY day, {", ".join(_LABELS)}
        """,
        f"""
        CREATE VIEW IF NOT EXISTS usage_by_day AS
        SELECT day, {", ".join(_LABELS)}, {_MEASURES} FROM usage_days_raw
        WHERE (day, computation) IN (SELECT window, computation FROM usage_windows WHERE grain = 'day' AND clean)
        UNION ALL
        SELECT day, {", ".join(_LABELS)}, {_MEASURES} FROM usage_days_live
        WHERE day IN (SELECT window FROM usage_windows WHERE grain = 'day' AND NOT clean)
        """,
        """
        CREATE VIEW IF NOT EXISTS latency_by_model_hourly AS
        SELECT hour, model, requests,
            ttft[1] AS ttft_p50_ms, ttft[2] AS ttft_p95_ms, ttft[3] AS ttft_p99_ms,
            queue[1] AS queue_p50_ms, queue[2] AS queue_p95_ms, queue[3] AS queue_p99_ms,
            total[1] AS total_p50_ms, total[2] AS total_p95_ms, total[3] AS total_p99_ms,
            completion_tokens * 1000 / nullIf(generation_ms, 0) AS tokens_per_second
        FROM (
            SELECT hour, model, requests, ttft, queue, total, completion_tokens, generation_ms FROM latency_hours_raw
            WHERE (hour, computation) IN (SELECT window, computation FROM usage_windows WHERE grain = 'hour' AND clean)
            UNION ALL
            SELECT hour, model, requests, ttft, queue, total, completion_tokens, generation_ms FROM latency_hours_live
            WHERE hour IN (SELECT window FROM usage_windows WHERE grain = 'hour' AND NOT clean)
        )
        """,
        """
        INSERT INTO usage_touched SELECT toStartOfHour(accepted_at) AS hour, count(), now()
        FROM usage_lines_raw GROUP BY hour
        """,
    ),
    down=(
        *(
            f"DROP VIEW IF EXISTS {name}"
            for name in (
                "latency_by_model_hourly",
                "usage_by_day",
                "usage_days_live",
                "usage_by_hour",
                "usage_by_minute",
                "latency_hours_live",
                "usage_hours_live",
                "usage_minutes_live",
                "usage_windows",
            )
        ),
        *(
            f"DROP TABLE IF EXISTS {name}"
            for name in (
                "latency_hours_raw",
                "usage_days_raw",
                "usage_hours_raw",
                "usage_minutes_raw",
                "usage_rolled",
                "usage_touched",
            )
        ),
    ),
)
