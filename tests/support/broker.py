"""A Kafka broker of a test's own, with settings of its own, to be killed and started again on the same data."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from deploy.embedded import aot, java, probes
from deploy.embedded.kafka import Kafka, render_properties
from deploy.embedded.ports import PortBook
from headrace.parent import die_with_parent

START_SECONDS = 60.0


class Broker:
    """One broker under `home`, formatted when it is made."""

    def __init__(
        self, home: Path, ports: PortBook, *, format_flags: Sequence[str] = (), extra: Mapping[str, str] | None = None
    ) -> None:
        """It listens on the ports `kafka` and `kafka-controller`. Settings in `extra` win over its own."""
        port = ports.port("kafka")
        self.bootstrap = f"127.0.0.1:{port}"
        self._log = home / "kafka.log"
        runtime, jars = java.java(), java.fetch_jars()
        kafka = Kafka(home, port, ports.port("kafka-controller"))
        to_format = kafka.format_spec(runtime, jars, *aot.flags(runtime))
        assert to_format is not None
        for name in ("server.properties", "format.properties"):
            with (home / "kafka" / name).open("a") as file:
                file.write(render_properties(extra or {}))
        subprocess.run(
            [*to_format.argv, *format_flags], cwd=to_format.cwd, check=True, capture_output=True, timeout=START_SECONDS
        )
        kafka.formatted()
        self._spec = kafka.spec(runtime, jars, *aot.flags(runtime))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._spec.argv, cwd=self._spec.cwd, stdout=log, stderr=log,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )  # fmt: skip

    async def answer(self) -> None:
        """Wait until it answers."""
        answers = await probes.until(partial(probes.kafka_answers, self.bootstrap), START_SECONDS)
        assert answers, self._log.read_text()[-3000:]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
