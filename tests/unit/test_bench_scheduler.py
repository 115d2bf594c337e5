"""The simulator of scheduling policies: determinism, memory, outcomes, and what each baseline is known for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from bench.scheduler import pace, speed, waits
from bench.scheduler.__main__ import app
from bench.scheduler.engine import Device, Engine, Job, Replica
from bench.scheduler.figures import Figures, TrainingFigures, jain
from bench.scheduler.generators import SHAPES, generate
from bench.scheduler.policies import POLICIES, simulate
from bench.scheduler.sweep import Curve, Point, SweepReport, WorkloadSweep, capacity
from bench.scheduler.workload import Arrival, DeviceSpec, Fault, ModelSpec, TrainingSpec, Workload, WorkloadError, parse
from tests.support.simulated import model

OUTCOMES = {"finished", "rejected", "expired", "abandoned", "failed"}


def ask(at: float, name: str, model: str, *, output: int = 100, slo_s: float = 60) -> Arrival:
    """100 ms of prefill, and 10 ms for each token of the completion."""
    return Arrival(at, name, "tenant", model, prompt_tokens=100, output_tokens=output, slo_s=slo_s)


def run(policy: str, models: list[ModelSpec], arrivals: list[Arrival], *, size: int = 20, devices: int = 1,
        faults: list[Fault] | None = None) -> dict[str, tuple[str, float | None]]:  # fmt: skip
    """Request -> (outcome, seconds at which its first token came)."""
    specs = [DeviceSpec(f"gpu{at}", size) for at in range(devices)]
    done = simulate(Workload(specs, models, arrivals, faults=faults or []), policy)
    return {one.id: (one.outcome, one.first_token_s) for one in done.requests}


# --- for all policies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SHAPES)
def test_same_seed_same_figures_and_every_request_has_an_outcome(name: str, policy: str) -> None:
    workload = generate(name, rate=2 * SHAPES[name].rate, seed=3, seconds=50)
    assert workload == generate(name, rate=2 * SHAPES[name].rate, seed=3, seconds=50)
    first = simulate(workload, policy, seed=3, load_jitter=0.2)
    assert msgspec.json.encode(first) == msgspec.json.encode(simulate(workload, policy, seed=3, load_jitter=0.2))
    assert {one.id for one in first.requests} == {arrival.id for arrival in workload.arrivals}
    assert {one.outcome for one in first.requests} <= OUTCOMES
    assert sum(first.outcomes.values()) == len(workload.arrivals)


@pytest.mark.parametrize("name", ["zipf-10", "faults", "training"])
def test_the_order_in_which_python_hashes_changes_no_byte(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_bytes(msgspec.json.encode(generate(name, rate=SHAPES[name].near, seed=1, seconds=60)))
    command = [sys.executable, "-m", "bench.scheduler", "--workload", str(path), "--policy", "headrace",
               "--seed", "1", "--load-jitter", "0.1", "--json"]  # fmt: skip
    first, second = (
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True).stdout
        for seed in ("1", "2")
    )
    assert msgspec.json.decode(first, type=Figures).loads > 2
    assert first == second


def test_another_seed_gives_other_loads_and_other_arrivals() -> None:
    workload = generate("poisson", rate=0.5, seed=1, seconds=100)
    assert workload != generate("poisson", rate=0.5, seed=2, seconds=100)
    times = {simulate(workload, "lru", seed=seed, load_jitter=0.2).loading_s for seed in (1, 2)}
    assert len(times) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_never_oversold(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed up anew at each load, beside the engine's own count."""
    real, seen = Engine.load, []

    def load(engine: Engine, model: ModelSpec, device: Device) -> Replica:
        replica = real(engine, model, device)
        trains = sum(job.spec.bytes for job in engine.trainings.values() if job.device is device)
        seen.append((trains + sum(one.model.bytes for one in device.replicas.values())) / device.bytes)
        return replica

    monkeypatch.setattr(Engine, "load", load)
    for name in ("zipf-10", "faults", "training"):
        simulate(generate(name, rate=3, seed=5, seconds=100), policy, load_jitter=0.3)
    assert max(seen) <= 1
    assert policy == "llama-swap" or max(seen) > 0.7


