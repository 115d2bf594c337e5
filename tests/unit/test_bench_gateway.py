"""The benchmark's pure parts: percentiles, stalls, order, specs, the upstream's answers and the verdicts."""

from __future__ import annotations

import re
from array import array

import msgspec
import pytest

from bench.gateway.answers import MS, StreamedAnswer, WholeAnswer
from bench.gateway.figures import (
    Load,
    Order,
    Percentiles,
    Trace,
    exact,
    order,
    percentile,
    percentiles,
    stalls,
    summarise,
)
from bench.gateway.measure import Measurement
from bench.gateway.spec import Spec, SpecError, parse
from bench.gateway.tally import Stats
from bench.gateway.targets import at_least, at_most, failed, judge
from bench.gateway.usage import Usage, role_of
from bench.gateway.wire import Rendering, chat_decoder
from topics.fold import Fold


class Recorder:
    """A caller that keeps what it is sent."""

    def __init__(self) -> None:
        self.data = b""
        self.ends: list[str] = []

    def send(self, data: bytes) -> None:
        self.data += data

    def finished(self, outcome: str) -> None:
        self.ends.append(outcome)

    def drop(self, outcome: str) -> None:
        self.ends.append(outcome)


def play(spec: Spec, limit: int | None = None, rendering: Rendering | None = None) -> tuple[Recorder, list[int]]:
    """Run a streamed answer to its end on a made-up clock; returns what came and when tokens were due (ms)."""
    caller, stats = Recorder(), Stats()
    attempt = stats.begin(spec.id, 0)
    made = rendering or Rendering(1, "bench")
    answer = StreamedAnswer(caller, spec, attempt, made, prompt=3, limit=limit, include_usage=True)
    now, times = answer.first_due(), []
    while True:
        before = attempt.tokens
        again = answer.fire(now)
        times += [now // MS] * (attempt.tokens - before)
        if not again:
            return caller, times
        assert again >= now
        now = again


def load(**changed: object) -> Load:
    """Figures of a flawless run, but for what is given."""
    figures: dict[str, object] = {
        "callers": 1,
        "requests": 10,
        "tokens": 1000,
        "seconds": 1.0,
        "requests_per_second": 10.0,
        "tokens_per_second": 1000.0,
        "ttft": Percentiles(count=10, p50=1.0, p95=1.0, p99=1.0, max=1.0),
        "delay": Percentiles(),
        "gap": Percentiles(),
        "stall_free": 1.0,
        "order": Order(),
        "wrong_usage": 0,
        "errors": {},
    }
    return Load(**{**figures, **changed})  # type: ignore[arg-type]


def usage(cpu: float, seconds: float = 20.0, rss: float = 900.0, pss: float | None = None) -> Usage:
    return Usage(seconds=seconds, cpu_seconds=cpu, cpu_by_role={}, rss_peak=rss, rss_by_role={}, pss=pss)


def test_percentile_interpolates_between_neighbours() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([7], 0.99) == 7
    assert percentile([0, 10], 0.25) == 2.5
    assert percentile(range(101), 0.99) == 99


def test_percentiles_are_milliseconds() -> None:
    assert percentiles([3_000_000, 1_000_000, 2_000_000]) == Percentiles(count=3, p50=2.0, p95=2.9, p99=2.98, max=3.0)
    assert percentiles([]) == Percentiles()


def test_a_stall_is_a_gap_beyond_that_of_the_upstream() -> None:
    sent = [0, 100 * MS, 200 * MS]
    assert stalls([5 * MS, 105 * MS, 205 * MS], sent) == 0
    assert stalls([5 * MS, 155 * MS, 205 * MS], sent) == 0  # exactly the limit is none
    assert stalls([5 * MS, 156 * MS, 205 * MS], sent) == 1
    assert stalls([5 * MS, 170 * MS, 400 * MS], sent) == 2
    assert stalls([], []) == stalls([1], [1]) == 0


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([100, 101, 102, 103], Order()),
        ([100, 102, 103], Order(lost=1)),
        ([], Order(lost=4)),
        ([100, 101, 101, 102, 103], Order(doubled=1)),
        ([100, 101, 102, 103, 100], Order(doubled=1)),
        ([100, 102, 101, 103], Order(reordered=1)),
        ([103, 100, 101, 102], Order(reordered=3)),
        ([100, 101, 102, 103, 7], Order(foreign=1)),
    ],
)
def test_order_names_what_is_wrong(numbers: list[int], expected: Order) -> None:
    found = order(numbers, base=100, expected=4)
    assert found == expected
    assert exact(found) == (expected == Order())


