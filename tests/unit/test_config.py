"""`headrace.toml`: what it accepts, and that its errors name file, line and field."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from headrace.config import OPTIONS, Config, ConfigError, default_config, load_config, parse_config
from headrace.toml_lines import line_of, locate
from processors.generation.providers.factory import OllamaOptions, OpenAIOptions
from processors.generation.providers.llama_cpp import Options as LlamaOptions
from processors.generation.providers.transformers import Options as TransformersOptions
from schemas.control import CAPABILITIES, Price

GOOD = """\
# A whole configuration.
[[providers]]
name = "local"
kind = "llama_cpp"

[[providers]]
name = "gpu-box"
kind = "openai"
base_url = "http://127.0.0.1:9000/v1/"
api_key_env = "GPU_BOX_KEY"
[providers.options]
idle_timeout_s = 30

[[models]]
id = "smollm2"
provider = "local"
backend_tag = "SmolLM2-135M-Instruct"
aliases = [
  "gpt-4o-mini",
]
context_length = 2048
price = { input = "0.10", output = "0.40" }

[[models]]
id = "big"
provider = "gpu-box"
backend_tag = "meta/big"
pool = "gpu"
preload = false
default_max_tokens = 512
[models.price]
input = "1"
output = "2"
cached = "0.5"
currency = "EUR"
"""


def faults(source: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(source)
    return str(caught.value).splitlines()


def test_a_whole_file_gives_the_records_that_it_says() -> None:
    config = parse_config(GOOD)
    local, gpu = (provider.record() for provider in config.providers)
    small, big = (model.record() for model in config.models)
    assert (local.name, local.kind, local.base_url) == ("local", "llama_cpp", None)
    assert gpu.base_url == "http://127.0.0.1:9000/v1"
    assert (gpu.api_key_env, gpu.options) == ("GPU_BOX_KEY", {"idle_timeout_s": 30})
    assert small.aliases == ("gpt-4o-mini",)
    assert small.price == Price(0, input=Decimal("0.10"), output=Decimal("0.40"), cached=Decimal("0.10"))
    assert (big.pool, big.preload, big.default_max_tokens) == ("gpu", False, 512)
    assert big.price == Price(0, input=Decimal(1), output=Decimal(2), cached=Decimal("0.5"), currency="EUR")


MEMORY_FIELDS = """\
[[providers]]
name = "local"
kind = "llama_cpp"
[[models]]
id = "one"
provider = "local"
backend_tag = "x"
preload = false
keep_alive = "1.5m"
memory = "4 GiB"
load_time = "800ms"
"""


def test_memory_and_times_are_written_with_their_units() -> None:
    [model] = parse_config(MEMORY_FIELDS).models
    record = model.record()
    assert (record.keep_alive_ms, record.bytes, record.load_ms) == (90_000, 4 * 2**30, 800)
    assert record.pinned is False
    [kept] = parse_config(MEMORY_FIELDS.replace('keep_alive = "1.5m"', "pinned = true")).models
    assert (kept.record().pinned, kept.record().keep_alive_ms) == (True, None)
    [gone] = parse_config(MEMORY_FIELDS.replace('"1.5m"', '"0s"')).models
    assert gone.record().keep_alive_ms == 0, "not kept at all, which is not the same as for ever"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('keep_alive = "1.5m"', 'keep_alive = "5 minutes"', ":9: models[0].keep_alive: write a duration such as"),
        ('keep_alive = "1.5m"', "keep_alive = 300", ":9: models[0].keep_alive: write a duration such as"),
        ('keep_alive = "1.5m"', 'keep_alive = "-5s"', ":9: models[0].keep_alive: write a duration such as"),
        ('memory = "4 GiB"', 'memory = "4 gib"', ":10: models[0].memory: write a size such as"),
        ('memory = "4 GiB"', "memory = 4", ":10: models[0].memory: write a size such as"),
        ('load_time = "800ms"', 'load_time = ""', ":11: models[0].load_time: write a duration such as"),
        ("preload = false", "preload = true", ":9: models[0].keep_alive: a preloaded model stays for ever"),
        ("preload = false", "preload = false\npinned = true", ":10: models[0].keep_alive: a pinned model stays"),
        ("preload = false", 'pinned = "yes, please"', ":8: models[0].pinned: input should be a valid boolean"),
    ],
)
def test_faults_of_memory_and_times_name_their_line(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(MEMORY_FIELDS.replace(old, new), "f.toml")
    assert str(raised.value).startswith("f.toml" + message), raised.value


def test_capabilities_and_fallbacks_reach_the_record() -> None:
    plain = parse_config(GOOD).models[1].record()
    assert (plain.capabilities, plain.fallbacks) == (("chat",), ())
    told = GOOD.replace("preload = false", 'capabilities = ["code", "tools"]\nfallbacks = ["smollm2"]')
    model = parse_config(told).models[1].record()
    assert (model.capabilities, model.fallbacks) == (("code", "tools"), ("smollm2",))
    for name in CAPABILITIES:
        parse_config(GOOD.replace("preload = false", f'capabilities = ["{name}"]'))


def test_without_a_file_the_packaged_model_is_served() -> None:
    assert load_config(None) == default_config()
    model = default_config().models[0].record()
    assert (model.id, model.aliases, model.backend_tag) == ("smollm2", ("gpt-4o-mini",), "SmolLM2-135M-Instruct")
    assert (model.context_length, model.max_concurrency) == (2048, 4)
    assert (model.price.input, model.price.output) == (Decimal("0.10"), Decimal("0.40"))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        (
            'kind = "llama_cpp"',
            'kind = "llamacpp"',
            4,
            "providers[0].kind: input should be 'llama_cpp', 'transformers'",
        ),
        (
            'input = "0.10"',
            "input = 0.10",
            22,
            'models[0].price.input: write money as a string, so that it stays exact: "0.1"',
        ),
        ('input = "0.10"', 'input = "-1"', 22, "models[0].price.input: input should be greater than or equal to 0"),
        ('output = "2"', 'output = "two"', 33, "models[1].price.output: input should be a valid decimal"),
        ("context_length", "contxt_length", 21, "models[0].contxt_length: unknown field; did you mean context_length?"),
        ("cached =", "cache =", 34, "models[1].price.cache: unknown field; did you mean cached?"),
        (
            'provider = "local"',
            'provider = "locl"',
            16,
            "models[0].provider: no provider named 'locl'; did you mean local?",
        ),
        ('  "gpt-4o-mini",', '  "big",', 18, "models[0].aliases[0]: 'big' is the id of models[1] already"),
        ('id = "big"', 'id = "smollm2"', 25, "models[1].id: 'smollm2' is the id of models[0] already"),
        ('name = "gpu-box"', 'name = "local"', 7, "providers[1].name: 'local' is providers[0] already"),
        (
            'base_url = "http://127.0.0.1:9000/v1/"',
            "",
            6,
            'providers[1].base_url: a provider of kind "openai" needs one',
        ),
        (
            "idle_timeout_s = 30",
            "idle_timeout_s = [1]",
            12,
            "providers[1].options.idle_timeout_s: must be a text, a number or a boolean",
        ),
        (
            "idle_timeout_s = 30",
            "idle_timout = 3",
            12,
            "providers[1].options.idle_timout: unknown option of kind openai; did you mean idle_timeout_s?",
        ),
        (
            "idle_timeout_s = 30",
            'idle_timeout_s = "x"',
            12,
            "providers[1].options.idle_timeout_s: must be a number, not 'x'",
        ),
        (
            "idle_timeout_s = 30",
            'continues = "always"',
            12,
            "providers[1].options.continues: must be prefill or vllm, not 'always'",
        ),
        ("//127.0.0.1:9000", "//me:secret@gpu:9000", 9, "providers[1].base_url: no user or password in here"),
        ("default_max_tokens = 512", "default_max_tokens = 9999", 30, "models[1].default_max_tokens: must be below"),
        ("preload = false", "preload = 7", 29, "models[1].preload: input should be a valid boolean"),
        ('backend_tag = "meta/big"\n', "", 24, "models[1].backend_tag: is missing"),
        ('id = "big"', 'id = "b g"', 25, "models[1].id: 'b g' does not match"),
        ('id = "big"', 'id = "auto"', 25, "models[1].id: 'auto' is reserved"),
        ('  "gpt-4o-mini",', '  "auto:poems",', 18, "models[0].aliases[0]: 'auto:poems' is reserved"),
        (
            "preload = false",
            'capabilities = ["vison"]',
            29,
            "models[1].capabilities[0]: input should be 'chat', 'code'",
        ),
        (
            "preload = false",
            'fallbacks = ["smollm"]',
            29,
            "models[1].fallbacks[0]: no model has the id 'smollm'; did you",
        ),
        ("preload = false", 'fallbacks = ["gpt-4o-mini"]', 29, "models[1].fallbacks[0]: no model has the id"),
        ("preload = false", 'fallbacks = ["big"]', 29, "models[1].fallbacks[0]: a model cannot be its own fallback"),
        (
            "preload = false",
            'fallbacks = ["smollm2", "smollm2"]',
            29,
            "models[1].fallbacks[1]: 'smollm2' stands in the list already",
        ),
    ],
)
def test_an_error_names_file_line_and_field(old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    found = faults(GOOD.replace(old, new, 1))
    assert any(fault.startswith(f"headrace.toml:{line}: {message}") for fault in found), found


def test_adapters_go_with_a_provider_that_loads_them() -> None:
    adapted = GOOD.replace('id = "smollm2"', 'id = "smollm2"\nadapters = { tone = "/a/tone" }')
    assert parse_config(adapted).models[0].record().adapters == {"tone": "/a/tone"}
    far = GOOD.replace('id = "big"', 'id = "big"\nadapters = { tone = "/a/tone" }')
    assert "a provider of kind openai does not" in faults(far)[0]
    assert "models[0].adapters" in faults(adapted.replace("tone =", '"to:ne" ='))[0]
    taken = adapted.replace('id = "big"', 'id = "smollm2:tone"')
    assert "'smollm2:tone' is the id of models[1] already" in faults(taken)[0]


def test_a_provider_whose_memory_is_declared_cannot_be_taken_for_main_memory() -> None:
    model = '[[models]]\nid = "m"\nprovider = "ram"\nbackend_tag = "t"\n'
    source = model + '[[providers]]\nname = "ram"\nkind = "ollama"\n'
    assert parse_config(source).providers[0].name == "ram", "without memory of its own it is no device"
    [fault] = faults(source + "options = { memory_bytes = 8000000000 }\n")
    assert "name: with memory_bytes its name is that of a device, and 'ram' is main memory; choose another" in fault


def test_all_faults_are_told_at_once_in_the_order_of_the_file() -> None:
    found = faults(GOOD.replace("llama_cpp", "x").replace("preload = false", "prelod = false"))
    assert [fault.split(":")[1] for fault in found] == ["4", "29"]


def test_a_file_that_is_no_toml_names_the_line() -> None:
    assert faults("[[providers]]\nname = local\n") == ["headrace.toml:2: not valid TOML: Invalid value"]


def test_an_empty_file_says_what_is_needed() -> None:
    assert faults("") == [
        "headrace.toml:1: models: at least one [[models]] is needed",
        "headrace.toml:1: providers: at least one [[providers]] is needed",
    ]


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_config(tmp_path / "nowhere.toml")


def test_a_file_is_read_and_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert isinstance(load_config(path), Config)
    path.write_text(GOOD.replace("smollm2", "", 1))
    with pytest.raises(ConfigError, match=r"mine\.toml:15: models\[0\]\.id"):
        load_config(path)


def test_lines_are_found_behind_values_of_many_lines_and_in_dotted_keys() -> None:
    source = 'a = """\nb = 1\n"""\n[x]\ny.z = 2\n[[t]]\n[[t.u]]\nk = 1\n[[t.u]]\n"q r" = 1\n'
    lines = locate(source)
    assert ("b",) not in lines
    assert lines[("x", "y", "z")] == 5
    assert lines[("t", 0, "u", 0, "k")] == 8
    assert lines[("t", 0, "u", 1, "q r")] == 10
    assert line_of(lines, ("t", 0, "u", 1, "q r", "deep")) == 10
    assert line_of(lines, ("nowhere",)) == 1


def test_the_known_options_are_those_of_the_workers_providers() -> None:
    structs: dict[str, type] = {"llama_cpp": LlamaOptions, "ollama": OllamaOptions, "openai": OpenAIOptions}
    structs["transformers"] = TransformersOptions
    for kind, struct in structs.items():
        known = {field.name: field.type for field in msgspec.structs.fields(struct)}
        assert OPTIONS[kind].keys() == known.keys()
        for name, found in known.items():
            inner = getattr(found, "__args__", ())
            values = [value for one in inner for value in getattr(one, "__args__", ())]
            assert OPTIONS[kind][name] in (found, *inner, *map(type, values))
