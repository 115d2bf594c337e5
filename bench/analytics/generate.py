"""Usage rows made by the engine itself: the same ones under a seed; skewed over tenants, models and hours."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

DAYS = 90
TENANTS, KEYS_A_TENANT, MODELS, WORKERS = 60, 5, 12, 8
BUSY = (1, 1, 1, 1, 1, 2, 3, 5, 9, 12, 13, 12, 10, 12, 13, 12, 10, 8, 6, 5, 4, 3, 2, 1)
"""Weights of the hours of a day."""
_HOURS = [hour for hour, weight in enumerate(BUSY) for _ in range(weight)]


def statements(database: str, rows: int, begin: datetime, seed: int) -> Iterator[tuple[str, int]]:
    """INSERTs, a day each, and how many rows each makes; together `rows` from `begin` on."""
    for day in range(DAYS):
        first, last = rows * day // DAYS, rows * (day + 1) // DAYS
        if last > first:
            start = int((begin + timedelta(days=day)).timestamp())
            yield _day(database, start, first, last - first, seed), last - first


def _day(database: str, start: int, first: int, count: int, seed: int) -> str:
    def draw(salt: int) -> str:
        """Evenly from 0 to 1, another number for each row and purpose."""
        return f"(cityHash64(n, {seed}, {salt}) / 18446744073709551616.0)"

    ms = f"{_HOURS}[1 + toUInt32({draw(1)} * {len(_HOURS)})] * 3600000 + toUInt64({draw(2)} * 3600000)"
    return f"""
        INSERT INTO {database}.usage_lines_raw (usage_id, request_id, tenant, key_id, user_id, model, alias, provider,
            worker, status, error_code, attempts, prompt_tokens, cached_tokens, completion_tokens, price_version,
            currency, cost, stream, accepted_at, finished_at, queue_ms, load_ms, ttft_ms, generation_ms,
            kafka_partition, kafka_offset, precedence)
        WITH
            number + {first} AS n,
            toUInt32(pow({draw(3)}, 3) * {TENANTS}) AS tenant_number,
            tenant_number * {KEYS_A_TENANT} + toUInt32(pow({draw(4)}, 2) * {KEYS_A_TENANT}) AS key_number,
            toUInt32(pow({draw(5)}, 2) * {MODELS}) AS model_number,
            toUInt64(20 + exp({draw(6)} * 7)) AS prompt,
            toUInt64(1 + exp({draw(7)} * 6)) AS completion,
            fromUnixTimestamp64Milli(toInt64({start} * 1000 + {ms}), 'UTC') AS accepted,
            toUInt64(exp({draw(8)} * 8)) AS queued,
            queued + toUInt64(20 + {draw(9)} * 400) AS first_token,
            {draw(10)} < 0.03 AS failed
        SELECT lower(hex(MD5(toString((n, {seed}))))) AS usage_id, usage_id, 'tenant-' || toString(tenant_number),
            'key-' || toString(key_number), 'user-' || toString(key_number % 97), 'model-' || toString(model_number),
            'alias-' || toString(model_number), 'provider-' || toString(model_number % 3),
            'worker-' || toString(toUInt32({draw(11)} * {WORKERS})), if(failed, 'failed', 'completed'),
            if(failed, 'provider_error', ''), 1, prompt, toUInt64(prompt * pow({draw(12)}, 4)), completion, 1, 'USD',
            toDecimal128(prompt * 15 + completion * 60, 18) / 100000000, 1, accepted,
            accepted + toIntervalMillisecond(first_token + completion * 20), queued,
            if({draw(13)} < 0.02, intDiv(queued, 2), 0), first_token, completion * 20, n % 12, n,
            9223372036854775808 - n
        FROM numbers({count})
    """  # noqa: S608  (numbers and names of this file)