def test_summary_counts_failed_and_stalled_requests() -> None:
    def trace(received: list[int], **changed: object) -> Trace:
        made = Trace(expected=2, started=0, ended=received[-1] if received else MS, done=True)
        made.numbers, made.sent = array("q", range(len(received))), array("q", [at * MS for at in range(len(received))])
        made.received = array("q", received)
        for name, value in changed.items():
            setattr(made, name, value)
        return made

    figures = summarise(
        [
            trace([2 * MS, 3 * MS], usage=2),
            trace([2 * MS, 80 * MS], usage=1),
            trace([2 * MS], done=False),
            trace([], error="HTTP 503"),
        ],
        callers=4,
    )
    assert figures.requests == 4
    assert figures.stall_free == 0.25
    assert figures.errors == {"unfinished": 1, "HTTP 503": 1}
    assert figures.order == Order(lost=3)
    assert figures.wrong_usage == 1
    assert figures.ttft.count == 3
    assert figures.ttft.p50 == 2.0
    assert figures.requests_per_second == 25.0  # two answers in 80 ms


def test_a_spec_reads_back_from_its_line_within_a_prompt() -> None:
    spec = Spec(tokens=7, interval_ms=2.5, seq=3_000_000, id="a-1", keep_body=True, die_after=0, error_first=2)
    assert parse(f"hello\n{spec.line()}\nbye") == spec
    assert parse("no mark", Spec(tokens=9)) == Spec(tokens=9)
    assert parse("#bench tokens=3", Spec(tokens=9, ttft_ms=1)) == Spec(tokens=3, ttft_ms=1)


@pytest.mark.parametrize("line", ["#bench token=3", "#bench tokens=x", "#bench die_after=1.5"])
def test_a_wrong_spec_is_refused(line: str) -> None:
    with pytest.raises(SpecError):
        parse(line)


def test_the_spec_is_found_in_content_parts_metadata_and_user() -> None:
    bodies = [
        b'{"messages":[{"content":"x"},{"content":[{"type":"text","text":"#bench tokens=5"}]}]}',
        b'{"messages":[{"role":"user","content":"x"}],"metadata":{"bench":"tokens=5"}}',
        b'{"messages":[{"role":"user","content":"x"}],"user":"#bench tokens=5"}',
    ]
    assert [chat_decoder.decode(body).spec(Spec()).tokens for body in bodies] == [5, 5, 5]


def test_faults_strike_only_the_first_tries() -> None:
    spec = Spec(error_first=2)
    assert [spec.for_try(number).status for number in (1, 2, 3)] == [503, 503, None]
    assert Spec(error_first=1, status=429).for_try(1).status == 429
    once = Spec(die_after=3, first=1)
    assert once.for_try(1) == once
    assert once.for_try(2).die_after is None
    assert Spec(status=500).for_try(99).status == 500


def test_a_stream_keeps_its_pace_and_ends_with_usage() -> None:
    caller, times = play(Spec(tokens=3, interval_ms=50, ttft_ms=20, seq=40))
    assert times == [20, 70, 120]
    assert [f" t{40 + at}@{time * MS}".encode() in caller.data for at, time in enumerate(times)] == [True] * 3
    assert b'"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6}' in caller.data
    assert caller.data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b'"finish_reason":"stop"' in caller.data
    assert caller.ends == ["finished"]


def test_a_stream_without_interval_and_with_a_limit() -> None:
    caller, times = play(Spec(tokens=9, interval_ms=0, ttft_ms=20), limit=4)
    assert times == [20] * 4
    assert b'"finish_reason":"length"' in caller.data


@pytest.mark.parametrize("interval", [0, 50])
@pytest.mark.parametrize(("choices", "logprobs", "calls"), [(2, False, False), (1, True, False), (2, False, True)])
def test_a_stream_of_choices_log_probabilities_and_calls(
    interval: int, choices: int, logprobs: bool, calls: bool
) -> None:
    rendering = Rendering(1, "bench", choices=choices, logprobs=logprobs, calls=calls)
    caller, _ = play(Spec(tokens=3, interval_ms=interval, seq=40), rendering=rendering)
    events = [msgspec.json.decode(line) for line in re.findall(rb"data: (\{.*)\n\n", caller.data)]
    fold = Fold()
    for event in events:
        fold.raw(msgspec.json.encode(event["choices"]))
    told = msgspec.json.decode(fold.choices())
    assert [choice["index"] for choice in told] == list(range(choices))
    for choice in told:
        message = choice["message"]
        text = message["content"]
        if calls:
            [call] = message["tool_calls"]
            assert text is None and call["id"] and call["function"]["name"] == "count"
            text = call["function"]["arguments"]
        assert re.findall(r" t(\d+)@", text) == ["40", "41", "42"]
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
        assert len(choice["logprobs"]["content"] if logprobs else ()) == 3 * logprobs
        assert logprobs or choice["logprobs"] is None
    assert events[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3 * choices,
        "total_tokens": 3 + 3 * choices,
    }


