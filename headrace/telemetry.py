"""Metrics of a role: kept in Redis for the ingress's `/metrics`, and served on a port of its own if asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest, start_http_server
from prometheus_client.core import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from redis import asyncio as redis
from redis.exceptions import RedisError

from headrace.redis_client import connect
from headrace.settings import Settings

disable_created_metrics()  # type: ignore[no-untyped-call]

log = structlog.get_logger(__name__)

PREFIX = "hr:metrics:"
PUSH_EVERY_S = 5.0
KEPT_S = 16


async def serve_metrics(conf: Settings, role: str) -> None:
    """Push this process's metrics to Redis until cancelled; a Redis that is away is tried again, quietly."""
    if conf.metrics_port is not None:
        start_http_server(conf.metrics_port, addr=conf.host)
    client = connect(conf.redis_url)
    try:
        while True:
            try:
                await client.set(f"{PREFIX}{role}:{conf.instance}", generate_latest(REGISTRY), ex=KEPT_S)
            except (RedisError, OSError) as error:
                log.debug("metrics_push_failed", error=repr(error))
            await asyncio.sleep(PUSH_EVERY_S)
    finally:
        await client.aclose()


class _Merged(Collector):
    """The metric families of several processes, each sample labelled with its role and instance."""

    def __init__(self, texts: dict[tuple[str, str], str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[object]:  # type: ignore[override]
        families: dict[str, object] = {}
        for (role, instance), text in self._texts.items():
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(family.name, family)
                labelled = [
                    Sample(s.name, {**s.labels, "role": s.labels.get("role", role), "instance": instance}, s.value)
                    for s in family.samples
                ]
                if kept is family:
                    family.samples = labelled
                else:
                    kept.samples.extend(labelled)  # type: ignore[attr-defined]
        return families.values()


async def gather(client: redis.Redis, own: tuple[str, str]) -> bytes:
    """The metrics of every role that pushed of late, and of this process, in Prometheus's text format."""
    texts = {own: generate_latest(REGISTRY).decode()}
    keys = [key async for key in client.scan_iter(match=PREFIX + "*", count=500)]
    for key, value in zip(keys, await client.mget(keys) if keys else [], strict=True):
        role, _, instance = str(key, "utf-8").removeprefix(PREFIX).partition(":")
        if value is not None and (role, instance) != own:
            texts[role, instance] = value.decode() if isinstance(value, bytes) else value
    merged = CollectorRegistry()
    merged.register(_Merged(texts))
    return generate_latest(merged)
