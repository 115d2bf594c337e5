"""ClickHouse as a projection of Kafka: migrations, the rows of each topic, named queries, and the rebuild."""