@pytest.mark.parametrize("interval", [0, 50])
@pytest.mark.parametrize("after", [0, 2])
def test_faults_of_a_stream_come_after_their_token(interval: int, after: int) -> None:
    died, times = play(Spec(tokens=4, interval_ms=interval, die_after=after))
    assert (len(times), died.ends, b"[DONE]" in died.data) == (after, ["died"], False)
    hung, times = play(Spec(tokens=4, interval_ms=interval, hang_after=after))
    assert (len(times), hung.ends) == (after, [])
    broken, times = play(Spec(tokens=4, interval_ms=interval, garbage_after=after))
    assert (len(times), broken.ends) == (4, ["finished"])
    garbage = broken.data.index(b"\xff\xfe")
    assert broken.data[:garbage].count(b"@") == after


def test_an_answer_to_a_caller_who_left_writes_nothing() -> None:
    caller = Recorder()
    attempt = Stats().begin("", 0)
    answer = WholeAnswer(caller, Spec(tokens=2), attempt, Rendering(1, "bench"), 1, None)
    assert answer.first_due() == 70 * MS
    answer.closed = True
    assert answer.fire(70 * MS) == 0
    assert caller.data == b""


def test_tallies_tell_tries_and_disconnects_apart() -> None:
    stats = Stats()
    first = stats.begin("a", 1)
    first.tokens = 5
    stats.end("a", first, "disconnected", 2)
    stats.end("a", first, "finished", 3)  # only the first end counts
    second = stats.begin("a", 4)
    assert (stats.active, stats.disconnects, stats.finished) == (1, 1, 0)
    assert (stats.ids["a"].requests, stats.ids["a"].tokens, second.number) == (2, 5, 2)
    assert b'"ids":{}' in stats.render("unknown")


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["/venv/bin/python", "/venv/bin/headrace", "run", "router"], "router"),
        (["python", "-m", "headrace.cli", "run", "worker"], "worker"),
        (["python", "/venv/bin/headrace", "up", "--port", "0"], "supervisor"),
        (["java", "-Xmx512m", "-cp", "a.jar", "kafka.Kafka", "server.properties"], "kafka"),
        (["/x/valkey-server", "127.0.0.1:6379"], "redis"),
        (["python", "-m", "deploy.embedded.clickhouse_server"], "clickhouse"),
        (["node", "server.js"], "node"),
        ([], "unknown"),
    ],
)
def test_roles_are_read_from_command_lines(command: list[str], role: str) -> None:
    assert role_of(command) == role


def test_verdicts_on_their_borders() -> None:
    assert [at_most(value, 8, 5) for value in (5, 8, 8.1)] == ["stretch", "met", "missed"]
    assert [at_least(value, 0.95, 0.99) for value in (0.99, 0.95, 0.94)] == ["stretch", "met", "missed"]


def test_targets_are_judged_from_the_figures_of_one_run() -> None:
    slow = Percentiles(count=10, p50=11.0, p95=20.0, p99=31.5, max=40.0)
    runs = [
        Measurement(subject="direct", scenario="ttft-1", load=load()),
        Measurement(subject="headrace", scenario="ttft-1", load=load(ttft=slow)),
        Measurement(subject="headrace", scenario="streams-500", load=load(stall_free=0.96), usage=usage(0.1)),
        Measurement(subject="headrace", scenario="short-64", load=load(requests_per_second=119.0, errors={"x": 1})),
    ]
    verdicts = judge(runs, Percentiles(count=1, p50=2.0), usage(2.0, rss=1300.0, pss=900.0))
    assert [(verdict.figure, verdict.outcome) for verdict in verdicts] == [
        ("10.0 ms = 5.0 hops", "stretch"),
        ("30.5 ms = 15.2 hops", "missed"),
        ("96.0%", "met"),
        ("10,000", "stretch"),
        ("119", "missed"),
        ("broken in short-64", "missed"),
        ("900 MiB PSS (RSS 1,300)", "met"),
        ("10.0% of a core", "met"),
    ]
    assert judge([], None, None) == []
    assert [failed(verdicts, strict=strict) for strict in (False, True)] == [True, True], "tokens were lost"
    targets = [verdict for verdict in verdicts if not verdict.gate]
    assert [failed(targets, strict=strict) for strict in (False, True)] == [False, True]


def test_an_answer_that_has_begun_goes_on_after_its_last_token() -> None:
    line = Spec(tokens=10, seq=100, prompt_tokens=5, interval_ms=0).line()
    asked = {"role": "user", "content": f"count\n{line}"}
    begun = {"role": "assistant", "content": " t100@7 t101@8 t102@9"}
    chat = chat_decoder.decode(msgspec.json.encode({"messages": [asked, begun], "max_tokens": 4}))
    spec = chat.spec(Spec())
    assert (spec.seq, spec.tokens, spec.prompt_tokens) == (103, 7, 8)
    caller, _ = play(spec, limit=chat.limit())
    assert [number for number in range(100, 110) if f" t{number}@".encode() in caller.data] == [103, 104, 105, 106]
    assert b'"length"' in caller.data
    fresh = chat_decoder.decode(msgspec.json.encode({"messages": [begun, asked]})).spec(Spec())
    assert (fresh.seq, fresh.tokens) == (100, 10)
