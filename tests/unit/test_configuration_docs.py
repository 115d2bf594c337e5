"""`docs/configuration.md` says what the code takes: every field, option and variable, and examples that are valid."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.config import OPTIONS, ModelConfig, ProviderConfig, default_config, parse_config
from headrace.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")


def names(pattern: str) -> set[str]:
    return set(re.findall(pattern, TEXT, re.MULTILINE))


def test_every_variable_is_documented() -> None:
    documented = names(r"^\| `(HEADRACE_[A-Z_]+)` \|")
    assert documented == {f"HEADRACE_{name.upper()}" for name in Settings.model_fields}


def test_every_field_and_option_is_documented() -> None:
    options = {option for known in OPTIONS.values() for option in known}
    wanted = ProviderConfig.model_fields.keys() | ModelConfig.model_fields.keys() | options
    assert names(r"^\| `([a-z_]+)` \|") == wanted


def test_the_examples_are_valid() -> None:
    whole, default = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert len(parse_config(whole).models) == 2
    assert parse_config(default) == default_config()
