"""The ledger adds up, and says so when it does not."""

from __future__ import annotations

from decimal import Decimal

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from headrace.ledger import GRACE_MS, Tally, TenantBalance
from schemas.events import AttemptOpened, Status, Terminal, UsageEvent
from topics.envelope import CANCEL_TYPE, Envelope

NOW = 1_800_000_000_000
DEADLINE_S = 600.0


def headers(request_id: str, tenant: str = "t") -> list[tuple[str, bytes]]:
    return Envelope(
        request_id=request_id,
        source="/test",
        time_ms=NOW,
        tenant=tenant,
        key_id="k",
        reply_partition=0,
        digest="d",
        deadline_s=DEADLINE_S,
    ).headers()


def rid(number: int) -> str:
    return f"{number:032x}"


def terminal(number: int, status: Status = Status.COMPLETED, attempt: int = 1, tenant: str = "t") -> Terminal:
    return Terminal(request_id=rid(number), tenant=tenant, attempt=attempt, epoch=1, status=status)


def opened(number: int, attempt: int) -> AttemptOpened:
    return AttemptOpened(rid(number), "t", attempt, 1, "w1", "worker lost", NOW)


def usage(number: int, usage_id: str = "u", tenant: str = "t") -> UsageEvent:
    return UsageEvent(
        usage_id=f"{usage_id}{number}", request_id=rid(number), tenant=tenant, key_id="k", model="m", alias="m",
        provider="p", worker="w", status=Status.COMPLETED, attempts=1, prompt_tokens=1, cached_tokens=0,
        completion_tokens=1, reasoning_tokens=0, estimated=False, price_version=1, currency="USD", cost=Decimal(0),
        stream=False, accepted_ms=NOW, finished_ms=NOW, queue_ms=0, ttft_ms=0, generation_ms=0,
    )  # fmt: skip


def test_an_empty_topic_adds_up() -> None:
    ledger = Tally().close(NOW)
    assert ledger.records == 0
    assert ledger.problems() == []


def test_every_kind_of_record_is_counted_once() -> None:
    tally = Tally()
    for offset, number in enumerate((1, 2, 3, 1, 4)):
        tally.request(0, offset, NOW, headers(rid(number)))
    tally.request(0, 5, NOW, [("ce_id", b"not an envelope")])
    tally.log(terminal(1))
    tally.log(terminal(2, Status.FAILED))
    tally.log(terminal(2, Status.COMPLETED))
    tally.log(opened(4, 2))
    tally.log(terminal(4, attempt=1))
    tally.dead_letter(0, 5)
    tally.usage(usage(1))
    tally.usage(usage(1))
    tally.usage(usage(2))
    ledger = tally.close(NOW)
    assert (ledger.records, ledger.accepted, ledger.duplicates, ledger.unreadable) == (6, 4, 1, 1)
    assert ledger.terminal == {"completed": 1, "failed": 1}
    assert (ledger.in_flight, ledger.void_terminals, ledger.usage_rows) == (2, 2, 2)
    assert ledger.problems() == []


def test_what_nobody_proved_to_have_sent_is_no_request() -> None:
    tally = Tally()
    tally.request(0, 0, NOW, headers(rid(1)))
    tally.request(0, 1, NOW, headers(rid(1)))
    tally.request(0, 2, NOW, headers(rid(2)))
    tally.request(0, 3, NOW, [("ce_id", rid(1).encode()), ("ce_type", CANCEL_TYPE.encode())])
    tally.dead_letter(0, 1, accepted=False)
    tally.dead_letter(0, 2, accepted=False)
    tally.log(terminal(1))
    tally.usage(usage(1))
    ledger = tally.close(NOW + 10**9)
    assert (ledger.records, ledger.accepted, ledger.duplicates, ledger.unreadable) == (3, 1, 1, 1)
    assert ledger.problems() == []