def test_the_engine_refuses_what_does_not_fit() -> None:
    class Greedy:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine

        def on_arrival(self, job: Job) -> None:
            self._engine.load(self._engine.models[job.spec.model], self._engine.devices["gpu0"])

    workload = Workload([DeviceSpec("gpu0", 15)], [model("a"), model("b")], [ask(0, "1", "a"), ask(1, "2", "b")])
    with pytest.raises(AssertionError, match="oversold"):
        Engine(workload, Greedy).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_times_of_a_lone_request(policy: str) -> None:
    done = run(policy, [model("a")], [ask(1, "1", "a"), ask(5, "2", "a")])
    assert done == {"1": ("finished", 3.1), "2": ("finished", 5.1)}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_nowhere_is_refused(policy: str) -> None:
    assert run(policy, [model("a", size=21)], [ask(1, "1", "a")])["1"][0] == "rejected"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_caller_leaves_after_three_times_its_slo(policy: str) -> None:
    arrivals = [ask(0, "1", "a", output=10_000), ask(1, "2", "b", slo_s=5)]
    done = simulate(Workload([DeviceSpec("gpu0", 10)], [model("a"), model("b")], arrivals), policy)
    late = done.requests[1]
    assert (late.outcome, late.ended_s) == ("abandoned", 16.0) or (policy == "headrace" and late.outcome == "expired")
    assert done.slo_attainment == 0.5


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lost_worker_takes_what_it_ran(policy: str) -> None:
    arrivals = [ask(0, "1", "a", output=2_000), ask(20, "2", "a")]
    faults = [Fault(5, "worker_lost", "gpu0"), Fault(15, "worker_back", "gpu0")]
    assert run(policy, [model("a")], arrivals, faults=faults) == {"1": ("failed", 2.1), "2": ("finished", 22.1)}


@pytest.mark.parametrize(("policy", "outcome"), [("headrace", "finished"), ("lru", "finished"), ("ollama", "failed")])
def test_a_request_without_a_token_is_tried_again_or_not(policy: str, outcome: str) -> None:
    faults = [Fault(2.05, "worker_lost", "gpu0"), Fault(3, "worker_back", "gpu0")]
    assert run(policy, [model("a")], [ask(0, "1", "a")], faults=faults)["1"][0] == outcome


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failed_load_gives_its_memory_back(policy: str) -> None:
    done = run(policy, [model("a", size=20)], [ask(0, "1", "a"), ask(20, "2", "a")],
               faults=[Fault(0, "load_fails", "gpu0")])  # fmt: skip
    assert done["2"] == ("finished", 22.1 if done["1"][0] == "failed" else 20.1)


@pytest.mark.parametrize("policy", ["headrace", "llama-swap", "lru"])
def test_a_pinned_model_keeps_its_memory(policy: str) -> None:
    pinned = msgspec.structs.replace(model("a"), pinned=True)
    arrivals = [ask(5, "a1", "a"), ask(20, "b1", "b"), ask(40, "c1", "c"), ask(60, "a2", "a")]
    done = run(policy, [pinned, model("b"), model("c")], arrivals)
    assert (done["b1"], done["c1"]) == (("finished", 22.1), ("finished", 42.3))
    assert done["a2"] == ("finished", 60.1)


# --- training -----------------------------------------------------------------------------------------------------


def trained(policy: str, training: list[TrainingSpec], arrivals: list[Arrival], *, size: int = 20, devices: int = 1,
            faults: list[Fault] | None = None) -> tuple[dict[str, float | None], list[TrainingFigures]]:  # fmt: skip
    """Request -> seconds at which its first token came; and the training jobs."""
    specs = [DeviceSpec(f"gpu{at}", size) for at in range(devices)]
    done = simulate(Workload(specs, [model("a", 15)], arrivals, faults=faults or [], training=training), policy)
    return {one.id: one.first_token_s for one in done.requests}, done.training


@pytest.mark.parametrize("policy", POLICIES)
def test_a_job_trains_beside_models_for_which_there_is_room(policy: str) -> None:
    first, (job,) = trained(policy, [TrainingSpec(1, "t", 5, 7)], [ask(3, "1", "a"), ask(20, "2", "a")])
    assert first == {"1": 5.1, "2": 20.1}
    assert job == TrainingFigures("t", 7.0, 1, True)


