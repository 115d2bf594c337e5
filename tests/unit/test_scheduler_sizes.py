"""Sizes of models, as workers tell them."""

from __future__ import annotations

from processors.scheduler.sizes import Sizes
from schemas.control import Model
from schemas.events import Device, Need, WorkerStatus


def heartbeat(worker: str, *needs: Need, device: Device | None = None) -> WorkerStatus:
    devices = [device] if device is not None else []
    return WorkerStatus(worker, "b", "default", 1, 0, ["p"], needs=list(needs), devices=devices)


def test_the_larger_of_what_workers_tell_counts_and_what_an_operator_declared_goes_before_it() -> None:
    models = {"a": Model("a", "p", "t"), "b": Model("b", "p", "t", bytes=7), "c": Model("c", "p", "t")}
    sizes = Sizes()
    assert sizes.applied(models) == models
    assert sizes.learn(heartbeat("w1", Need("a", 10, 500), Need("b", 9, 400)))
    assert sizes.learn(heartbeat("w2", Need("a", 12, 300)))
    assert not sizes.learn(heartbeat("w2", Need("a", 12, 300)))
    found = sizes.applied(models)
    assert [(found[id].bytes, found[id].load_ms) for id in "abc"] == [(12, 500), (7, 400), (0, 0)]
    assert sizes.learn(heartbeat("w2", Need("a", 11, 300))), "it was measured"
    assert sizes.applied(models)["a"].bytes == 11


def test_what_one_worker_measured_goes_before_what_others_estimate_of_the_same_kind_of_memory() -> None:
    models = {"a": Model("a", "p", "t")}
    server, ram, gpu = Device("box", 99, ["p"], shared=True), Device("ram", 99, ["p"]), Device("GPU-1", 99, ["p"])
    sizes = Sizes()
    sizes.learn(heartbeat("w1", Need("a", 4, measured=True), device=server))
    sizes.learn(heartbeat("w2", Need("a", 9), device=server))
    assert sizes.applied(models)["a"].bytes == 4
    sizes.learn(heartbeat("w2", Need("a", 5, measured=True), device=server))
    assert sizes.applied(models)["a"].bytes == 5
    assert sizes.learn(heartbeat("w2", Need("a", 9), device=ram)), "its models lie elsewhere now"
    assert sizes.applied(models)["a"].bytes == 9
    sizes.learn(heartbeat("w1", Need("a", 4, measured=True), device=gpu))
    sizes.learn(heartbeat("w2", Need("a", 9), device=Device("GPU-2", 99, ["p"])))
    assert sizes.applied(models)["a"].bytes == 4