def test_a_request_that_outlived_its_deadline_was_lost() -> None:
    tally = Tally()
    tally.request(0, 0, NOW, headers(rid(1)))
    late = NOW + int(DEADLINE_S * 1000) + GRACE_MS
    assert tally.close(late).problems() == []
    problem = tally.close(late + 1).problems()
    assert problem == [f"1 request ({rid(1)}) should have ended by now and did not"]


def test_an_unreadable_record_that_nobody_buried_was_lost() -> None:
    tally = Tally()
    tally.request(3, 14, NOW, [])
    assert tally.close(NOW).in_flight == 1
    assert "3/14" in tally.close(NOW + GRACE_MS + 1).problems()[0]
    tally.dead_letter(3, 14)
    assert tally.close(NOW + GRACE_MS + 1).problems() == []


def test_a_terminal_without_usage_does_not_add_up() -> None:
    tally = Tally()
    tally.request(0, 0, NOW, headers(rid(1)))
    tally.log(terminal(1))
    assert tally.close(NOW).problems() == [f"1 request ({rid(1)}) with a terminal have no usage"]
    assert "metering has 7 records to handle" in tally.close(NOW, metering_lag=7).problems()[0]
    tally.usage(usage(1))
    assert tally.close(NOW).problems() == []


def test_two_usage_ids_of_one_request_do_not_add_up() -> None:
    tally = Tally()
    tally.request(0, 0, NOW, headers(rid(1)))
    tally.log(terminal(1))
    tally.usage(usage(1, "a"))
    tally.usage(usage(1, "b"))
    assert "more than one usage id" in tally.close(NOW).problems()[0]


def test_another_tenants_records_under_the_same_id_are_not_ours() -> None:
    tally = Tally()
    tally.request(0, 0, NOW, headers(rid(1), "t"))
    tally.log(terminal(1, tenant="other"))
    tally.usage(usage(1, tenant="other"))
    ledger = tally.close(NOW)
    assert (ledger.terminal, ledger.in_flight, ledger.usage_rows) == ({}, 1, 0)


def test_what_the_requests_topic_no_longer_holds_does_not_count() -> None:
    tally = Tally()
    tally.log(terminal(9))
    tally.usage(usage(9))
    ledger = tally.close(NOW)
    assert (ledger.records, ledger.terminal, ledger.usage_rows) == (0, {}, 0)


@given(
    requests=st.lists(st.one_of(st.integers(0, 8), st.none()), max_size=30),
    log=st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.integers(1, 3)), max_size=30),
)
def test_the_sum_holds_whatever_comes(requests: list[int | None], log: list[tuple[int, bool, int]]) -> None:
    tally = Tally()
    for offset, number in enumerate(requests):
        tally.request(0, offset, NOW, headers(rid(number)) if number is not None else [])
        if number is None and offset % 2:
            tally.dead_letter(0, offset)
    for number, opens, attempt in log:
        tally.log(opened(number, attempt + 1) if opens else terminal(number, attempt=attempt))
    ledger = tally.close(NOW)
    assert ledger.balanced
    assert ledger.accepted == len({number for number in requests if number is not None})


def test_each_tenant_has_a_balance_with_the_cost_of_the_revision_that_counts() -> None:
    tally = Tally()
    tally.request(0, 0, NOW, headers(rid(1)))
    tally.request(0, 1, NOW, headers(rid(2)))
    tally.log(terminal(1))
    dear = msgspec.structs.replace(usage(1), cost=Decimal("0.5"))
    again = msgspec.structs.replace(dear, revision=1, cost=Decimal("0.25"), currency="EUR")
    for event in (dear, again, dear):
        tally.usage(event)
    [(tenant, balance)] = tally.close(NOW).tenants.items()
    assert (tenant, balance) == ("t", TenantBalance(2, 1, 1, 1, {"EUR": Decimal("0.25")}))
    assert tally.close(NOW).problems() == []
