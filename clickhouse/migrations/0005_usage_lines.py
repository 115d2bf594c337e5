"""Migration 5: usage in the order of time, with all that a bill or a chart is made of."""
# ruff: noqa: S608  (only names of columns and tables of this file stand in the statements)

from clickhouse.migration import Migration

_SHARED = """usage_id, request_id, tenant, key_id, model, alias, provider, worker, status, attempts,
    prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, estimated, price_version, currency, cost,
    stream, accepted_at, finished_at, queue_ms, ttft_ms, generation_ms, kafka_partition, kafka_offset, precedence"""
"""Columns that the table of migration 3 has too."""

MIGRATION = Migration(
    number=5,
    name="usage_lines",
    reason=(
        "Usage gains the owner of the key, the error, images, seconds of audio, time spent loading, and revisions: a "
        "month that is priced anew is another revision of each line, which carries what the line cost before. The "
        "rows lie in the order of their hour, so that what is asked of an hour reads that hour alone; a table's order "
        "cannot be changed, so that it is a new one. What a sink of an earlier version writes into the old one is "
        "passed on."
    ),
    up=(
        """
        CREATE TABLE IF NOT EXISTS usage_lines_raw (
            usage_id String CODEC(ZSTD),
            request_id String CODEC(ZSTD),
            tenant LowCardinality(String),
            key_id LowCardinality(String),
            user_id LowCardinality(String) COMMENT 'owner of the key',
            model LowCardinality(String),
            alias LowCardinality(String),
            provider LowCardinality(String),
            worker LowCardinality(String),
            status LowCardinality(String),
            error_code LowCardinality(String),
            attempts UInt32,
            prompt_tokens UInt64,
            cached_tokens UInt64 COMMENT 'part of prompt_tokens',
            completion_tokens UInt64,
            reasoning_tokens UInt64 COMMENT 'part of completion_tokens',
            estimated Bool COMMENT 'tokens counted by us because the provider did not say',
            audio_seconds Decimal(18, 3),
            images UInt64 COMMENT 'in the prompt',
            revision UInt32 COMMENT '0 as metered; grows each time that the line is priced anew',
            price_version Int64,
            currency LowCardinality(String),
            cost Decimal(38, 18),
            repriced_of Array(Tuple(revision UInt32, price_version Int64, currency String, cost Decimal(38, 18)))
                COMMENT 'what it cost in each earlier revision',
            stream Bool,
            accepted_at DateTime64(3, 'UTC'),
            finished_at DateTime64(3, 'UTC'),
            queue_ms UInt64 COMMENT 'accepted to started',
            load_ms UInt64 COMMENT 'part of queue_ms in which the model was being loaded',
            ttft_ms UInt64 COMMENT 'accepted to first token',
            generation_ms UInt64 COMMENT 'started to finished',
            kafka_partition UInt32,
            kafka_offset UInt64,
            precedence UInt64 COMMENT
                '2^63 + 2^48 revision - kafka_offset: the highest revision is kept, of that the first event',
            CONSTRAINT cost_is_not_negative CHECK cost >= 0
        )
        ENGINE = ReplacingMergeTree(precedence)
        PARTITION BY toYYYYMM(accepted_at)
        ORDER BY (toStartOfHour(accepted_at), tenant, usage_id)
        """,
        f"""
        CREATE MATERIALIZED VIEW IF NOT EXISTS usage_raw_forward TO usage_lines_raw AS
        SELECT {_SHARED} FROM usage_raw
        """,
        f"INSERT INTO usage_lines_raw ({_SHARED}) SELECT {_SHARED} FROM usage_raw FINAL",
        "TRUNCATE TABLE usage_raw",
        """
        CREATE OR REPLACE VIEW usage AS
        SELECT usage_id, request_id, tenant, tenant AS app, key_id, user_id, model, alias, provider, worker,
            status, error_code, attempts,
            prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, estimated, audio_seconds, images,
            revision, price_version, currency, cost, repriced_of, stream, accepted_at, finished_at,
            queue_ms, load_ms, ttft_ms, generation_ms,
            toUInt64(greatest(0, dateDiff('millisecond', accepted_at, finished_at))) AS total_ms,
            kafka_partition, kafka_offset
        FROM usage_lines_raw FINAL
        """,
        """
        CREATE OR REPLACE VIEW usage_history AS
        SELECT usage_id, request_id, tenant, model, accepted_at, revised.1 AS revision, revised.2 AS price_version,
            revised.3 AS currency, revised.4 AS cost, revised.1 = newest AS counts
        FROM (
            SELECT usage_id, request_id, tenant, model, accepted_at, revision AS newest,
                arrayJoin(arrayPushBack(
                    arrayMap(before -> (before.1, before.2, before.3, before.4), repriced_of),
                    (revision, price_version, toString(currency), cost))) AS revised
            FROM usage
        )
        """,
    ),
    down=(
        "DROP VIEW IF EXISTS usage_history",
        "DROP VIEW IF EXISTS usage_raw_forward",
        "CREATE TABLE IF NOT EXISTS usage_lines_raw AS usage_raw",
        f"INSERT INTO usage_raw ({_SHARED}) SELECT {_SHARED} FROM usage_lines_raw FINAL",
        """
        CREATE OR REPLACE VIEW usage AS
        SELECT usage_id, request_id, tenant, key_id, model, alias, provider, worker, status, attempts,
            prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, estimated,
            price_version, currency, cost, stream, accepted_at, finished_at, queue_ms, ttft_ms, generation_ms,
            kafka_partition, kafka_offset
        FROM usage_raw FINAL
        """,
        "TRUNCATE TABLE usage_lines_raw",
        "DROP TABLE IF EXISTS usage_lines_raw",
    ),
)
