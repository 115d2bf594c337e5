"""A class-data archive of Kafka's classes: trained once, it halves what the broker costs to start.

The JVM maps it instead of parsing jars; an archive that does not fit (another JVM, other jars) is ignored by it.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from deploy.embedded import java, probes
from deploy.embedded.kafka import Kafka, java_command
from deploy.embedded.ports import PortBook

_FORMAT_SECONDS, _START_SECONDS, _DUMP_SECONDS = 60.0, 60.0, 120.0


def archive_path(runtime: Path) -> Path:
    """Where the archive for a JVM is kept, whether it exists or not; it is the JVM's own, so its name says which."""
    real = runtime.resolve()
    stamp = f"{real} {real.stat().st_mtime_ns}"
    return java.cache_dir() / f"kafka-{java.KAFKA_VERSION}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.jsa"


def flags(runtime: Path) -> tuple[str, ...]:
    """Flags by which a JVM uses its archive; none when there is none."""
    archive = archive_path(runtime)
    return (f"-XX:SharedArchiveFile={archive}", "-Xshare:auto", "-Xlog:cds=off") if archive.exists() else ()


def train(runtime: Path, jars: Sequence[Path]) -> bool:
    """Make the archive if it is missing; False when it cannot be had, which only costs time.

    A broker is formatted and started in a temporary directory, to see which classes are loaded.
    """
    archive = archive_path(runtime)
    if archive.exists():
        return True
    with tempfile.TemporaryDirectory(prefix="headrace-cds-") as scratch:
        home = Path(scratch)
        try:
            classes = _loaded_classes(home, runtime, jars)
            (home / "classes").write_text("\n".join(classes) + "\n")
            fresh = archive.with_suffix(f".{home.name}")
            dump = ("-Xshare:dump", "-XX:SharedClassListFile=classes", f"-XX:SharedArchiveFile={fresh}")
            command = java_command(runtime, jars, *dump)
            subprocess.run(command, cwd=home, check=True, capture_output=True, timeout=_DUMP_SECONDS)
            fresh.replace(archive)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"no class-data archive: {error}", file=sys.stderr)
            return False
    return True


def _loaded_classes(home: Path, runtime: Path, jars: Sequence[Path]) -> list[str]:
    """Lines of the JVM's class lists of both programs, each line once, in order."""
    book = PortBook(home / "ports.json")
    port = book.port("kafka")
    kafka = Kafka(home, port, book.port("kafka-controller"))
    to_format = kafka.format_spec(runtime, jars, "-XX:DumpLoadedClassList=format.classes")
    if to_format is None:
        return []
    subprocess.run(to_format.argv, cwd=to_format.cwd, check=True, capture_output=True, timeout=_FORMAT_SECONDS)
    kafka.formatted()
    spec = kafka.spec(runtime, jars, "-XX:DumpLoadedClassList=broker.classes")
    broker = subprocess.Popen(spec.argv, cwd=spec.cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asyncio.run(probes.until(partial(probes.kafka_answers, f"127.0.0.1:{port}"), _START_SECONDS))
        broker.terminate()
        broker.wait(_FORMAT_SECONDS)
    finally:
        broker.kill()
        broker.wait()
    where = spec.cwd or home
    lists = [(where / name).read_text().splitlines() for name in ("format.classes", "broker.classes")]
    return list(dict.fromkeys(line for lines in lists for line in lines if not line.startswith("#")))


def main() -> int:
    """Train for the JVM that a stack would run."""
    train(java.java(), java.fetch_jars())
    return 0


if __name__ == "__main__":
    sys.exit(main())
