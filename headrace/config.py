"""`headrace.toml`: which providers there are and which models they serve, validated before anything is started."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from headrace import units
from headrace.toml_lines import line_of, locate
from schemas import control
from schemas.events import RAM

NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$"
DEFAULT_APP = control.DEFAULT_APP
FILE = Path("headrace.toml")
"""What is read where nobody names a file."""
_MAX_NAME = 128
_REMOTE_OPTIONS: dict[str, type] = {"idle_timeout_s": float, "connect_timeout_s": float}
OPTIONS: dict[str, dict[str, type]] = {
    "llama_cpp": {
        "model_dir": str,
        "threads": int,
        "gpu_layers": int,
        "batch_tokens": int,
        "chat_template": str,
        "embeddings": str,
        "idle_timeout_s": float,
    },
    "transformers": {
        "model_dir": str,
        "threads": int,
        "batch_tokens": int,
        "chat_template": str,
        "device": str,
        "dtype": str,
        "idle_timeout_s": float,
    },
    "ollama": {**_REMOTE_OPTIONS, "memory_bytes": int, "parallel": int, "pull": bool},
    "openai": {**_REMOTE_OPTIONS, "continues": str},
}
"""Options of each kind of provider; the workers' providers have the same ones."""
_KINDS: dict[type, str] = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
_VALUES: dict[str, tuple[str, ...]] = {"continues": control.CONTINUES}
"""What an option may be, where that is not any value of its type."""


class ConfigError(Exception):
    """The file is wrong. The message has a line for each fault: file, line, field, and what to do."""


def _decimal(value: object) -> object:
    if isinstance(value, float):
        raise ValueError(  # pydantic turns a ValueError into a fault of this field
            f'write money as a string, so that it stays exact: "{value:g}"'
        )
    return value


def _duration(value: object) -> object:
    return units.parse_duration(value if isinstance(value, str) else "")


def _size(value: object) -> object:
    return units.parse_size(value if isinstance(value, str) else "")


Duration = Annotated[int, BeforeValidator(_duration)]
"""Milliseconds, written as "5m"."""
Size = Annotated[int, BeforeValidator(_size)]
"""Bytes, written as "4 GiB"."""
Money = Annotated[Decimal, BeforeValidator(_decimal), Field(ge=0, max_digits=20, decimal_places=10)]
Limit = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=NAME, max_length=_MAX_NAME)]
AdapterName = Annotated[str, Field(pattern=control.ADAPTER_NAME, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class PriceConfig(_Strict):
    """Money for a million tokens. `cached` prompt tokens cost as much as others unless said."""

    input: Money
    output: Money
    cached: Money | None = None
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"

    def record(self) -> control.Price:
        """The price as a control record; the control processor gives it its version."""
        cached = self.input if self.cached is None else self.cached
        return control.Price(0, input=self.input, output=self.output, cached=cached, currency=self.currency)


class ProviderConfig(_Strict):
    """A place where models run."""

    name: Name
    kind: Literal["llama_cpp", "transformers", "ollama", "openai"]
    base_url: Annotated[str, Field(pattern=r"^(https?://[^\s/]+|unix:///)")] | None = None
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    options: dict[str, bool | int | float | str] = {}

    @model_validator(mode="after")
    def _coherent(self) -> ProviderConfig:
        if self.kind == "openai" and self.base_url is None:
            raise ValueError('base_url: a provider of kind "openai" needs one, e.g. "http://127.0.0.1:9000/v1"')
        if self.kind in ("llama_cpp", "transformers") and self.base_url is not None:
            raise ValueError(f'base_url: a provider of kind "{self.kind}" starts its own servers and takes none')
        if self.base_url is not None and "@" in self.base_url:
            raise ValueError("base_url: no user or password in here, it would stand in Kafka; use api_key_env")
        if self.name == RAM and "memory_bytes" in self.options:
            taken = f"with memory_bytes its name is that of a device, and {RAM!r} is main memory; choose another"
            raise ValueError(f"name: {taken}")
        for name, value in self.options.items():
            _check_option(self.kind, name, value)
        return self

    def record(self) -> control.Provider:
        """The provider as a control record."""
        return control.Provider(
            name=self.name,
            kind=self.kind,
            base_url=self.base_url.rstrip("/") if self.base_url is not None else None,
            api_key_env=self.api_key_env,
            options=self.options,
        )


def _check_option(kind: str, name: str, value: object) -> None:
    known = OPTIONS[kind]
    if name not in known:
        raise ValueError(f"options.{name}: unknown option of kind {kind}{_meant(name, known)}")
    wanted = (int, float) if known[name] is float else known[name]
    if not isinstance(value, wanted) or (isinstance(value, bool) and known[name] is not bool):
        raise ValueError(f"options.{name}: must be {_KINDS[known[name]]}, not {value!r}")
    if name in _VALUES and value not in _VALUES[name]:
        raise ValueError(f"options.{name}: must be {' or '.join(_VALUES[name])}, not {value!r}")


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


class ModelConfig(_Strict):
    """A model that callers may name."""

    id: Name
    provider: Name
    backend_tag: Annotated[str, Field(min_length=1)]
    aliases: tuple[Name, ...] = ()
    adapters: dict[AdapterName, Annotated[str, Field(min_length=1)]] = {}
    context_length: Annotated[int, Field(ge=16, le=16_777_216)] = 4096
    max_concurrency: Annotated[int, Field(ge=1, le=4096)] = 4
    pool: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)] = "default"
    enabled: bool = True
    capabilities: tuple[Literal["chat", "code", "vision", "json", "tools", "long-context"], ...] = ("chat",)
    fallbacks: tuple[Name, ...] = ()
    preload: bool = True
    pinned: bool = False
    keep_alive: Duration | None = None
    memory: Size = 0
    load_time: Duration = 0
    default_max_tokens: Annotated[int, Field(ge=1)] | None = None
    rate_limit_rpm: Limit | None = None
    rate_limit_tpm: Limit | None = None
    concurrency_limit: Limit | None = None
    price: PriceConfig = PriceConfig(input=Decimal(0), output=Decimal(0))

    @model_validator(mode="after")
    def _coherent(self) -> ModelConfig:
        if self.default_max_tokens is not None and self.default_max_tokens >= self.context_length:
            raise ValueError(f"default_max_tokens: must be below context_length, {self.context_length}")
        if self.keep_alive is not None and self.pinned:
            raise ValueError("keep_alive: a pinned model stays for ever; leave one of the two out")
        if self.keep_alive is not None and self.preload:
            raise ValueError("keep_alive: a preloaded model stays for ever; set preload = false")
        return self

    def record(self) -> control.Model:
        """The model as a control record; the control processor sets price version and creation time."""
        return control.Model(
            id=self.id,
            provider=self.provider,
            backend_tag=self.backend_tag,
            aliases=self.aliases,
            adapters=self.adapters,
            context_length=self.context_length,
            max_concurrency=self.max_concurrency,
            pool=self.pool,
            enabled=self.enabled,
            capabilities=self.capabilities,
            fallbacks=self.fallbacks,
            preload=self.preload,
            pinned=self.pinned,
            keep_alive_ms=self.keep_alive,
            bytes=self.memory,
            load_ms=self.load_time,
            default_max_tokens=self.default_max_tokens,
            rate_limit_rpm=self.rate_limit_rpm,
            rate_limit_tpm=self.rate_limit_tpm,
            concurrency_limit=self.concurrency_limit,
            price=self.price.record(),
        )