def test_a_job_gives_way_to_a_model_after_its_checkpoint_and_goes_on_when_the_model_is_wanted_no_more() -> None:
    arrivals = [ask(10, "1", "a"), ask(900, "2", "a")]
    first, (job,) = trained("headrace", [TrainingSpec(0, "t", 10, 300, notice_s=3)], arrivals)
    assert first["1"] == 10 + 3 + 2.1
    assert (job.begun, job.done, job.trained_s) == (2, True, 300)


@pytest.mark.parametrize("policy", ["ollama", "ollama-fast-path", "lru"])
def test_others_leave_a_job_its_memory_until_it_is_done(policy: str) -> None:
    arrivals = [ask(10, "1", "a"), ask(900, "2", "a")]
    first, (job,) = trained(policy, [TrainingSpec(0, "t", 10, 100)], arrivals)
    assert first["1"] == 100 + 2.1
    assert job == TrainingFigures("t", 100.0, 1, True)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_lost_device_had_not_saved_is_trained_again(policy: str) -> None:
    faults = [Fault(50, "worker_lost", "gpu0"), Fault(60, "worker_back", "gpu0")]
    _, (job,) = trained(policy, [TrainingSpec(0, "t", 5, 100)], [ask(155, "1", "a"), ask(200, "2", "a")], faults=faults)
    assert (job.begun, job.done, job.trained_s) == (2, True, 100)
    _, (early,) = trained(policy, [TrainingSpec(0, "t", 5, 100)], [ask(155, "1", "a")], faults=faults)
    assert (early.begun, early.done) == (2, False)


# --- what each is known for ----------------------------------------------------------------------------------------

CROWDED = [model("a"), model("b"), model("c")]
"""Two of them fit."""
BLOCKED = [
    ask(0, "a1", "a", output=1000),
    ask(0, "b1", "b", output=2000),
    ask(5, "c1", "c"),
    ask(6, "b2", "b"),
]
"""`a` and `b` are in use when `c` is asked for; `b` has a free slot."""


def test_ollama_blocks_a_loaded_model_behind_a_head_that_waits_for_memory() -> None:
    done = run("ollama", CROWDED, BLOCKED)
    # a1 ends at 12.1 (2 s load, 0.1 s prefill, 10 s decode); then 0.2 s to unload, 2 s to load c.
    assert done["c1"] == ("finished", 14.4)
    # b2 goes on only when c's load has begun, although b had a free slot all the time.
    assert done["b2"] == ("finished", 12.4)


@pytest.mark.parametrize("policy", ["ollama-fast-path", "lru"])
def test_others_serve_a_loaded_model_at_once(policy: str) -> None:
    assert run(policy, CROWDED, BLOCKED)["b2"] == ("finished", 6.1)


def test_ollama_keeps_three_models_a_device_and_refuses_beyond_512() -> None:
    small = [model(name, size=1) for name in "abcd"]
    arrivals = [ask(at, name, name) for at, name in enumerate("abcd")] + [ask(20, "a2", "a"), ask(20.5, "b2", "b")]
    done = run("ollama", small, arrivals)
    # a was used least recently and gave way to d; then b gave way to a.
    assert done["a2"][1] == 20 + 0.2 + 2.1
    assert done["b2"][1] is not None and done["b2"][1] > 22
    many = [ask(0, f"first{at}", "a", output=2000) for at in range(2)]
    many += [ask(1, "head", "b"), *(ask(1.5, f"{at}", "c") for at in range(520))]
    refused = run("ollama", [model("a"), model("b"), model("c")], many, size=10)
    assert sum(outcome == "rejected" for outcome, _ in refused.values()) == 521 - 512


def test_ollama_unloads_after_five_minutes_unused() -> None:
    done = run("ollama", [model("a")], [ask(0, "1", "a"), ask(290, "2", "a"), ask(600, "3", "a")])
    assert [first for _, first in done.values()] == [2.1, 290.1, 602.1]


def test_llama_swap_runs_one_model_and_takes_all_that_wait_for_the_next() -> None:
    arrivals = [ask(0, "a1", "a"), ask(1, "b1", "b"), ask(1.5, "a2", "a"), ask(2, "b2", "b")]
    done = run("llama-swap", [model("a"), model("b")], arrivals)
    # Both would fit; b waits for a's requests, which join (A B A B -> A A B B), then for stop and start.
    assert done["a2"] == ("finished", 2.1)
    assert done["b1"] == done["b2"] == ("finished", 3.1 + 0.2 + 2 + 0.1)


