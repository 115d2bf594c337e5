"""The built-in workloads, by name: arrivals at a rate, under a seed.

Prompts and completions are log-normal around the medians of Azure's conversation trace: 1,020 and 129 tokens (Patel et
al., "Splitwise", ISCA 2024, figure 3), cut at 8,192 and 1,024 tokens. Half of the requests are interactive, four in ten
standard, one in ten batch; each kind wants its first token within the time in `SLO_S`, which is ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from bench.scheduler.catalogue import CARD_BYTES, model, most_popular
from bench.scheduler.workload import Arrival, DeviceSpec, Fault, ModelSpec, TenantSpec, TrainingSpec, Workload

Priority = Literal["interactive", "standard", "batch"]

SECONDS = 300.0
SLO_S: dict[Priority, float] = {"interactive": 10.0, "standard": 20.0, "batch": 60.0}
MIX: tuple[tuple[Priority, float], ...] = (("interactive", 0.5), ("standard", 0.4), ("batch", 0.1))
PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MOST = 1_020, 0.8, 8_192
OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_MOST = 129, 0.9, 1_024
ZIPF = 1.0
"""Exponent of the skewed workloads: the second model is asked for half as often as the first."""
BURST_S, PAUSE_S = 10.0, 50.0
"""A bursty model is asked for in bursts of about this long, about this far apart."""
GREEDY_SHARE = 0.7
"""Of all requests, what the greedy tenant sends."""

TRAINING_BYTES, NOTICE_S = 10 * 1024**3, 5.0
"""QLoRA of a model of 7 to 8 billion parameters, and its writing of a checkpoint: our assumptions."""

LOST_S = 30.0
FAULTS_S = 240.0
"""A lost worker is back after the one, and each device is lost once in the other."""

Times = Callable[[random.Random, float, float], Iterator[float]]


class Shape(NamedTuple):
    """What a workload is made of, but for its rate and seed."""

    about: str
    models: Sequence[ModelSpec]
    devices: int
    rate: float
    """Requests per second at which to begin a sweep."""
    near: float
    """Requests per second near the most that Headrace's policy bears: what it promises is put to the test there."""
    zipf: float = 0.0
    """Skew of the models' popularity; 0 for none."""
    bursty: bool = False
    tenants: Sequence[tuple[str, float]] = (("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0))
    """Each with its share of the requests, in proportion."""
    training: int = 0
    """Training jobs that want memory from the beginning on, each for longer than requests come."""
    faulty: bool = False
    """Whether the devices are lost in turn, each for `LOST_S` every `FAULTS_S`, and a load fails in between."""


SMALL = [model(name) for name in ("llama-3.1-8b", "llama-3.2-3b", "mistral-7b")]
GREEDY = [("greedy", GREEDY_SHARE), *((name, (1 - GREEDY_SHARE) / 4) for name in ("a", "b", "c", "d"))]

SHAPES: dict[str, Shape] = {
    "uncontended": Shape("3 models that all fit on one card", SMALL, 1, 2.0, 7.0),
    "poisson": Shape("5 models, asked for alike, on one card that holds two or three", most_popular(5), 1, 0.1, 2.7),
    "bursts": Shape("6 models on one card, each asked for in bursts", most_popular(6), 1, 0.1, 0.14, bursty=True),
    "zipf-10": Shape("10 models, skewed, on two cards", most_popular(10), 2, 0.2, 3.0, zipf=ZIPF),
    "zipf-30": Shape("30 models, skewed, on four cards", most_popular(30), 4, 0.5, 5.0, zipf=ZIPF),
    "tenants": Shape("5 models on one card, one tenant sends most", most_popular(5), 1, 0.1, 2.5, tenants=GREEDY),
    "training": Shape("5 models on two cards, with two jobs that train", most_popular(5), 2, 0.1, 9.0, training=2),
    "faults": Shape(
        "10 models, skewed, on three cards that are lost in turn", most_popular(10), 3, 0.2, 5.0, zipf=ZIPF, faulty=True
    ),
}


def generate(name: str, *, rate: float, seed: int, seconds: float = SECONDS) -> Workload:
    """A built-in workload with `rate` requests per second on average. Raises KeyError for a name that there is not."""
    shape = SHAPES[name]
    rng = random.Random(f"{name}/{seed}")
    weights = [1 / place**shape.zipf for place in range(1, len(shape.models) + 1)]
    asked: list[tuple[float, ModelSpec]] = []
    for spec, weight in zip(shape.models, weights, strict=True):
        times = _bursts if shape.bursty else _poisson
        asked += [(at, spec) for at in times(rng, rate * weight / sum(weights), seconds)]
    asked.sort(key=lambda one: one[0])
    return Workload(
        devices=[DeviceSpec(f"gpu{at}", CARD_BYTES) for at in range(shape.devices)],
        models=list(shape.models),
        tenants=[TenantSpec(tenant) for tenant, _ in shape.tenants],
        arrivals=[_arrival(rng, shape, number, at, spec) for number, (at, spec) in enumerate(asked)],
        faults=list(_trouble(shape.devices, seconds)) if shape.faulty else [],
        training=[TrainingSpec(0, f"t{at}", TRAINING_BYTES, 2 * seconds, NOTICE_S) for at in range(shape.training)],
    )


def _trouble(devices: int, seconds: float) -> Iterator[Fault]:
    gap = FAULTS_S / devices
    for turn in range(int(seconds / gap)):
        at, device = turn * gap, f"gpu{turn % devices}"
        yield Fault(at + gap / 4, "load_fails", device)
        yield Fault(at + gap / 2, "worker_lost", device)
        yield Fault(at + gap / 2 + LOST_S, "worker_back", device)


def _poisson(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at = rng.expovariate(rate)
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


def _bursts(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """Poisson arrivals within bursts, none between them; lengths of both are exponential."""
    within = rate * (BURST_S + PAUSE_S) / BURST_S
    at = rng.uniform(0, PAUSE_S)
    while at < seconds:
        end = min(seconds, at + rng.expovariate(1 / BURST_S))
        yield from (at + later for later in _poisson(rng, within, end - at))
        at = end + rng.expovariate(1 / PAUSE_S)


def _arrival(rng: random.Random, shape: Shape, number: int, at: float, spec: ModelSpec) -> Arrival:
    kinds, shares = zip(*MIX, strict=True)
    kind = rng.choices(kinds, shares)[0]
    tenants, asks = zip(*shape.tenants, strict=True)
    return Arrival(
        t=round(at, 3),
        id=f"r{number}",
        tenant=rng.choices(tenants, asks)[0],
        model=spec.id,
        prompt_tokens=_size(rng, PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MOST),
        output_tokens=_size(rng, OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_MOST),
        slo_s=SLO_S[kind],
        priority=kind,
    )


def _size(rng: random.Random, median: int, sigma: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(math.log(median), sigma))))
