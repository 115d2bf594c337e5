"""How long each table keeps its rows: from the settings (pure), and into force as TTLs."""

from __future__ import annotations

import re

from clickhouse_connect.driver.client import Client

from headrace.settings import Settings

SAFE_USAGE_DAYS = 400
"""A year's bills can still be disputed a month later."""

_USAGE = {"usage_lines_raw": "accepted_at", "usage_hours_raw": "hour", "usage_days_raw": "day",
          "latency_hours_raw": "hour"}  # fmt: skip
_REQUESTS = {"request_attempts_raw": "opened_at", "requests_raw": "accepted_at", "request_events_raw": "at"}
_KEPT = re.compile(r"TTL .*? \+ (?:toIntervalDay\((\d+)\)|INTERVAL (\d+) DAY)")


class UnsafeRetention(ValueError):
    """Usage would be deleted sooner than bills are settled; the message says how to insist."""


def wanted(conf: Settings) -> dict[str, tuple[str, int | None]]:
    """Table -> its column of time, and after how many days a row expires (None: never). Raises `UnsafeRetention`."""
    usage = conf.retention_usage_days
    if usage is not None and usage < SAFE_USAGE_DAYS and conf.retention_usage_days_again != usage:
        raise UnsafeRetention(
            f"HEADRACE_RETENTION_USAGE_DAYS={usage} would delete what bills are made of before {SAFE_USAGE_DAYS} days; "
            f"if that is meant, set HEADRACE_RETENTION_USAGE_DAYS_AGAIN={usage} too"
        )
    minutes = min((days for days in (conf.retention_minutes_days, usage) if days is not None), default=None)
    return (
        {table: (column, usage) for table, column in _USAGE.items()}
        | {table: (column, conf.retention_requests_days) for table, column in _REQUESTS.items()}
        | {
            "usage_minutes_raw": ("minute", minutes),
            "lease_events_raw": ("at", conf.retention_leases_days),
            "audit_events_raw": ("at", conf.retention_audit_days),
        }
    )


def days_of(create: str) -> int | None:
    """The days after which rows expire, of a table's CREATE statement; None where they do not."""
    found = _KEPT.search(create)
    return int(found[1] or found[2]) if found else None


def apply(client: Client, conf: Settings) -> dict[str, int | None]:
    """Bring the TTLs of the tables that exist to what is wanted; which ones changed. Raises `UnsafeRetention`."""
    changed: dict[str, int | None] = {}
    shown = client.query("SELECT name, create_table_query FROM system.tables WHERE database = currentDatabase()")
    there = {str(name): days_of(str(create)) for name, create in shown.result_rows}
    for table, (column, days) in wanted(conf).items():
        if table not in there or there[table] == days:
            continue
        if days is None:
            client.command(f"ALTER TABLE {table} REMOVE TTL")
        else:
            client.command(f"ALTER TABLE {table} MODIFY SETTING ttl_only_drop_parts = 1")
            client.command(f"ALTER TABLE {table} MODIFY TTL toDateTime({column}) + INTERVAL {days} DAY")
        changed[table] = days
    return changed


def analyst(database: str, name: str) -> str:
    """The statements that make a user who only reads the views. Raises `ValueError` on a name that is no identifier."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise ValueError(f"{name!r} is no user name; use letters, digits and underscores only")
    return "\n".join((
        f"CREATE USER IF NOT EXISTS {name} IDENTIFIED WITH sha256_password BY '<password>'",
        "    SETTINGS readonly = 2, max_execution_time = 60, max_memory_usage = 4000000000;",
        f"GRANT SELECT ON {database}.* TO {name};",
        f"GRANT SHOW TABLES, SHOW COLUMNS ON {database}.* TO {name};",
    ))  # fmt: skip