def test_lru_evicts_what_was_not_used_for_longest_and_loads_on_two_devices_at_once() -> None:
    arrivals = [ask(0, "a1", "a"), ask(0, "b1", "b"), ask(10, "a2", "a"), ask(20, "c1", "c"), ask(30, "a3", "a")]
    done = run("lru", CROWDED, arrivals)
    assert done["b1"][1] == 4.1
    assert done["c1"][1] == 22.3
    assert done["a3"][1] == 30.1
    both = run("lru", CROWDED, arrivals[:2], devices=2)
    assert both["b1"][1] == both["a1"][1] == 2.1


# --- figures, files and the command line --------------------------------------------------------------------------


def test_figures_of_a_small_run() -> None:
    arrivals = [ask(0, "1", "a", slo_s=2.1), ask(0, "2", "a", slo_s=2.0)]
    done = simulate(Workload([DeviceSpec("gpu0", 10)], [model("a")], arrivals), "lru")
    assert (done.slo_attainment, done.seconds, done.loads, done.loading_s) == (0.5, 3.1, 1, 2.0)
    assert done.goodput == pytest.approx(1 / 3.1)
    assert (done.wait_s.p50, done.ttft_s.p99) == (2.0, 2.1)
    assert done.tenants == {"tenant": 400}
    assert jain([1, 1, 1]) == 1
    assert jain([1, 0, 0]) == pytest.approx(1 / 3)


def test_a_request_cut_short_is_not_within_its_slo() -> None:
    faults = [Fault(4, "worker_lost", "gpu0")]
    workload = Workload([DeviceSpec("gpu0", 10)], [model("a")], [ask(0, "1", "a", output=1000)], faults=faults)
    done = simulate(workload, "lru")
    assert (done.requests[0].first_token_s, done.slo_attainment, done.tenants) == (2.1, 0.0, {"tenant": 100 + 190})


def test_capacity_is_where_the_curve_falls_through_the_target() -> None:
    def points(*values: float) -> list[Point]:
        return [Point(2.0**at, value, 0, 0, 0, 0, 0, 1, 0, [value], [0]) for at, value in enumerate(values)]

    assert capacity(points(1.0, 0.95, 0.85)) == pytest.approx(2 * 2**0.5)
    assert capacity(points(0.8, 0.5)) is None


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("devices", 0, "bytes"), -1, "$.devices[0].bytes"),
        (("models", 0, "load_s"), "2", "$.models[0].load_s"),
        (("arrivals", 1, "priority"), "urgent", "$.arrivals[1].priority"),
        (("arrivals", 1, "model"), "gpt", "$.arrivals[1].model"),
        (("arrivals", 0, "tenant"), "nobody", "$.arrivals[0].tenant"),
        (("arrivals", 1, "id"), "r0", "$.arrivals[1].id"),
        (("models", 0, "size"), 1, "size"),
    ],
)  # fmt: skip
def test_bad_input_names_the_field(path: tuple[str, int, str], value: object, named: str) -> None:
    data = json.loads(msgspec.json.encode(generate("poisson", rate=0.5, seed=1, seconds=20)))
    data[path[0]][path[1]][path[2]] = value
    with pytest.raises(WorkloadError) as error:
        parse(json.dumps(data).encode())
    assert named in str(error.value)


def test_the_command_line_writes_a_workload_and_runs_it(tmp_path: Path) -> None:
    cli, path = CliRunner(), tmp_path / "w.json"
    written = cli.invoke(app, ["workload", "faults", "--rate", "1", "--seed", "4", "--seconds", "60"])
    path.write_bytes(written.stdout_bytes)
    workload = parse(path.read_bytes())
    assert workload == generate("faults", rate=1, seed=4, seconds=60)
    for policy in POLICIES:
        ran = cli.invoke(app, ["--workload", str(path), "--policy", policy, "--seed", "2", "--json"])
        done = msgspec.json.decode(ran.stdout_bytes, type=Figures)
        assert done == simulate(workload, policy, seed=2)
    path.write_text('{"devices": [{"id": "gpu0"}]}')
    bad = cli.invoke(app, ["--workload", str(path)])
    assert bad.exit_code == 2
    assert "`bytes`" in bad.stderr and "$.devices[0]" in bad.stderr


