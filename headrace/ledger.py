"""The ledger: does every accepted request have its one terminal, and every terminal its one usage? Pure.

At a fixed snapshot of offsets, the records of `inference.requests` are duplicates, unreadable ones, requests with a
terminal and requests in flight. A request that is in flight for longer than its deadline allows was lost.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from decimal import Decimal

import msgspec

from schemas.events import LogRecord, Terminal, UsageEvent
from topics.envelope import CANCEL_TYPE, EnvelopeError, Headers, envelope_of
from topics.request_log import LogView

_CANCELS = ("ce_type", CANCEL_TYPE.encode())
GRACE_MS = 60_000
"""What may pass between a deadline, or the arrival of an unreadable record, and its end."""
EXAMPLES = 5

Identity = tuple[str, str]
"""(tenant, request_id)."""


class TenantBalance(msgspec.Struct, frozen=True):
    """The balance of one tenant. `accepted` = `terminal` + `in_flight`."""

    accepted: int
    terminal: int
    in_flight: int
    usage_rows: int
    cost: dict[str, Decimal]
    """By currency, of the revision of each line that counts."""


class Ledger(msgspec.Struct, frozen=True):
    """The balance of one snapshot. `accepted` = terminal + in flight."""

    records: int
    accepted: int
    duplicates: int
    unreadable: int
    """Records without a valid envelope that are in dead.letters."""
    terminal: dict[str, int]
    """Requests by the status of their deciding terminal."""
    in_flight: int
    """Requests without a terminal, and records without a valid envelope that are not in dead.letters yet."""
    void_terminals: int
    """Terminals that do not decide: of fenced attempts, or after another."""
    usage_rows: int
    """Distinct usage ids of the accepted requests."""
    overdue: list[str]
    """Request ids, or `partition/offset` of unreadable records, that should have ended by now."""
    without_usage: list[str]
    """Requests with a terminal and no usage id."""
    doubled_usage: list[str]
    """Requests with more than one usage id."""
    tenants: dict[str, TenantBalance] = {}
    metering_lag: int = 0
    """Records of inference.log that metering has not handled."""

    @property
    def balanced(self) -> bool:
        """Whether records = duplicates + unreadable + terminal + in flight."""
        ended = sum(self.terminal.values())
        return self.records == self.duplicates + self.unreadable + ended + self.in_flight

    def problems(self) -> list[str]:
        """What does not add up, one sentence each; empty when all does."""
        found = []
        if not self.balanced:
            found.append(f"{self.records} records are not the sum of duplicates, unreadable, terminal and in flight")
        if self.overdue:
            found.append(f"{_named(self.overdue)} should have ended by now and did not")
        if self.without_usage and self.metering_lag:
            found.append(
                f"metering has {self.metering_lag} records to handle, so {_named(self.without_usage)} "
                "with a terminal have no usage yet; try again"
            )
        elif self.without_usage:
            found.append(f"{_named(self.without_usage)} with a terminal have no usage")
        if self.doubled_usage:
            found.append(f"{_named(self.doubled_usage)} have more than one usage id")
        return found


def _named(ids: Sequence[str]) -> str:
    noun = "request" if len(ids) == 1 else "requests"
    more = ", …" if len(ids) > EXAMPLES else ""
    return f"{len(ids)} {noun} ({', '.join(ids[:EXAMPLES])}{more})"


class Tally:
    """Folds records into a ledger: all requests first, then log, dead letters and usage in any order."""

    def __init__(self) -> None:
        self._records = 0
        self._due_ms: dict[Identity, int] = {}
        """When each accepted request should have ended."""
        self._places: dict[Identity, list[tuple[int, int]]] = {}
        """(partition, offset) of the records that name each of them."""
        self._nameless: dict[tuple[int, int], int] = {}
        """(partition, offset) of records without a valid envelope -> when they should be in dead.letters."""
        self._buried: set[tuple[int, int]] = set()
        self._not_accepted: set[tuple[int, int]] = set()
        self._views: dict[str, LogView] = defaultdict(LogView)
        self._terminal: dict[Identity, str] = {}
        self._void = 0
        self._usage: dict[Identity, dict[str, tuple[int, str, Decimal]]] = defaultdict(dict)
        """Of each request its usage ids, and of each the highest revision with its currency and cost."""

    def request(self, partition: int, offset: int, at_ms: int, headers: Headers) -> None:
        """A record of `inference.requests`; `at_ms` is its append time."""
        if any(pair == _CANCELS for pair in headers):
            return  # A publisher's wish about a request, which is none itself.
        self._records += 1
        try:
            envelope = envelope_of(headers)
        except EnvelopeError:
            self._nameless[partition, offset] = at_ms + GRACE_MS
            return
        identity = (envelope.tenant, envelope.request_id)
        self._places.setdefault(identity, []).append((partition, offset))
        self._due_ms.setdefault(identity, at_ms + int(envelope.deadline_s * 1000) + GRACE_MS)

    def log(self, record: LogRecord) -> None:
        """A record of `inference.log`, in offset order within its partition."""
        identity = (record.tenant, record.request_id)
        decided = self._views[record.tenant].apply(record)
        if decided is not None and identity in self._due_ms:
            self._terminal[identity] = decided.status.value
        elif decided is None and identity in self._due_ms and isinstance(record, Terminal):
            self._void += 1

    def dead_letter(self, source_partition: int, source_offset: int, *, accepted: bool = True) -> None:
        """A dead letter whose source is `inference.requests`; not `accepted`, it is due no terminal."""
        self._buried.add((source_partition, source_offset))
        if not accepted:
            self._not_accepted.add((source_partition, source_offset))

    def usage(self, event: UsageEvent) -> None:
        """A record of `usage.events`."""
        if (event.tenant, event.request_id) in self._due_ms:
            lines = self._usage[event.tenant, event.request_id]
            known = lines.get(event.usage_id)
            if known is None or event.revision > known[0]:
                lines[event.usage_id] = (event.revision, event.currency, event.cost)

    def without_usage(self) -> list[str]:
        """Ids of requests that have a terminal and no usage so far."""
        return sorted(request_id for tenant, request_id in self._terminal.keys() - self._usage.keys())

    def _leave_out_what_was_not_accepted(self) -> None:
        """What bears a name that nobody proved is no request of that name, but an unreadable record."""
        for identity in self._due_ms.keys() - self._terminal.keys():
            if all(place in self._not_accepted for place in self._places[identity]):
                self._nameless |= dict.fromkeys(self._places[identity], 0)
                del self._due_ms[identity]

    def close(self, now_ms: int, *, metering_lag: int = 0) -> Ledger:
        """The balance as of now."""
        self._leave_out_what_was_not_accepted()
        waiting = {identity: due for identity, due in self._due_ms.items() if identity not in self._terminal}
        unburied = {where: due for where, due in self._nameless.items() if where not in self._buried}
        overdue = [identity[1] for identity, due in waiting.items() if due < now_ms]
        overdue += [f"{partition}/{offset}" for (partition, offset), due in unburied.items() if due < now_ms]
        return Ledger(
            records=self._records,
            accepted=len(self._due_ms),
            duplicates=self._records - len(self._due_ms) - len(self._nameless),
            unreadable=len(self._nameless) - len(unburied),
            terminal=dict(sorted(Counter(self._terminal.values()).items())),
            in_flight=len(waiting) + len(unburied),
            void_terminals=self._void,
            usage_rows=sum(len(ids) for ids in self._usage.values()),
            overdue=sorted(overdue),
            without_usage=self.without_usage(),
            doubled_usage=sorted(request_id for (_, request_id), ids in self._usage.items() if len(ids) > 1),
            tenants=self._tenants(),
            metering_lag=metering_lag,
        )

    def _tenants(self) -> dict[str, TenantBalance]:
        accepted = Counter(tenant for tenant, _ in self._due_ms)
        ended = Counter(tenant for tenant, _ in self._terminal)
        rows: Counter[str] = Counter()
        cost: dict[str, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
        for (tenant, _), lines in self._usage.items():
            rows[tenant] += len(lines)
            for _, currency, money in lines.values():
                cost[tenant][currency] += money
        return {
            tenant: TenantBalance(
                count, ended[tenant], count - ended[tenant], rows[tenant], dict(sorted(cost[tenant].items()))
            )
            for tenant, count in sorted(accepted.items())
        }
