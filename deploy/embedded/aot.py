"""A cache of what the JVM learns about Kafka: classes as they are after loading, and which of its methods run hot.

Made once, by running a broker under load (JEP 514, JEP 515). With it the broker starts without parsing jars, and
compiles what runs hot at once, and for good. A cache that does not fit (another JVM, other jars) is ignored by the JVM.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from deploy.embedded import java, probes
from deploy.embedded.kafka import Kafka, java_command
from deploy.embedded.ports import PortBook

LEAST_JAVA = 25
"""The first that keeps method profiles, and makes a cache in one step."""
_FORMAT_SECONDS, _START_SECONDS, _STOP_SECONDS = 60.0, 60.0, 120.0
_LOAD_SECONDS, _LOAD_RECORDS = 15.0, 6000
_PARTITIONS = 4


class TrainingFailed(Exception):
    """The cache could not be made; the text says why. A stack runs without it, slower."""


def cache_path(runtime: Path) -> Path:
    """Where the cache for a JVM is kept, whether it exists or not. Equal JVMs at different places share one."""
    image = runtime.resolve().parents[1] / "lib" / "modules"
    found = image.stat() if image.exists() else runtime.stat()
    # The JVM compares the same two; its flags decide how objects lie in the cache.
    stamp = f"{found.st_size} {found.st_mtime_ns} {java_command(Path(), ())}"
    return java.cache_dir() / f"kafka-{java.KAFKA_VERSION}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.aot"


def flags(runtime: Path) -> tuple[str, ...]:
    """Flags by which a JVM uses its cache; none when there is none."""
    cache = cache_path(runtime)
    return (f"-XX:AOTCache={cache}", "-Xlog:aot*=off", "-Xlog:cds*=off") if cache.exists() else ()


def train(runtime: Path, jars: Sequence[Path]) -> None:
    """Make the cache if it is missing: about 25 s of one broker at work in a temporary directory.

    Raises TrainingFailed.
    """
    cache = cache_path(runtime)
    if cache.exists():
        return
    if (version := java.java_version(runtime)) < LEAST_JAVA:
        raise TrainingFailed(f"{runtime} is Java {version}; this takes {LEAST_JAVA} or newer")
    with tempfile.TemporaryDirectory(prefix="headrace-aot-") as scratch:
        home = Path(scratch)
        fresh = cache.with_suffix(f".{home.name}")
        try:
            _run_broker(home, runtime, jars, f"-XX:AOTCacheOutput={fresh}")
            fresh.replace(cache)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout or b"").decode(errors="replace").strip().splitlines()
            raise TrainingFailed(f"Java exited with {error.returncode}: {said[-1] if said else 'no word'}") from error
        except subprocess.TimeoutExpired as error:
            raise TrainingFailed(f"Java did not end within {error.timeout:.0f} s") from error
        except (OSError, KafkaError, ExceptionGroup) as error:
            raise TrainingFailed(repr(error)) from error
        finally:
            fresh.unlink(missing_ok=True)


def _run_broker(home: Path, runtime: Path, jars: Sequence[Path], flag: str) -> None:
    """Format, start and load a broker, and stop it; the JVM writes its cache as it ends."""
    book = PortBook(home / "ports.json")
    port = book.port("kafka")
    kafka = Kafka(home, port, book.port("kafka-controller"))
    if to_format := kafka.format_spec(runtime, jars):
        subprocess.run(to_format.argv, cwd=to_format.cwd, check=True, capture_output=True, timeout=_FORMAT_SECONDS)
        kafka.formatted()
    spec = kafka.spec(runtime, jars, flag)
    broker = subprocess.Popen(spec.argv, cwd=spec.cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        uvloop.run(_load(f"127.0.0.1:{port}"))
        broker.terminate()
        broker.wait(_STOP_SECONDS)
    finally:
        broker.kill()
        broker.wait()


async def _load(bootstrap: str) -> None:
    """Work as a stack's roles give it: idempotent writes, long polls, a group that commits, for `_LOAD_SECONDS`."""
    if not await probes.until(partial(probes.kafka_answers, bootstrap), _START_SECONDS):
        raise TimeoutError(f"the broker does not answer after {_START_SECONDS:.0f} s")
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, _PARTITIONS, 1) for name in ("one", "two")])
    finally:
        await admin.close()
    until = time.monotonic() + _LOAD_SECONDS
    async with asyncio.TaskGroup() as roles:
        for number in range(3):
            roles.create_task(_write(bootstrap, number, until))
        roles.create_task(_read(bootstrap, ("one",), until, group=None))
        roles.create_task(_read(bootstrap, ("one", "two"), until, group=None))
        roles.create_task(_read(bootstrap, ("two",), until, group="group"))


async def _write(bootstrap: str, number: int, until: float) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=0)
    await producer.start()
    try:
        for count in range(_LOAD_RECORDS):
            if time.monotonic() > until:
                return
            topic = ("one", "two")[(count + number) % 2]
            await producer.send_and_wait(
                topic, b"x" * (64 << count % 8), key=b"%d" % count, partition=count % _PARTITIONS, headers=[("h", b"v")]
            )
    finally:
        await producer.stop()


async def _read(bootstrap: str, topics: tuple[str, ...], until: float, *, group: str | None) -> None:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        if group is None:
            consumer.assign([TopicPartition(topic, number) for topic in topics for number in range(_PARTITIONS)])
        else:
            consumer.subscribe(topics)
        while time.monotonic() < until:
            if await consumer.getmany(timeout_ms=500) and group is not None:
                await consumer.commit()
    finally:
        await consumer.stop()


def main() -> int:
    """Train for the JVM that a stack would run; a failure is told, and costs only time."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # It tells of every leader that is not elected yet.
    try:
        train(java.java(), java.fetch_jars())
    except TrainingFailed as error:
        print(f"no cache for the broker, which will start slower: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