def test_a_sweep_writes_the_curves_of_every_policy(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["sweep", "--quick", "--workload", "bursts", "--output", str(tmp_path),
                                    "--pictures", str(tmp_path / "pictures")])  # fmt: skip
    assert ran.exit_code == 0, ran.output
    (written,) = tmp_path.glob("scheduler-*.json")
    report = msgspec.json.decode(written.read_bytes(), type=SweepReport)
    (bursts,) = report.sweeps
    assert [curve.policy for curve in bursts.curves] == list(POLICIES)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["scheduling-bursts.svg"]
    for curve in bursts.curves:
        assert curve.capacity is not None
        assert f"{curve.capacity:.3g}" in ran.output
        assert curve.points[-1].slo_attainment < report.target


def test_speed_counts_the_steps_of_a_long_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "QUEUED", 50)
    monkeypatch.setattr(speed, "ROUNDS", 40)
    *kinds, total = speed.measure()
    assert {one.event: one.steps for one in kinds}["Arrived"] == 40
    assert total.steps == sum(one.steps for one in kinds)
    assert total.rate > 0


def test_pace_runs_every_policy_on_every_workload() -> None:
    paces = pace.measure(seconds=5)
    assert [(one.workload, one.policy) for one in paces] == [(name, policy) for name in SHAPES for policy in POLICIES]
    assert all(one.ratio == one.simulated_s / one.wall_s > 0 for one in paces if one.simulated_s)
    assert sum(one.simulated_s for one in paces) > 0


def test_a_policy_that_is_not_told_of_slos_lets_callers_wait_until_they_leave() -> None:
    arrivals = [ask(0, "1", "a", output=10_000), ask(1, "2", "b", slo_s=5)]
    workload = Workload([DeviceSpec("gpu0", 10)], [model("a"), model("b")], arrivals)
    ends = {name: simulate(workload, name).requests[1] for name in ("headrace", "headrace-untold")}
    assert {name: end.outcome for name, end in ends.items()} == {"headrace": "expired", "headrace-untold": "abandoned"}
    assert ends["headrace"].ended_s < ends["headrace-untold"].ended_s == 1 + 3 * 5


def test_an_estimate_is_held_against_the_wait_that_came() -> None:
    told = [
        waits.Told(11_000, 9_000, 10_000, begun=True, held=False),
        waits.Told(12_000, 10_000, 10_000, begun=False, held=False),
        waits.Told(4_000, 10_000, 10_000, begun=False, held=False),
        waits.Told(0, 1_000, 10_000, begun=True, held=True),
    ]
    found = waits.summary("some", 1.0, told)
    assert (found.refused_falsely, found.refused_rightly, found.late) == (0.25, 0.25, 0.25)
    assert (found.error_s, found.error_unheld_s) == (1.5, 2.0), "who left at 10 s may have had to wait for 12"


def test_estimates_tell_of_the_wait_for_memory_and_refuse_nothing_that_would_be_served() -> None:
    found = waits.measure("zipf-10", 4.5, seeds=[1])
    assert found.refused_rightly > 0.003, "none where the wait for memory is left out"
    assert found.refused_falsely < 0.001
    assert found.error_unheld_s < 4.5, "6.4 s where it is left out"
    assert waits.measure("uncontended", 2.0, seeds=[1]).refused_falsely == 0
    shown = CliRunner().invoke(app, ["waits", "uncontended", "--rate", "0.3"])
    assert shown.exit_code == 0 and "refused falsely" in shown.output


# --- pictures -----------------------------------------------------------------------------------------------------


def test_pictures_hold_every_policy_and_the_target_and_are_the_same_each_time(tmp_path: Path) -> None:
    from bench.scheduler.pictures import draw  # matplotlib takes 2 s to import

    points = [
        Point(rate, value, 0, 0, 0, 0, 0, 1, 0, [value, value], [0, 0.1]) for rate, value in ((1, 0.95), (2, 0.7))
    ]
    sweeps = [WorkloadSweep("poisson", "about", [Curve(policy, 1.0, points) for policy in POLICIES])]
    report = SweepReport(started="", quick=True, python="", seed=1, sweeps=sweeps)
    (first,), (again,) = draw(report, tmp_path / "one"), draw(report, tmp_path / "two")
    assert first.read_bytes() == again.read_bytes()
    text = first.read_text()
    for words in (*POLICIES, "target: 90%", "poisson: about", "offered load (requests/s)", "refused or expired"):
        assert words in text
    assert "dc:date" not in text
