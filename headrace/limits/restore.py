"""What limits hold in Redis, made anew from Kafka: the month's spend, what is reserved, the last minute's requests.

The spend is that of `usage.events`, and of the terminals that metering has not come to yet; reserved is what was
accepted and has no terminal, whether it is routed or not. Both are counted up to fixed offsets of `inference.log`,
which Redis gets in the same step: settlement goes on from there, and settles again whatever it had settled beyond. So
this is right beside live traffic too, where admissions go on. On a server that came back empty, or from an old
snapshot, nothing is admitted until it is done.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import msgspec
import structlog
from aiokafka import TopicPartition
from redis.asyncio import Redis

from headrace.asked import read
from headrace.choice import named, not_found
from headrace.errors import ModelNotFound
from headrace.limits import lua
from headrace.limits.amounts import PICO, TEMPLATE_TOKENS, Worst, pico, worst_case
from headrace.limits.charge import charge, payers
from headrace.limits.limiter import RESTORE, RESTORE_ACCEPTED, Limiter, admit_arguments, ref_of
from headrace.limits.months import month_of, month_start_ms
from headrace.limits.scopes import Scope, scopes_of
from headrace.projection import Projection
from headrace.registry import snapshot_of
from schemas.control import TASKS, App, Key, Model, Price
from schemas.events import Routed, Status
from topics import request_log
from topics.catalogue import DAY_MS, LOG, REQUESTS, ROUTED, USAGE, Topic
from topics.clients import LogReader
from topics.cluster import Cluster
from topics.envelope import Envelope, EnvelopeError, parse

log = structlog.get_logger(__name__)

FETCH_BYTES = 1024 * 1024
CLOCK_SLACK_MS = 60_000
"""Producers stamp usage events by their own clocks."""
WINDOW_MS = 60_000
MAX_AGE_MS = 600_000
"""The router refuses requests that are older than this when it comes to them."""
CHUNK = 500


class _Paid(msgspec.Struct):
    """The part of a usage event that is money."""

    request_id: str
    tenant: str
    key_id: str
    status: Status
    cost: Decimal
    accepted_ms: int


_paid = msgspec.json.Decoder(_Paid)
_routed = msgspec.json.Decoder(Routed)


class Records:
    """The keys, apps and models whose limits are in force."""

    def __init__(self, keys: Iterable[bytes], apps: Iterable[bytes], models: Iterable[bytes]) -> None:
        """Of records as JSON."""
        self._keys = {key.id: key for key in (msgspec.json.decode(raw, type=Key) for raw in keys)}
        self._apps = {app.id: app for app in (msgspec.json.decode(raw, type=App) for raw in apps)}
        self._snapshot = snapshot_of(list(models), [], [], 0)
        self._models = self._snapshot.models

    def scopes(self, routed: Routed) -> tuple[Scope, ...]:
        """Whose limits a routed request was admitted against."""
        key, model = self._keys.get(routed.key_id), self._models.get(routed.model)
        if model is None:
            model = Model(id=routed.model, provider="", backend_tag="")
        return scopes_of(
            key if key is not None and key.app == routed.tenant else None, self._apps.get(routed.tenant), model
        )

    def accepted(self, envelope: Envelope, value: bytes, default_output: int) -> tuple[tuple[Scope, ...], Worst, str]:
        """Whose limits a request concerns that is not routed yet, what it may come to, and on which model.

        Where the router is to choose, that is the dearest of them all; it reserves anew for the one that it takes.
        Raises `msgspec.MsgspecError` when it is no request, `ModelNotFound` when no model serves it.
        """
        asked = read(value)
        model = named(self._snapshot, asked.model)
        options = [model] if model is not None else [one for one in self._models.values() if asked.model in TASKS]
        if not options:
            raise not_found(asked.model)
        worst, model_id = max((worst_case(asked, len(value), one, default_output), one.id) for one in options)
        key = self._keys.get(envelope.key_id)
        mine = key if key is not None and key.app == envelope.tenant else None
        return scopes_of(mine, self._apps.get(envelope.tenant), self._models[model_id]), worst, model_id

    def worst(self, routed: Routed) -> Worst:
        """The most that a routed request may come to, as its router reckoned it, or a little more."""
        model = self._models.get(routed.model)
        context = model.context_length if model is not None else 0
        body = len(bytes(routed.body))
        prompt = min(body + TEMPLATE_TOKENS, context) if body and context else context or routed.prompt_tokens_estimate
        completion = (routed.max_tokens or context) * max(1, routed.choices)
        price = routed.price or Price(0, Decimal(0), Decimal(0), Decimal(0))
        dearest = msgspec.structs.replace(price, input=max(price.input, price.cached))
        return Worst(prompt + completion, pico(dearest.cost(prompt, 0, completion)), routed.max_tokens or 0)


@dataclass(slots=True)
class Found:
    """What Kafka says of a month, up to some offsets of the log."""

    month: str
    spent: dict[str, int] = field(default_factory=dict)
    """Scope -> money, in units of 10⁻¹²."""
    offsets: dict[int, int] = field(default_factory=dict)
    """Partition of the log -> the offset up to which it was counted."""
    ended: dict[str, int] = field(default_factory=dict)
    """Request of the last day that has its terminal -> the tokens that it came to."""
    routed: list[Routed] = field(default_factory=list)
    """Requests of the last day that have none, and those of the last minute."""
    metered: set[bytes] = field(default_factory=set)
    accepted: list[tuple[Envelope, bytes, int]] = field(default_factory=list)
    """Requests that may still be routed, each with its body and when it was accepted (Unix ms)."""

    def pay(self, scopes: Sequence[str], units: int) -> None:
        """Add to what scopes have spent."""
        for scope in scopes:
            self.spent[scope] = self.spent.get(scope, 0) + units


async def restore(cluster: Cluster, instance: str, redis: Redis, default_output: int) -> int:
    """Make the limits anew, by the control plane in force; how many reservations are held now that were not before.

    Raises `RedisError`, `KafkaError` or `Unavailable`.
    """
    limiter, projection = Limiter(redis), Projection(redis)
    records = Records(*[await projection.records(kind) for kind in ("keys", "apps", "models")])
    state = await limiter.state()
    now_ms = state.now_us // 1000
    async with LogReader(cluster, f"restore-limits-{instance}", max_wait_ms=100, fetch_bytes=FETCH_BYTES) as reader:
        found = await _read(reader, now_ms)
    if not state.whole:
        await _clear(redis)
    restored = 0
    for routed in found.routed:
        restored += await _hold(redis, routed, found, records, refill=not state.whole)
    for envelope, value, accepted_ms in found.accepted:
        restored += await _accept(redis, envelope, value, accepted_ms, records, default_output)
    await _put_into_force(redis, found)
    if state.whole:
        await _give_back(limiter, found)
    log.info("limits_restored", month=found.month, scopes=len(found.spent), reservations=restored)
    return restored


# --- reading ------------------------------------------------------------------------------------------------------


async def _read(reader: LogReader, now_ms: int) -> Found:
    """Usage first: all that it tells of has its terminal before the ends of the log as they are afterwards."""
    found = Found(month_of(now_ms))
    assignment = await _since(reader, USAGE, month_start_ms(found.month) - CLOCK_SLACK_MS)
    async for record in reader.read_to_end(assignment):
        try:
            paid = _paid.decode(record.value or b"")
        except msgspec.MsgspecError:
            continue  # the sink buries it
        name = bytes.fromhex(paid.request_id) + paid.tenant.encode()
        if name not in found.metered:
            found.metered.add(name)
            if month_of(paid.accepted_ms or record.timestamp) == found.month:
                found.pay(payers(paid.key_id, paid.tenant), pico(paid.cost))
    await _log(reader, found, now_ms)
    asked: list[tuple[Envelope, bytes, int]] = []
    assignment = await _since(reader, REQUESTS, now_ms - MAX_AGE_MS)
    async for record in reader.read_to_end(assignment):
        with contextlib.suppress(EnvelopeError):  # the router buries it
            envelope = parse(record.headers)
            if envelope.request_id not in found.ended:
                asked.append((envelope, record.value or b"", record.timestamp))
    seen: set[str] = set()
    assignment = await _since(reader, ROUTED, now_ms - DAY_MS)
    async for record in reader.read_to_end(assignment):
        try:
            routed = _routed.decode(record.value or b"")
        except msgspec.MsgspecError:
            continue
        seen.add(routed.request_id)
        recent = routed.accepted_ms > now_ms - WINDOW_MS
        if recent or routed.request_id not in found.ended:
            found.routed.append(routed)
    found.accepted = [one for one in asked if one[0].request_id not in seen]
    return found


async def _log(reader: LogReader, found: Found, now_ms: int) -> None:
    view = request_log.LogView()
    assignment = await _since(reader, LOG, now_ms - DAY_MS)
    async for record in reader.read_to_end(assignment):
        found.offsets[record.partition] = record.offset + 1
        try:
            terminal = view.apply(request_log.decode(record.value or b""))
        except msgspec.MsgspecError:
            continue
        if terminal is None:
            continue
        due = charge(terminal, record.offset, record.timestamp)
        found.ended[terminal.request_id] = due.tokens
        name = bytes.fromhex(terminal.request_id) + terminal.tenant.encode()
        if due.month == found.month and name not in found.metered:
            found.pay(due.payers, due.units)
    for tp in assignment:
        found.offsets.setdefault(tp.partition, await reader.position(tp))


async def _since(reader: LogReader, topic: Topic, since_ms: int) -> list[TopicPartition]:
    assignment = reader.assign([topic])
    await reader.seek_to_time(assignment, since_ms)
    return assignment


# --- writing ------------------------------------------------------------------------------------------------------


async def _clear(redis: Redis) -> None:
    """Forget what is not known to be complete; a script looks again whether that is still so."""
    clear = redis.register_script(lua.CLEAR)
    names: list[bytes | str] = []
    async for name in redis.scan_iter(f"{lua.PREFIX}*", count=1000):
        names.append(name)
        if len(names) >= CHUNK:
            await clear(args=names)
            names = []
    await clear(args=names)


async def _hold(redis: Redis, routed: Routed, found: Found, records: Records, *, refill: bool) -> int:
    """Reserve for a request that runs, or count one of the last minute; 1 where that made a reservation."""
    scopes = records.scopes(routed)
    if not scopes:
        return 0
    if routed.request_id in found.ended:
        windows = [scope.name for scope in scopes if scope.rpm is not None or scope.tpm is not None]
        if refill and windows:
            ref, tokens = ref_of(routed.tenant, routed.request_id), found.ended[routed.request_id]
            await redis.register_script(lua.REFILL)(args=[ref, routed.accepted_ms * 1000, tokens, *windows])
        return 0
    arguments = admit_arguments(
        routed.tenant, routed.request_id, scopes, records.worst(routed), routed.model,
        mode=RESTORE, month=month_of(routed.accepted_ms), accepted_us=routed.accepted_ms * 1000,
    )  # fmt: skip
    told = await redis.register_script(lua.ADMIT)(args=arguments)
    return int(bytes(told[0]) == b"admitted")


async def _accept(
    redis: Redis, envelope: Envelope, value: bytes, accepted_ms: int, records: Records, default_output: int
) -> int:
    """Reserve for a request that its router has not come to; 1 where that made a reservation."""
    try:
        scopes, worst, model = records.accepted(envelope, value, default_output)
    except (msgspec.MsgspecError, ModelNotFound):
        return 0  # the router says so
    if not scopes:
        return 0
    arguments = admit_arguments(
        envelope.tenant, envelope.request_id, scopes, worst, model,
        mode=RESTORE_ACCEPTED, month=month_of(accepted_ms), accepted_us=accepted_ms * 1000,
    )  # fmt: skip
    return int(bytes((await redis.register_script(lua.ADMIT)(args=arguments))[0]) == b"admitted")


async def _put_into_force(redis: Redis, found: Found) -> None:
    name = f"{lua.PREFIX}spend-{secrets.token_hex(8)}"
    spent = {scope: "{} {}".format(*divmod(units, PICO)) for scope, units in found.spent.items() if units}
    items = list(spent.items())
    for start in range(0, len(items), CHUNK):
        await redis.hset(name, mapping=dict(items[start : start + CHUNK]))
        await redis.expire(name, 900)
    offsets = [f"{partition} {offset}" for partition, offset in found.offsets.items()]
    await redis.register_script(lua.FLIP)(args=[name, found.month, len(offsets), *offsets])


async def _give_back(limiter: Limiter, found: Found) -> None:
    """Give back what requests hold that had ended before the offsets that settlement goes on from."""
    for ref, _ in (await limiter.open(bound_us=0, limit=10**9)).oldest:
        if ref.rpartition(":")[2] in found.ended:
            await limiter.reap(ref)
