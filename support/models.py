"""Short names of the models that the paper uses or that are near to them."""

from typing import Any

from support.errors import UserError

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


def loading_error(name: str, error: Exception) -> UserError:
    """Why a model cannot be loaded, in one line, and what to do."""
    reason = " ".join(str(error).split())[:200]
    advice = f"give a hub id, a directory or one of {[*NAMES]}"
    for package in ("torchvision", "num2words"):
        if package in reason.lower():
            advice = f"pip install {package}"
    return UserError(f"--model {name}: cannot be loaded ({reason}); {advice}")


def apply_template(processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Render messages with the model's own chat template. Raises UserError if that fails."""
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # noqa: BLE001 - templates are programs, and raise many kinds
        name = getattr(processor, "tokenizer", processor).name_or_path
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: its chat template fails ({reason})") from None
