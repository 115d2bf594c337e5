"""Makes a broker match the catalogue: creates what is missing, amends what is safe, refuses what would destroy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from headrace.settings import Settings
from topics.catalogue import CATALOGUE, Topic, worker_commands
from topics.clients import admin_client

log = structlog.get_logger(__name__)

LEADER_TIMEOUT_S = 30.0
_TOPIC_SOURCE = 1
"""`config_source` of a value that was set on the topic itself (DescribeConfigs v1 and later)."""


class ApplyError(Exception):
    """The broker refused, or a topic differs in a way that must not be changed by machine."""


@dataclass(frozen=True, slots=True)
class Actual:
    """A topic as it is on the broker: its partitions, its whole configuration, and what was set on it alone."""

    partitions: int
    config: Mapping[str, str]
    overrides: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """A topic whose configuration is to be amended: `config` is the whole set of overrides to write."""

    topic: str
    config: Mapping[str, str]
    says: tuple[str, ...]


def wanted_config(topic: Topic, settings: Settings) -> dict[str, str]:
    """The configuration that a topic should have in this deployment."""
    return topic.config() | {"min.insync.replicas": str(settings.kafka_min_insync)}


def difference(topic: Topic, actual: Actual, wanted: Mapping[str, str], *, shorter: bool = False) -> Change | None:
    """What has to be amended; None when all is well. `shorter` allows a shorter retention.

    Raises `ApplyError` when the change would lose records or order.
    """
    refusals = []
    if actual.partitions != topic.partitions:
        refusals.append(
            f"partitions: have {actual.partitions}, want {topic.partitions}; order and fences live within a partition, "
            "so the count never changes. Make the topic anew, or restore the catalogue"
        )
    changed = {name: value for name, value in wanted.items() if actual.config.get(name) != value}
    have_policy, want_policy = actual.config.get("cleanup.policy", "delete"), wanted["cleanup.policy"]
    if "cleanup.policy" in changed:
        refusals.append(
            f"cleanup.policy: have {have_policy}, want {want_policy}; records would be lost that the other policy keeps"
        )
    if "retention.ms" in changed and not shorter:
        have, want = _duration(actual.config.get("retention.ms", "-1")), _duration(wanted["retention.ms"])
        if want < have:
            refusals.append(
                f"retention.ms: have {actual.config.get('retention.ms')}, want {wanted['retention.ms']}; "
                "say --allow-shorter-retention to drop what is older"
            )
    if refusals:
        raise ApplyError("\n".join(f"topic {topic.name}: {refusal}" for refusal in refusals))
    if not changed:
        return None
    says = tuple(f"{name}: {actual.config.get(name)} -> {value}" for name, value in sorted(changed.items()))
    return Change(topic.name, {**actual.overrides, **wanted}, says)


def _duration(milliseconds: str) -> float:
    return float("inf") if int(milliseconds) < 0 else float(milliseconds)


def catalogue_for(workers: Sequence[str]) -> list[Topic]:
    """All topics of a deployment with these workers."""
    return [*CATALOGUE, *(worker_commands(worker) for worker in workers)]


async def apply_all(settings: Settings, *, workers: Sequence[str], allow_shorter_retention: bool = False) -> list[str]:
    """Make the broker match the catalogue and wait for leaders; says what was done, a line a topic.

    Raises `ApplyError` naming topic, have and want, and then changes nothing.
    """
    topics = catalogue_for(workers)
    async with admin_client(settings.kafka, f"topics-{settings.instance}") as admin:
        existing = await actual_topics(admin, {topic.name for topic in topics})
        missing = [topic for topic in topics if topic.name not in existing]
        changes = _plan(
            settings, [topic for topic in topics if topic.name in existing], existing, allow_shorter_retention
        )
        await _create(admin, settings, missing)
        await _amend(admin, changes)
        await _wait_for_leaders(admin, topics)
    done = [f"created {topic.name} ({topic.partitions} partitions)" for topic in missing]
    done += [f"amended {change.topic} ({'; '.join(change.says)})" for change in changes]
    log.info("topics_applied", created=len(missing), amended=len(changes), total=len(topics))
    return done


async def ensure(settings: Settings, topic: Topic) -> bool:
    """Make one topic if it is not there, and wait for its leaders; whether it was made. Raises `ApplyError`."""
    async with admin_client(settings.kafka, f"topics-{settings.instance}") as admin:
        missing = topic.name not in await admin.list_topics()
        await _create(admin, settings, [topic] if missing else [])
        await _wait_for_leaders(admin, [topic])
    return missing


def _plan(settings: Settings, topics: Sequence[Topic], existing: Mapping[str, Actual], shorter: bool) -> list[Change]:
    changes, refusals = [], []
    for topic in topics:
        try:
            change = difference(topic, existing[topic.name], wanted_config(topic, settings), shorter=shorter)
        except ApplyError as refusal:
            refusals.append(str(refusal))
        else:
            changes += [change] if change is not None else []
    if refusals:
        raise ApplyError("\n".join(refusals))
    return changes


async def actual_topics(admin: AIOKafkaAdminClient, names: set[str]) -> dict[str, Actual]:
    """Those of the named topics that exist, as they are."""
    described: list[dict[str, Any]] = [topic for topic in await admin.describe_topics() if topic["topic"] in names]
    if not described:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic["topic"]) for topic in described]
    configs: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    for response in await admin.describe_configs(resources):
        for code, message, _, name, entries in response.resources:
            if code:
                raise ApplyError(
                    f"topic {name}: its configuration cannot be read: {message or for_code(code).__name__}"
                )
            whole = {entry[0]: entry[1] for entry in entries}
            configs[name] = whole, {entry[0]: entry[1] for entry in entries if entry[3] == _TOPIC_SOURCE}
    return {
        topic["topic"]: Actual(len(topic["partitions"]), *configs[topic["topic"]])
        for topic in described
        if topic["topic"] in configs
    }


async def _create(admin: AIOKafkaAdminClient, settings: Settings, topics: Sequence[Topic]) -> None:
    if not topics:
        return
    response = await admin.create_topics(
        [
            NewTopic(
                topic.name, topic.partitions, settings.kafka_replication, topic_configs=wanted_config(topic, settings)
            )
            for topic in topics
        ]
    )
    refusals = [
        f"topic {name}: {message or for_code(code).__name__}"
        for name, code, message in response.topic_errors
        if code and for_code(code) is not TopicAlreadyExistsError  # Another `topics apply` was faster.
    ]
    if refusals:
        raise ApplyError("\n".join(refusals))


async def _amend(admin: AIOKafkaAdminClient, changes: Sequence[Change]) -> None:
    """Write whole override sets: AlterConfigs replaces all of them, so those that were set by others are sent again."""
    if not changes:
        return
    resources = [ConfigResource(ConfigResourceType.TOPIC, change.topic, dict(change.config)) for change in changes]
    refusals = [
        f"topic {name}: {message or for_code(code).__name__}"
        for response in await admin.alter_configs(resources)
        for code, message, _, name in response.resources
        if code
    ]
    if refusals:
        raise ApplyError("\n".join(refusals))
    await _wait_until_shown(admin, changes)


async def _wait_until_shown(admin: AIOKafkaAdminClient, changes: Sequence[Change]) -> None:
    """Return when the broker describes what was written; the controller tells it a moment later."""
    waiting = {change.topic: dict(change.config) for change in changes}
    try:
        async with asyncio.timeout(LEADER_TIMEOUT_S):
            while waiting:
                shown = await actual_topics(admin, set(waiting))
                waiting = {name: config for name, config in waiting.items() if dict(shown[name].overrides) != config}
                if waiting:
                    await asyncio.sleep(0.05)
    except TimeoutError:
        raise ApplyError(f"amended, but not shown within {LEADER_TIMEOUT_S:g} s: {', '.join(waiting)}") from None


async def _wait_for_leaders(admin: AIOKafkaAdminClient, topics: Sequence[Topic]) -> None:
    """Return when every partition has a leader, so that the first produce or fetch does not have to wait."""
    wanted = {topic.name: topic.partitions for topic in topics}
    waiting = set(wanted)
    try:
        async with asyncio.timeout(LEADER_TIMEOUT_S):
            while waiting:
                waiting = _leaderless(await admin.describe_topics(), wanted)
                if waiting:
                    await asyncio.sleep(0.05)
    except TimeoutError:
        raise ApplyError(f"no leader within {LEADER_TIMEOUT_S:g} s: {', '.join(sorted(waiting))}") from None
    except KafkaError as error:
        raise ApplyError(f"the brokers do not answer: {error!r}") from error


def _leaderless(described: Sequence[Mapping[str, Any]], wanted: Mapping[str, int]) -> set[str]:
    led = {
        topic["topic"]: sum(
            not partition["error_code"] and partition["leader"] >= 0 for partition in topic["partitions"]
        )
        for topic in described
        if not topic["error_code"]
    }
    return {name for name, partitions in wanted.items() if led.get(name, 0) < partitions}