class Config(_Strict):
    """All that `headrace.toml` says."""

    providers: tuple[ProviderConfig, ...] = ()
    models: tuple[ModelConfig, ...] = ()


def find_config(given: Path | None, configured: Path | None) -> Path | None:
    """The file to read: the given one, else that of HEADRACE_CONFIG, else ./headrace.toml; None when there is none."""
    return given or configured or (FILE if FILE.is_file() else None)


def default_config() -> Config:
    """What is served without a file: the small model that the package index ships, on llama.cpp."""
    return Config(
        providers=(ProviderConfig(name="local", kind="llama_cpp"),),
        models=(
            ModelConfig(
                id="smollm2",
                provider="local",
                backend_tag="SmolLM2-135M-Instruct",
                aliases=("gpt-4o-mini",),
                context_length=2048,
                max_concurrency=4,
                capabilities=("chat", "json"),
                price=PriceConfig(input=Decimal("0.10"), output=Decimal("0.40")),
            ),
        ),
    )


def ollama_config(tags: Sequence[str], base_url: str | None) -> Config:
    """What is served without a file where the environment names models of an Ollama server. Raises `ConfigError`."""
    document = {
        "providers": [
            {"name": "ollama", "kind": "ollama", "options": {"pull": True}}
            | ({"base_url": base_url} if base_url else {})
        ],
        "models": [{"id": tag, "provider": "ollama", "backend_tag": tag} for tag in tags],
    }
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        faults = [_fault(dict(found)) for found in error.errors(include_url=False)]
        raise ConfigError(
            "\n".join(f"OLLAMA_BASE_URL or OLLAMA_MODELS: {_dotted(path)}{message}" for path, message in faults)
        ) from None


def ollama_tags(text: str) -> list[str]:
    """The models in a list with commas, each once. None where the text is a path: Ollama itself calls its folder so."""
    tags = dict.fromkeys(tag.strip() for tag in text.split(","))
    return [tag for tag in tags if tag] if not text.strip().startswith(("/", "~", ".", "\\")) else []


def load_config(path: Path | None, *, ollama_models: str = "", ollama_base_url: str | None = None) -> Config:
    """The configuration in a file; without one that of an Ollama server's models, if any are named, else the default.

    Raises `ConfigError`.
    """
    if path is None:
        tags = ollama_tags(ollama_models)
        return ollama_config(tags, ollama_base_url) if tags else default_config()
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})") from None
    return parse_config(source, str(path))


