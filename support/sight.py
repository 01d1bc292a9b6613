"""Eyes for SmolLM2: a small VLM of SmolVLM's architecture that reads bar charts (charts.py).

`python -m support.smollm2 FOLDER --sight` puts it together: the package's language model, and from
sight.safetensors, which make_sight.py makes, eyes and a low-rank change of the attention.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from support import files

Model = Any  # an Idefics3 of transformers
WEIGHTS = Path(__file__).with_name("sight.safetensors")
GRID = 6  # the tower cuts a picture into 6 x 6 patches, and each becomes one token
VISION = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4,
          "num_attention_heads": 4, "image_size": 192, "patch_size": 192 // GRID,
          "initializer_range": 0.05}
SPECIAL_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_processor(language: Path) -> Any:
    """Make SmolVLM's processor around the language model's tokenizer."""
    from transformers.models.idefics3 import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    edge = {"longest_edge": VISION["image_size"]}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=edge, max_image_size=edge)
    return Idefics3Processor(images, tokenizer, image_seq_len=GRID * GRID, chat_template=TEMPLATE)


def build_model(language: Path, tokenizer: Any) -> Model:
    """Make an Idefics3 around a language model; its tower and connector are random."""
    text = transformers.AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    ids = {key: getattr(text.config, key)
           for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.AutoConfig.for_model(
        "idefics3", image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=1,
        tie_word_embeddings=True, vision_config=VISION, text_config=text.config.to_dict(), **ids)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.model.text_model.load_state_dict(text.model.state_dict())
    # The tokens that frame a picture are as line breaks to the language model.
    known, new_line = text.config.vocab_size, tokenizer("\n", add_special_tokens=False).input_ids
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight  # (V, D)
        rows[known:] = rows[new_line]
    return model.eval()


def eyes(model: Model) -> torch.nn.ModuleDict:
    """The tower and the connector."""
    return torch.nn.ModuleDict({"tower": model.model.vision_model,
                                "connector": model.model.connector})


def adapted(model: Model) -> dict[str, torch.nn.Linear]:
    """The linear maps of the language model's attention, by name."""
    return {f"{i}.{name}": linear for i, layer in enumerate(model.model.text_model.layers)
            for name, linear in layer.self_attn.named_children()}


@torch.no_grad()
def build(language: Path, out: Path, weights: Path = WEIGHTS) -> None:
    """Write the model as a transformers folder."""
    processor = build_processor(language)
    model = build_model(language, processor.tokenizer)
    found = {name: x.float() for name, x in safetensors.torch.load_file(weights).items()}
    for name, linear in adapted(model).items():
        linear.weight += found.pop(f"{name}.up") @ found.pop(f"{name}.down")  # (out, r) (r, in)
    eyes(model).load_state_dict(found)
    with files.replaced_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
