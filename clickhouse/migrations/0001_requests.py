"""Migration 1: requests and their attempts."""

from clickhouse.migration import Migration

MIGRATION = Migration(
    number=1,
    name="requests",
    reason=(
        "One row a request, from the deciding terminal of inference.log, without prompt or output. Attempts stand in "
        "a table of their own because they decide which terminals are void, also after the sink has restarted."
    ),
    up=(
        """
        CREATE TABLE IF NOT EXISTS request_attempts_raw (
            request_id String,
            tenant LowCardinality(String),
            attempt UInt32,
            epoch Int64,
            worker LowCardinality(String),
            reason String,
            opened_at DateTime64(3, 'UTC'),
            kafka_partition UInt32,
            kafka_offset UInt64,
            precedence UInt64 COMMENT '2^63 - kafka_offset: the first opening of an attempt is kept'
        )
        ENGINE = ReplacingMergeTree(precedence)
        PARTITION BY toYYYYMM(opened_at)
        ORDER BY (request_id, tenant, attempt)
        TTL toDateTime(opened_at) + INTERVAL 400 DAY
        SETTINGS ttl_only_drop_parts = 1
        """,
        """
        CREATE VIEW IF NOT EXISTS request_attempts AS
        SELECT request_id, tenant, attempt, epoch, worker, reason, opened_at, kafka_partition, kafka_offset
        FROM request_attempts_raw FINAL
        """,
        """
        CREATE TABLE IF NOT EXISTS requests_raw (
            request_id String,
            tenant LowCardinality(String),
            key_id LowCardinality(String),
            model LowCardinality(String),
            alias LowCardinality(String),
            pool LowCardinality(String),
            provider LowCardinality(String),
            worker LowCardinality(String),
            status LowCardinality(String),
            stream Bool,
            attempts UInt32 COMMENT 'number of the attempt that ended the request',
            epoch Int64,
            error_status UInt16 COMMENT 'HTTP status; 0 without an error',
            error_code LowCardinality(String),
            error_type LowCardinality(String),
            error_message String,
            prompt_tokens UInt64,
            cached_tokens UInt64 COMMENT 'part of prompt_tokens',
            completion_tokens UInt64,
            reasoning_tokens UInt64 COMMENT 'part of completion_tokens',
            estimated Bool COMMENT 'tokens counted by us because the provider did not say',
            price_version Int64 COMMENT '-1 without a price',
            accepted_at DateTime64(3, 'UTC'),
            routed_at Nullable(DateTime64(3, 'UTC')),
            assigned_at Nullable(DateTime64(3, 'UTC')),
            started_at Nullable(DateTime64(3, 'UTC')),
            first_token_at Nullable(DateTime64(3, 'UTC')),
            finished_at DateTime64(3, 'UTC'),
            queue_ms Nullable(UInt64) COMMENT 'routed to assigned',
            ttft_ms Nullable(UInt64) COMMENT 'accepted to first token',
            generation_ms Nullable(UInt64) COMMENT 'started to finished',
            total_ms UInt64 COMMENT 'accepted to finished',
            kafka_partition UInt32,
            kafka_offset UInt64,
            precedence UInt64 COMMENT '2^63 - kafka_offset: the first terminal that is not void decides'
        )
        ENGINE = ReplacingMergeTree(precedence)
        PARTITION BY toYYYYMM(accepted_at)
        ORDER BY (request_id, tenant)
        TTL toDateTime(accepted_at) + INTERVAL 400 DAY
        SETTINGS ttl_only_drop_parts = 1
        """,
        """
        CREATE VIEW IF NOT EXISTS requests AS
        SELECT request_id, tenant, key_id, model, alias, pool, provider, worker, status, stream, attempts, epoch,
            error_status, error_code, error_type, error_message,
            prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, estimated, price_version,
            accepted_at, routed_at, assigned_at, started_at, first_token_at, finished_at,
            queue_ms, ttft_ms, generation_ms, total_ms, kafka_partition, kafka_offset
        FROM requests_raw FINAL
        """,
    ),
    down=(
        "DROP VIEW IF EXISTS requests",
        "DROP TABLE IF EXISTS requests_raw",
        "DROP VIEW IF EXISTS request_attempts",
        "DROP TABLE IF EXISTS request_attempts_raw",
    ),
)
