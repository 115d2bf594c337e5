"""Migration 4: leases of memory, and what they held for how long."""

from clickhouse.migration import Migration

MIGRATION = Migration(
    number=4,
    name="leases",
    reason=(
        "Every step of every lease, from vram.leases, so that money can be set against memory and time. A record is "
        "one row, by its offset, and replaces itself when it comes again. Kafka compacts the topic, so that only here "
        "the steps of old leases are found; they are kept for 400 days, as requests are."
    ),
    up=(
        """
        CREATE TABLE IF NOT EXISTS lease_events_raw (
            pool LowCardinality(String),
            worker LowCardinality(String),
            model LowCardinality(String),
            epoch Int64 COMMENT 'offset of the grant in vram.leases',
            device LowCardinality(String) COMMENT 'empty where no memory is counted',
            boot String,
            term Int64 COMMENT 'of the scheduler that wrote it',
            state LowCardinality(String),
            bytes UInt64,
            reason String,
            at DateTime64(3, 'UTC'),
            kafka_partition UInt32,
            kafka_offset UInt64,
            precedence UInt64 COMMENT '2^63 - kafka_offset; a record is a row of its own'
        )
        ENGINE = ReplacingMergeTree(precedence)
        PARTITION BY toYYYYMM(at)
        ORDER BY (pool, worker, model, epoch, kafka_offset)
        TTL toDateTime(at) + INTERVAL 400 DAY
        SETTINGS ttl_only_drop_parts = 1
        """,
        """
        CREATE VIEW IF NOT EXISTS lease_events AS
        SELECT pool, worker, model, epoch, device, boot, term, state, bytes, reason, at, kafka_partition, kafka_offset
        FROM lease_events_raw FINAL
        """,
        """
        CREATE VIEW IF NOT EXISTS lease_spans AS
        SELECT pool, worker, model, epoch, device, state, bytes, reason, kafka_offset, at AS began_at,
            greatest(at, leadInFrame(at, 1, now64(3, 'UTC')) OVER (
                PARTITION BY pool, worker, model, epoch ORDER BY kafka_offset
                ROWS BETWEEN CURRENT ROW AND 1 FOLLOWING)) AS ended_at
        FROM (
            SELECT *, max(state = 'free') OVER (
                PARTITION BY pool, worker, model, epoch ORDER BY kafka_offset
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS is_over
            FROM lease_events
        )
        WHERE is_over = 0
        """,
        """
        CREATE VIEW IF NOT EXISTS leases AS
        SELECT pool, worker, model, max(span.device) AS device, epoch,
            argMax(span.state, kafka_offset) AS state,
            min(began_at) AS granted_at,
            minOrNullIf(began_at, span.state = 'active') AS active_at,
            if(argMax(span.state, kafka_offset) IN ('free', 'lost'), max(began_at), NULL) AS released_at,
            sumIf(dateDiff('millisecond', began_at, ended_at), span.state NOT IN ('free', 'lost')) / 1000 AS seconds,
            max(span.bytes) AS bytes,
            sumIf(span.bytes * dateDiff('millisecond', began_at, ended_at), span.state NOT IN ('free', 'lost')) / 1000
                AS byte_seconds,
            argMaxIf(span.reason, kafka_offset, span.reason != '') AS reason
        FROM lease_spans AS span
        GROUP BY pool, worker, model, epoch
        """,
    ),
    down=(
        "DROP VIEW IF EXISTS leases",
        "DROP VIEW IF EXISTS lease_spans",
        "DROP VIEW IF EXISTS lease_events",
        "DROP TABLE IF EXISTS lease_events_raw",
    ),
)
