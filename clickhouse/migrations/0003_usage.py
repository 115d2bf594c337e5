"""Migration 3: metered usage, which is money."""

from clickhouse.migration import Migration

MIGRATION = Migration(
    number=3,
    name="usage",
    reason=(
        "One row a usage id, from usage.events, kept for ever: bills are made from it. Cost is a decimal with 18 "
        "places, which holds prices of 12 places a million tokens exactly. Summing views over rows that may come "
        "twice are ruled out, so the view `usage` deduplicates when it is read."
    ),
    up=(
        """
        CREATE TABLE IF NOT EXISTS usage_raw (
            usage_id String,
            request_id String,
            tenant LowCardinality(String),
            key_id LowCardinality(String),
            model LowCardinality(String),
            alias LowCardinality(String),
            provider LowCardinality(String),
            worker LowCardinality(String),
            status LowCardinality(String),
            attempts UInt32,
            prompt_tokens UInt64,
            cached_tokens UInt64 COMMENT 'part of prompt_tokens',
            completion_tokens UInt64,
            reasoning_tokens UInt64 COMMENT 'part of completion_tokens',
            estimated Bool COMMENT 'tokens counted by us because the provider did not say',
            price_version Int64,
            currency LowCardinality(String),
            cost Decimal(38, 18),
            stream Bool,
            accepted_at DateTime64(3, 'UTC'),
            finished_at DateTime64(3, 'UTC'),
            queue_ms UInt64,
            ttft_ms UInt64,
            generation_ms UInt64,
            kafka_partition UInt32,
            kafka_offset UInt64,
            precedence UInt64 COMMENT '2^63 - kafka_offset: the first event of a usage id is kept',
            CONSTRAINT cost_is_not_negative CHECK cost >= 0
        )
        ENGINE = ReplacingMergeTree(precedence)
        PARTITION BY toYYYYMM(accepted_at)
        ORDER BY (tenant, usage_id)
        """,
        """
        CREATE VIEW IF NOT EXISTS usage AS
        SELECT usage_id, request_id, tenant, key_id, model, alias, provider, worker, status, attempts,
            prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, estimated,
            price_version, currency, cost, stream, accepted_at, finished_at, queue_ms, ttft_ms, generation_ms,
            kafka_partition, kafka_offset
        FROM usage_raw FINAL
        """,
    ),
    down=("DROP VIEW IF EXISTS usage", "DROP TABLE IF EXISTS usage_raw"),
)
