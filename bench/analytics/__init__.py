"""Usage by the million rows: how fast dashboards are answered, and how fast a backlog goes into ClickHouse."""
