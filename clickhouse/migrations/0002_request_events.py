"""Migration 2: the lifecycle of requests."""

from clickhouse.migration import Migration

MIGRATION = Migration(
    number=2,
    name="request_events",
    reason=(
        "Every step of a request with its time, from inference.events, so that a slow hop can be found by SQL. "
        "A step that its role reports again after a redelivery keeps its first time."
    ),
    up=(
        """
        CREATE TABLE IF NOT EXISTS request_events_raw (
            request_id String,
            tenant LowCardinality(String),
            attempt UInt32,
            stage_rank UInt8 COMMENT 'order of the stages; 255 for one that this version does not know',
            stage LowCardinality(String),
            role LowCardinality(String),
            instance LowCardinality(String),
            epoch Int64,
            at DateTime64(3, 'UTC'),
            detail Map(LowCardinality(String), String),
            kafka_partition UInt32,
            kafka_offset UInt64,
            precedence UInt64 COMMENT '2^63 - kafka_offset: the first report is kept'
        )
        ENGINE = ReplacingMergeTree(precedence)
        PARTITION BY toYYYYMM(at)
        ORDER BY (request_id, tenant, attempt, stage_rank, stage, role)
        TTL toDateTime(at) + INTERVAL 400 DAY
        SETTINGS ttl_only_drop_parts = 1
        """,
        """
        CREATE VIEW IF NOT EXISTS request_events AS
        SELECT request_id, tenant, attempt, stage_rank, stage, role, instance, epoch, at, detail,
            kafka_partition, kafka_offset
        FROM request_events_raw FINAL
        """,
    ),
    down=("DROP VIEW IF EXISTS request_events", "DROP TABLE IF EXISTS request_events_raw"),
)