def parse_config(source: str, file: str = "headrace.toml") -> Config:
    """The configuration in a TOML text. Raises `ConfigError`, whose lines begin with `file:line: field:`."""
    try:
        document = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        at = f"{file}:{found[1]}" if found else file
        raise ConfigError(f"{at}: not valid TOML: {re.sub(r' *[(]at .*[)]', '', str(error))}") from None
    lines = locate(source)
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        faults = [_fault(dict(found)) for found in error.errors(include_url=False)]
    else:
        faults = _cross_faults(config)
        if not faults:
            return config
    said = sorted({(line_of(lines, path), _dotted(path), message) for path, message in faults})
    raise ConfigError("\n".join(f"{file}:{line}: {field}{message}" for line, field, message in said))


Path_ = tuple[str | int, ...]


def _dotted(path: Path_) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return f"{text}: " if text else ""


def _fault(error: dict[str, Any]) -> tuple[Path_, str]:
    path: Path_ = tuple(error["loc"])
    message: str = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            return path, _unknown_field(path)
        case "missing":
            return path, "is missing"
        case "value_error" if named := re.match(r"^([a-z_.]+): (.*)$", message):
            return (*path, *named[1].split(".")), named[2]
        case "string_pattern_mismatch":
            return path, f"{error['input']!r} does not match {error['ctx']['pattern']}"
    if len(path) > 4 and path[2] == "options":  # The rest names the types that pydantic tried.
        return path[:4], "must be a text, a number or a boolean"
    shown = repr(error["input"])
    return path, f"{message[0].lower()}{message[1:]}" + (f", not {shown}" if len(shown) <= 60 else "")


_FIELDS: dict[Path_, type[BaseModel]] = {
    (): Config,
    ("providers",): ProviderConfig,
    ("models",): ModelConfig,
    ("models", "price"): PriceConfig,
}


def _unknown_field(path: Path_) -> str:
    within = tuple(part for part in path[:-1] if isinstance(part, str))
    known = list(_FIELDS[within].model_fields) if within in _FIELDS else []
    return f"unknown field{_meant(str(path[-1]), known)}"


def _cross_faults(config: Config) -> list[tuple[Path_, str]]:
    """Faults that lie between entries: names used twice, providers that are not there."""
    faults: list[tuple[Path_, str]] = [
        ((kind,), f"at least one [[{kind}]] is needed") for kind in ("providers", "models") if not getattr(config, kind)
    ]
    providers: dict[str, int] = {}
    for index, provider in enumerate(config.providers):
        if provider.name in providers:
            faults.append(
                (("providers", index, "name"), f"{provider.name!r} is providers[{providers[provider.name]}] already")
            )
        providers.setdefault(provider.name, index)
    names: dict[str, str] = {}
    for index, model in enumerate(config.models):
        if model.id in names:
            faults.append((("models", index, "id"), f"{model.id!r} is {names[model.id]} already"))
        names.setdefault(model.id, f"the id of models[{index}]")
        if model.provider not in providers:
            hint = _meant(model.provider, providers)
            faults.append((("models", index, "provider"), f"no provider named {model.provider!r}{hint}"))
        elif model.adapters and (kind := config.providers[providers[model.provider]].kind) not in control.ADAPTER_KINDS:
            known = " and ".join(control.ADAPTER_KINDS)
            faults.append((("models", index, "adapters"), f"{known} load adapters, a provider of kind {kind} does not"))
    ids = [model.id for model in config.models]
    for index, model in enumerate(config.models):
        for place, alias in enumerate(model.aliases):
            if alias in names:
                faults.append((("models", index, "aliases", place), f"{alias!r} is {names[alias]} already"))
            names.setdefault(alias, f"an alias of models[{index}]")
        faults += _name_faults(index, model, ids)
    for index, model in enumerate(config.models):
        faults += [
            (("models", index, "adapters", adapter), f"{name!r} is {names[name]} already")
            for adapter in model.adapters
            if (name := f"{model.id}:{adapter}") in names
        ]
    return faults


def _name_faults(index: int, model: ModelConfig, ids: list[str]) -> list[tuple[Path_, str]]:
    """Names that the router keeps for itself, and fallbacks that lead nowhere."""
    own: list[tuple[Path_, str]] = [(("models", index, "id"), model.id)]
    own += [(("models", index, "aliases", place), alias) for place, alias in enumerate(model.aliases)]
    faults: list[tuple[Path_, str]] = [
        (path, f"{name!r} is reserved: by it a caller leaves the choice of the model to the router")
        for path, name in own
        if control.is_reserved(name)
    ]
    for place, fallback in enumerate(model.fallbacks):
        path: Path_ = ("models", index, "fallbacks", place)
        if fallback == model.id:
            faults.append((path, "a model cannot be its own fallback"))
        elif fallback in model.fallbacks[:place]:
            faults.append((path, f"{fallback!r} stands in the list already"))
        elif fallback not in ids:
            faults.append((path, f"no model has the id {fallback!r}{_meant(fallback, ids)}"))
    return faults
