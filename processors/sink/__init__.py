"""The sink role: Kafka to ClickHouse."""
