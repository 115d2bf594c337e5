"""The catalogue of topics: the one place that says which topics exist, how they are keyed, kept and sized.

`headrace topics apply` makes the broker match it; `headrace topics docs` writes AsyncAPI and JSON Schemas from it.
Partition counts of ordered topics never change: order and fences live within a partition.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from aiokafka.partitioner import murmur2

from schemas import audit, control, events

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Largest request body that an ingress or a direct publisher may send."""
MAX_RESULT_BYTES = 16 * 1024 * 1024
"""Largest answer that a terminal record may hold."""
HEADROOM_BYTES = 1024 * 1024
"""Room for headers, the record batch and the dead-letter wrap."""
MAX_MESSAGE_BYTES = MAX_RESULT_BYTES + HEADROOM_BYTES
"""Largest message of any topic; producers and consumers are built for it."""

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic. `retention_ms` None keeps for ever; `schema` is the msgspec type of the value, None for raw bytes."""

    name: str
    partitions: int
    key: str
    carries: str
    schema: object | None = None
    cleanup: str = "delete"
    retention_ms: int | None = None
    max_message_bytes: int = 1024 * 1024
    append_time: bool = False
    """Whether the broker's clock stamps records (`LogAppendTime`)."""
    extra: dict[str, str] = field(default_factory=dict)

    def partition_of(self, key: str) -> int:
        """The partition that records with this key are on: Kafka's default partitioner, as our producers use it."""
        return int(murmur2(key.encode()) & 0x7FFFFFFF) % self.partitions

    def config(self) -> dict[str, str]:
        """The topic's configuration on the broker."""
        settings = {
            "cleanup.policy": self.cleanup,
            "max.message.bytes": str(self.max_message_bytes),
            "message.timestamp.type": "LogAppendTime" if self.append_time else "CreateTime",
        }
        if "delete" in self.cleanup:
            settings["retention.ms"] = str(self.retention_ms if self.retention_ms is not None else -1)
        if self.retention_ms is not None and "delete" in self.cleanup:
            settings["segment.ms"] = str(min(self.retention_ms // 4, DAY_MS))
        elif "compact" in self.cleanup:
            settings["segment.ms"] = str(6 * HOUR_MS)
        return settings | self.extra


FIRST_PUBLISHED = 4096
"""Reply partitions from here on are those of `inference.published`; ingresses read lower ones."""
SIX = 6
"""Six partitions spread evenly over 1, 2, 3 or 6 members of a group, and cost an idle broker little."""

REQUESTS = Topic(
    "inference.requests",
    SIX,
    "request_id",
    "The OpenAI body as sent; the envelope stands in the headers.",
    retention_ms=DAY_MS,
    max_message_bytes=MAX_BODY_BYTES + HEADROOM_BYTES,
    append_time=True,
    # The brokers unpack what publishers packed, by whichever codec and however small: no reader has to, or could not.
    extra={"compression.type": "uncompressed"},
)
ROUTED = Topic(
    "inference.routed",
    8,
    "pool",
    "Admitted requests; a partition is the unit of scheduler ownership, so 8 pools run apart.",
    schema=events.Routed,
    retention_ms=DAY_MS,
    append_time=True,
)
REPLIES = Topic(
    "inference.replies",
    8,
    "explicit partition",
    "Frames of deltas and fences; an ingress replica reads one partition.",
    retention_ms=HOUR_MS,
    max_message_bytes=MAX_MESSAGE_BYTES,
    append_time=True,
)
LOG = Topic(
    "inference.log",
    SIX,
    "request_id",
    "Attempts and terminals: what decides.",
    schema=events.LogRecord,
    retention_ms=7 * DAY_MS,
    max_message_bytes=MAX_MESSAGE_BYTES,
    append_time=True,
)
PUBLISHED = Topic(
    "inference.published",
    SIX,
    "explicit partition",
    "Frames of direct publishers' requests, on the partition number of their log records, so that one reader has both.",
    retention_ms=HOUR_MS,
    max_message_bytes=MAX_MESSAGE_BYTES,
    append_time=True,
)
EVENTS = Topic(
    "inference.events",
    SIX,
    "request_id",
    "Lifecycle steps; informational.",
    schema=events.LifecycleEvent,
    retention_ms=7 * DAY_MS,
)
CANCELLATIONS = Topic(
    "inference.cancellations",
    1,
    "request_id",
    "Wishes to end a request; every scheduler reads them all, so one partition.",
    schema=events.Cancellation,
    retention_ms=DAY_MS,
    append_time=True,
)
USAGE = Topic(
    "usage.events",
    SIX,
    "tenant",
    "One metered usage a request; kept for ever, it is money.",
    schema=events.UsageEvent,
)
POOL_TERMS = Topic(
    "pool.terms",
    1,
    "pool",
    "A record's offset is the term of the scheduler that wrote it; one partition, so terms compare.",
    schema=events.PoolTerm,
    cleanup="compact",
)
LEASES = Topic(
    "vram.leases",
    1,
    "lease_id/term",
    "Leases; a granted record's offset is its epoch; one partition, so epochs compare.",
    schema=events.LeaseEvent,
    cleanup="compact",
)
LIVE = Topic(
    "scheduler.live",
    8,
    "request_id",
    "Requests without a terminal, on the partition number of their pool's routed records.",
    schema=events.LiveRequest,
    cleanup="compact",
    extra={"delete.retention.ms": str(DAY_MS)},
)
POOL_STATUS = Topic(
    "pool.status",
    1,
    "pool",
    "Readiness and backlog of pools, for ingress.",
    schema=events.PoolStatus,
    cleanup="compact,delete",
    retention_ms=HOUR_MS,
)
POOL_COMMANDS = Topic(
    "pool.commands",
    1,
    "pool",
    "Wishes of operators to a pool's scheduler: load, unload, release; one partition, so offsets say what was obeyed.",
    schema=events.PoolCommand,
    retention_ms=HOUR_MS,
    append_time=True,
)
WORKER_STATUS = Topic(
    "worker.status",
    1,
    "worker",
    "Heartbeats of workers, for schedulers.",
    schema=events.WorkerStatus,
    cleanup="compact,delete",
    retention_ms=HOUR_MS,
)
INGRESS_STATUS = Topic(
    "ingress.status",
    1,
    "instance",
    "Heartbeats of ingresses, for schedulers: whose callers are gone.",
    schema=events.IngressStatus,
    cleanup="compact,delete",
    retention_ms=HOUR_MS,
)
MODEL_FACTS = Topic(
    "model.facts",
    1,
    "worker/model",
    "What workers found models to be: context, parameters, quantisation, template, capabilities; one record a change.",
    schema=events.ModelCard,
    cleanup="compact",
)
CONTROL_COMMANDS = Topic(
    "control.commands",
    1,
    "kind/key",
    "Wishes to change the control plane; one partition, so one order.",
    schema=control.ControlCommand,
    retention_ms=7 * DAY_MS,
    append_time=True,
)
CONTROL_PROVIDERS = Topic(
    "control.providers",
    1,
    "name",
    "Providers in force.",
    schema=control.Provider,
    cleanup="compact",
)
CONTROL_MODELS = Topic("control.models", 1, "id", "Models in force.", schema=control.Model, cleanup="compact")
CONTROL_APPS = Topic("control.apps", 1, "id", "Apps (tenants) in force.", schema=control.App, cleanup="compact")
CONTROL_USERS = Topic("control.users", 1, "id", "Users in force.", schema=control.User, cleanup="compact")
CONTROL_KEYS = Topic("control.keys", 1, "sha256", "API keys in force.", schema=control.Key, cleanup="compact")
CONTROL_PRICES = Topic(
    "control.prices",
    1,
    "model/version",
    "Every price that ever was in force; money, so kept for ever.",
    schema=control.Price,
    cleanup="compact",
)
CONTROL_REPLAYS = Topic(
    "control.replays",
    1,
    "letter",
    "Dead letters that were sent again, so that each is once; kept for as long as any letter.",
    schema=control.Replay,
    cleanup="compact,delete",
    retention_ms=30 * DAY_MS,
)
CONTROL_ERASURES = Topic(
    "control.erasures",
    1,
    "subject",
    "Whose content is erased, and since when; kept for ever, so that no rebuild brings it back.",
    schema=control.Erasure,
    cleanup="compact",
)
AUDIT_EVENTS = Topic(
    "audit.events",
    1,
    "seq",
    "Who changed, wished for, looked at or was refused what; one partition, so one chain of hashes.",
    schema=audit.AuditEvent,
    retention_ms=400 * DAY_MS,
    append_time=True,
)
AUDIT_HEADS = Topic(
    "audit.heads",
    1,
    "UTC day",
    "The last audit event of each day, by sequence and hash: what the chain is checked against; kept for ever.",
    schema=audit.AuditHead,
    cleanup="compact",
    append_time=True,
)
DEAD_LETTERS = Topic(
    "dead.letters",
    1,
    "source topic",
    "Messages that could not be handled, as they were; the reason is in the headers.",
    retention_ms=14 * DAY_MS,
    max_message_bytes=MAX_MESSAGE_BYTES + HEADROOM_BYTES,
)

CATALOGUE: tuple[Topic, ...] = (
    REQUESTS, ROUTED, REPLIES, LOG, PUBLISHED, EVENTS, CANCELLATIONS, USAGE,
    POOL_TERMS, LEASES, LIVE, POOL_STATUS, POOL_COMMANDS, WORKER_STATUS, INGRESS_STATUS,
    MODEL_FACTS,
    CONTROL_COMMANDS, CONTROL_PROVIDERS, CONTROL_MODELS, CONTROL_APPS, CONTROL_USERS, CONTROL_KEYS,
    CONTROL_PRICES, CONTROL_REPLAYS, CONTROL_ERASURES,
    AUDIT_EVENTS, AUDIT_HEADS, DEAD_LETTERS,
)  # fmt: skip


def published_partition(request_id: str) -> int:
    """The reply partition of a direct publisher's request: it has no ingress, and so none of those that they read."""
    return FIRST_PUBLISHED + LOG.partition_of(request_id)


def is_published(reply_partition: int) -> bool:
    """Whether a reply partition is that of a direct publisher's request."""
    return FIRST_PUBLISHED <= reply_partition < FIRST_PUBLISHED + PUBLISHED.partitions


def frames_at(reply_partition: int) -> tuple[Topic, int]:
    """The topic, and the partition of it, that hold the frames of requests with this reply partition."""
    if is_published(reply_partition):
        return PUBLISHED, reply_partition - FIRST_PUBLISHED
    return REPLIES, reply_partition


def answers_of(app: str) -> Topic:
    """The topic of the answers to an app's direct publishers; it is made when the app gets its first publisher."""
    return Topic(
        f"replies.{app}",
        3,
        "request_id",
        "Answers to the requests that this app's publishers wrote: chunks, where they asked for them, and results.",
        retention_ms=DAY_MS,
        max_message_bytes=MAX_MESSAGE_BYTES,
        append_time=True,
    )


def worker_commands(worker_id: str) -> Topic:
    """The command topic of one worker; forgetting a worker deletes its topic."""
    return Topic(
        f"worker.{worker_id}.commands",
        1,
        "none",
        "Terms, loads, generates and cancels for one worker, in one order.",
        schema=events.Command,
        retention_ms=HOUR_MS,
        append_time=True,
    )


CONTROL_RECORDS: dict[str, Topic] = {
    "providers": CONTROL_PROVIDERS,
    "models": CONTROL_MODELS,
    "apps": CONTROL_APPS,
    "users": CONTROL_USERS,
    "keys": CONTROL_KEYS,
    "replays": CONTROL_REPLAYS,
    "erasures": CONTROL_ERASURES,
}
"""The compacted topic of each kind of control record."""
