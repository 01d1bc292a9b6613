"""Short names of the models that the paper uses or that are near to them."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from reward import Example
from support import UserError, hub, toy

NAMES = {
    "SmolVLM-256M": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "SmolVLM-500M": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "SmolVLM-2.2B": "HuggingFaceTB/SmolVLM-Instruct",
    "SmolVLM2-256M": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "SmolVLM2-500M": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "SmolVLM2-2.2B": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "LLaVA-OV-0.5B": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "InternVL3-1B": "OpenGVLab/InternVL3-1B-hf",
    "Qwen2.5-VL-3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B": "Qwen/Qwen2.5-VL-7B-Instruct",
    # Text only:
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B-Instruct",
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "SmolLM2-360M": "HuggingFaceTB/SmolLM2-360M-Instruct",
}


def source(name: str) -> str:
    """The directory or hub id of a model: of `tiny`, a run's last weights, a short name, or itself."""
    run = Path(name) / "checkpoint"
    return str(toy.BASE) if name == "tiny" else str(run) if run.is_dir() else NAMES.get(name, name)


def loader_options(source: str) -> dict[str, bool]:
    """How to load a directory or hub id. Raises ValueError if it can be neither."""
    local = Path(source).is_dir()
    if not local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError("no such directory, nor the form of a hub id")
    # Said aloud, because transformers would ask on the terminal whether a model's own code may run. And a hub
    # that is silent would be waited for again and again, file by file.
    return {"trust_remote_code": False, "local_files_only": not local and bool(hub.silence())}


def load_pretrained(source: str) -> tuple[torch.nn.Module, Any]:
    """Load a directory or hub id: model and processor. Raises ValueError if weights are missing."""
    options = loader_options(source)  # among them trust_remote_code=False
    # The processor of a text-only model is its tokenizer.
    processor = AutoProcessor.from_pretrained(source, **options)
    loader = AutoModelForImageTextToText
    if type(AutoConfig.from_pretrained(source, **options)) not in loader._model_mapping:
        loader = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"it has no weights for {min(info['missing_keys'])}")
    return model, processor


def find(name: str) -> None:
    """Look a hub id up, before data is downloaded or a run folder made for it. Raises UserError."""
    if not Path(source(name)).exists():
        with errors_told(name):
            AutoConfig.from_pretrained(source(name), **loader_options(source(name)))


@contextlib.contextmanager
def errors_told(name: str) -> Iterator[None]:
    """Turn whatever loading a model raises into a UserError: why in one line, and what to do."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - loaders raise many kinds, alike to the user
        reason = " ".join(str(error).split())[:200]
        advice = f"give a hub id, a directory or one of {[*NAMES]}"
        # Of a name that cannot be a hub id the hub was not asked.
        if "/" in source(name) and not Path(source(name)).exists() and hub.silence():
            reason = f"{hub.silence()}, and {source(name)} is not on this machine, or not all of it"
        if "trust_remote_code" in str(error):
            advice = "a model that brings its own code is not run here"
        for package in ("torchvision", "num2words"):
            if package in str(error).lower():
                advice = f"pip install {package}"
        raise UserError(f"--model {name}: cannot be loaded ({reason}); {advice}") from None


def context(model: Any) -> float:
    """How many tokens a model can take, prompt and response together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)


def check_room(model: Any, examples: list[Example], lengths: list[int], room: int) -> None:
    """Raise UserError naming a row whose prompt, of so many tokens, leaves no `room` for a response."""
    for example, length in zip(examples, lengths, strict=True):
        if length + room > context(model):
            raise UserError(f"{example.name}: {length} tokens of prompt and {room} for the answer exceed the "
                            f"model's context of {context(model)}; lower --image-edge or --max-new-tokens")


def apply_template(processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Render messages with the model's own chat template. Raises UserError if that fails."""
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # noqa: BLE001 - templates are programs, and raise many kinds
        name = getattr(processor, "tokenizer", processor).name_or_path
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: its chat template fails ({reason})") from None
