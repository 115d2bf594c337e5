"""A record that aiokafka cannot read stops nobody: it comes through, and so do those beside it."""

from __future__ import annotations

from aiokafka import TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from topics import clients
from topics.dead_letters import _written


class Odd(str):
    """A header's name that is written as other bytes than UTF-8."""

    def encode(self, *_: object) -> bytes:  # type: ignore[override]
        return b"hr-\xff\xfe"


def batch(first: int, names: list[str]) -> bytes:
    builder = _DefaultRecordBatchBuilderPy(2, 0, 0, -1, -1, -1, 100_000)
    for offset, name in enumerate(names):
        assert builder.append(offset, 1, b"k", f"v{first + offset}".encode(), [(name, b"x"), ("fine", b"y")])
    raw = bytearray(builder.build())
    raw[:8] = first.to_bytes(8, "big")
    return bytes(raw)


def test_a_batch_is_its_own_iterator_as_readers_of_transactions_need_it() -> None:
    found = fetcher.MemoryRecords(batch(0, [Odd(), "b"])).next_batch()
    assert next(found).offset == 0 and [record.offset for record in found] == [1]


def test_a_header_name_that_is_not_utf_8_stops_no_reader() -> None:
    assert clients.Producer is not None, "its module installs the reader"
    odd = Odd()
    data = batch(0, ["a", "b"]) + batch(2, ["a", odd, "b"]) + batch(5, [odd]) + batch(6, ["c"])
    records = fetcher.MemoryRecords(data)
    part = fetcher.PartitionRecords(TopicPartition("t", 0), records, [], 0, None, None, True, 0)
    found = list(part._records_iterator)
    assert [record.offset for record in found] == list(range(7))
    assert [record.value for record in found] == [f"v{number}".encode() for number in range(7)]
    assert found[3].headers == (("hr-\udcff\udcfe", b"x"), ("fine", b"y"))
    assert _written(found[3].headers[0][0]) == "hr-\\xff\\xfe"
