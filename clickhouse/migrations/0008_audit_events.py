"""Migration 8: the audit trail."""

from clickhouse.migration import Migration

MIGRATION = Migration(
    number=8,
    name="audit_events",
    reason=(
        "Every event of audit.events, for 400 days as in Kafka, so that who did what can be asked in SQL. The hash is "
        "part of a row's identity: should the topic be rewritten, the event that was there before stays beside its "
        "forgery, and the view shows both."
    ),
    up=(
        """
        CREATE TABLE IF NOT EXISTS audit_events_raw (
            seq UInt64,
            hash String COMMENT 'SHA-256 of the event, in the chain of all events',
            previous String COMMENT 'hash of the event before',
            at DateTime64(3, 'UTC'),
            command String COMMENT 'id of the command that it tells of',
            actor String,
            action LowCardinality(String),
            kind LowCardinality(String),
            key String COMMENT 'never a secret; of an API key its id',
            outcome LowCardinality(String),
            reason String,
            refusal String,
            changes Map(String, Tuple(before String, after String)) COMMENT 'by field, as JSON; secrets redacted',
            detail Map(String, String),
            kafka_partition UInt32,
            kafka_offset UInt64,
            precedence UInt64 COMMENT '2^63 - kafka_offset; a record is a row of its own'
        )
        ENGINE = ReplacingMergeTree(precedence)
        PARTITION BY toYYYYMM(at)
        ORDER BY (seq, hash)
        TTL toDateTime(at) + INTERVAL 400 DAY
        SETTINGS ttl_only_drop_parts = 1
        """,
        """
        CREATE VIEW IF NOT EXISTS audit_events AS
        SELECT seq, hash, previous, at, command, actor, action, kind, key, outcome, reason, refusal, changes, detail,
            kafka_partition, kafka_offset
        FROM audit_events_raw FINAL
        """,
    ),
    down=("DROP VIEW IF EXISTS audit_events", "DROP TABLE IF EXISTS audit_events_raw"),
)
