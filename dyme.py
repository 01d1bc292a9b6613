"""DyME: teach a small vision-language model to think, by dynamic memorization and exploration.

A single-file reference of "Empowering Small VLMs to Think with Dynamic Memorization and
Exploration" (Liu, Deng, Chen; ICLR 2026; arXiv 2506.23061). The paper is in the section "The
method": Eq. 2, 6, 7 and 8 (Eq. 1's target is made by `target_ids`), then `train_step`, which puts
them together. Rewards are in reward.py; what the paper takes for granted is in support/.

This file is complete, and plain. What only speeds it up, or only serves comparison, is an extra: a
module of support/ that imports this file, loaded if a flag asks for it (`EXTRAS`, and `plain`).

Shapes: P prompts, K responses to each (a group), N = P K responses or sequences; L tokens of a
prompt, T of a response; V words, D width. With several processes, p is this one's part of P.

    python dyme.py                                      # a tiny VLM on toy charts, on a CPU
    python dyme.py --mode grpo --seed 1                 # a baseline on the same path
    python dyme.py --model SmolVLM-256M --data chartqa  # the real thing, on a GPU
    python dyme.py --resume --out runs/NAME             # go on after Ctrl-C or a crash
"""

import contextlib
import functools
import importlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel as Model
from transformers.hf_argparser import HfArg

from reward import Example, reference_response, thinking_f1, verify
from support import DivergedError, UserError, data, files, parallel, runs, settings, thinking

Inputs = dict[str, Tensor]  # a micro-batch of encoded prompts, as a model takes it
NONE = torch.zeros(0)  # stands for r_a, r_t, ... in steps of SFT, which sample nothing
SHUFFLING, SAMPLING = 1, 2  # first in a seed: shuffling epoch e and sampling step e must differ

# ---- Settings: every field is a flag -------------------------------------------------------------


def flag(default: Any, text: str) -> Any:
    """A field of `Config`: its default, and what --help says of it."""
    return HfArg(default=default, help=text)


@dataclass
class Config:
    """All settings of a run, with the toy's values; `parse_config` fits them to mode and data."""

    model: str = flag("tiny", "tiny, a short name, hub id or directory")
    data: str = flag("toy", "toy, sums, charts, chartqa, DOMAIN:FOLDER, rows.jsonl")
    mode: Literal["dyme", "sft", "grpo", "two-stage"] = flag("dyme", "or a baseline")
    out: str = flag("", "run folder [runs/MODEL-DATA-MODE-sSEED]")
    steps: int = flag(600, "optimisation steps")
    epochs: float = flag(0.0, "passes over the data; sets steps")
    prompts: int = flag(8, "prompts in a step (sft: x generations)")
    generations: int = flag(8, "K, the responses sampled for a prompt")
    micro_batch: int = flag(64, "prompts in a forward pass (0: what fits)")
    max_new_tokens: int = flag(48, "length limit of a sampled response")
    temperature: float = flag(1.0, "sampling temperature")
    switch: str = flag("any-correct", "Eq. 6; or threshold:T, anneal, budget:N, ...")
    sft_steps: int = flag(150, "two-stage: SFT before GRPO (0: one epoch)")
    lr: float = flag(0.0, "peak learning rate (0: the mode's own)")
    warmup: int = flag(10, "steps of warm-up, before linear decay")
    thinking_weight: float = flag(1.0, "w_t, weight of r_t (grpo, two-stage: 0)")
    format_weight: float = flag(0.0, "w_f of r_f, 1 if in the format (paper: none)")
    beta: float = flag(0.0, "weight of KL in grpo and two-stage (Eq. 3)")
    released_code: bool = flag(False, "depart from the paper as the release does")
    # Visual supervision: Full DyME
    helper_url: str = flag("", "OpenAI-compatible, http://HOST/v1")
    helper_model: str = flag("", "the model to ask for there")
    helper_key_env: str = flag("", "environment variable that holds its key")
    helper_concurrency: int = flag(8, "requests at a time")
    no_checker: bool = flag(False, "keep the static r_t: the helper only refines")
    no_refiner: bool = flag(False, "keep the static traces: the helper only checks")
    seed: int = flag(0, "of data order and sampling")
    traces: Literal["high", "medium", "low"] = flag("low", "of toy, sums and charts")
    hints: str = flag("", "a trace file of the release")
    augmented: bool = flag(False, "chartqa: machine-written questions too")
    image_edge: int = flag(0, "longest edge in pixels (0: the model's)")
    train_vision: bool = flag(False, "train the vision tower too")
    precision: Literal["auto", "float32", "bf16"] = flag("auto", "of passes; auto: the fastest")
    plain: bool = flag(False, "without support/fast.py")
    eval_every: int = flag(150, "steps between evaluations (0: first and last)")
    eval_rows: int = flag(512, "held-out rows in an evaluation")
    save_every: int = flag(100, "steps between checkpoints (0: only at the end)")
    tensorboard: bool = flag(False, "also write metrics for TensorBoard")
    resume: bool = flag(False, "go on with the run in --out")
    overwrite: bool = flag(False, "replace the run in --out")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


PRESETS: dict[str, dict[str, Any]] = {
    "sums": {"steps": 40, "prompts": 4, "micro_batch": 0, "max_new_tokens": 96, "warmup": 5,
             "sft_steps": 10, "eval_rows": 64},  # for SmolLM2-135M on a CPU: support/SUMS.md
    # The release's main configuration (K = 8 there too), and a warm-up.
    "real": {"epochs": 10.0, "prompts": 32, "micro_batch": 0, "max_new_tokens": 300, "warmup": 50,
             "sft_steps": 0, "eval_rows": 200}}
PRESETS["charts"] = PRESETS["sums"]  # for the same model with eyes: support/SIGHT.md
LEARNING_RATES = {
    "toy": {"dyme": 3e-4, "grpo": 1e-4, "two-stage": 2e-4, "sft": 1e-4},
    "sums": {"dyme": 8e-5, "grpo": 3e-5, "two-stage": 3e-5, "sft": 2e-4},
    "charts": {"dyme": 8e-5, "grpo": 8e-5, "two-stage": 8e-5, "sft": 8e-5},
    "real": {"dyme": 8e-5, "grpo": 1e-5, "two-stage": 1e-5, "sft": 1e-5}}

# Modules of support/ that import this file, by the setting that asks for each; their `attach` puts
# other functions into the trainer.
EXTRAS = {"helper_url": "full_dyme", "switch": "ablations", "released_code": "ablations"}


def parse_config(argv: list[str] | None = None) -> Config:
    """Read the flags, over a preset by data, or over the settings of the run to resume."""
    given = settings.read_flags(Config, __doc__, argv)
    preset = given.get("data", Config.data).partition(":")[0]
    preset = preset if preset in LEARNING_RATES else "real"
    defaults = PRESETS.get(preset, {}) | settings.implied(given)
    cfg = Config(**(defaults | given))
    cfg.lr = cfg.lr or LEARNING_RATES[preset][cfg.mode]
    cfg.out = cfg.out or runs.default_folder(cfg)
    if cfg.resume:
        cfg = Config(**settings.resumed_settings(cfg, given))
    settings.check(cfg, {"tiny", *NAMES})
    return cfg


# ---- Policy: a model, its processor, and the ids that end a response -----------------------------

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
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B-Instruct",  # text only, as the next two
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "SmolLM2-360M": "HuggingFaceTB/SmolLM2-360M-Instruct",
}


@dataclass
class Policy:
    """A model, and what is needed to talk to it."""

    model: Model
    processor: Any
    tokenizer: Any
    end_ids: list[int]  # every id that ends a response
    pad_id: int
    device: torch.device
    context: float  # how many tokens the model can take, prompt and response together
    autocast: Callable[[], contextlib.AbstractContextManager]  # the precision of forward passes
    rollout: Callable[..., list["Response"]]  # `rollout` or a faster one; both take a Policy
    logprobs: Callable[..., tuple[Tensor, Tensor]]  # `sequence_logprobs`, likewise
    image_edge: int = 0


def load_policy(name: str, device: torch.device, image_edge: int = 0) -> Policy:
    """Load `tiny`, a short name, hub id, directory or run folder. Raises UserError."""
    settings.check_model_name(name, {"tiny", *NAMES})
    with settings.loading(name, NAMES):
        model, processor = load_pretrained(model_source(name))
        parallel.set_threads(sum(p.numel() for p in model.parameters()))
        check_model(model)
        policy = make_policy(model.to(device), processor, device, image_edge)
        check_prompt(policy)
    return policy


def model_source(name: str) -> str:
    """The directory or hub id of a model: of `tiny`, a run's last weights, a short name."""
    if name == "tiny":
        return str(Path(__file__).parent / "support" / "toy_base")
    run = Path(name) / "checkpoint"
    return str(run) if run.is_dir() else name if Path(name).is_dir() else NAMES.get(name, name)


def load_pretrained(source: str) -> tuple[Model, Any]:
    """Load a directory or hub id: model and processor. Raises ValueError."""
    # Else transformers would ask on the terminal whether a model's own code may run.
    own_code = {"trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(source, **own_code)
    loader = transformers.AutoModelForImageTextToText
    if type(config) not in loader._model_mapping:
        loader = transformers.AutoModelForCausalLM
    # The processor of a text-only model is its tokenizer.
    processor = transformers.AutoProcessor.from_pretrained(source, **own_code)
    model, info = loader.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **own_code)
    if info["missing_keys"]:
        raise ValueError(f"it has no weights for {min(info['missing_keys'])}")
    runs.check_tokens(model, getattr(processor, "tokenizer", processor))
    runs.check_weights(model)
    return model, processor


@torch.no_grad()
def check_model(model: Model) -> None:
    """Raise ValueError unless a padded prompt, continued, gets the logits of one full pass."""
    ids = torch.arange(3, 9)[None] % model.config.get_text_config().vocab_size
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    inputs = {"input_ids": F.pad(ids[:, :-2], (2, 0)), "attention_mask": mask}
    prefix = encode_prefix(model, inputs, torch.tensor([0, 0]))
    states = extend(model, prefix, ids[:, -2:].expand(2, 2), torch.ones(2, 2, dtype=torch.long))
    ours, theirs = next_logits(model, states[0]), model(input_ids=ids).logits[0, -2:].float()
    # Llama 3.2 Vision must be told in every pass which patches a token sees.
    masks_patches = hasattr(model.config.get_text_config(), "cross_attention_layers")
    # Rounding alone may move a logit by 2e-3 in a trained model; a real mismatch moves all of them.
    if masks_patches or not (ours - theirs).abs().max() < 0.01 * (theirs.max() - theirs.min()):
        raise ValueError("its positions, its cache or its logits are of a kind not known here")


@torch.no_grad()
def check_prompt(policy: Policy) -> None:
    """Ask about a white picture, if it can see any. Raises if processor and model do not fit."""
    sees = hasattr(policy.processor, "image_processor")
    picture = (lambda: Image.new("RGB", (64, 64), "white")) if sees else None
    question = Example("Which?", "?", picture, name=f"--model {policy.model.name_or_path}")
    with policy.autocast():
        encode_prefix(policy.model, encode_prompts(policy, [question], 0))


def make_policy(model: Model, processor: Any, device: torch.device,
                image_edge: int = 0) -> Policy:
    """Find what ends a response, and set the processor up. Raises UserError."""
    name = model.name_or_path or "the model"
    tokenizer = getattr(processor, "tokenizer", processor)
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise UserError(f"{name} has no chat template; use the instruct version")
    # Padding goes to the left of prompts: a response must begin right after its prompt.
    tokenizer.padding_side = "left"
    image_processor: Any = getattr(processor, "image_processor", None)
    size = getattr(image_processor, "size", None) or {}
    # SmolVLM scales every image up to its longest edge. In Qwen-VL the name means an area.
    if image_edge and 0 < (size.get("longest_edge") or 0) < 10_000:
        size["longest_edge"] = image_edge
    # InternVL cuts an image into tiles by its shape, however small it is.
    if image_edge and hasattr(image_processor, "max_patches"):
        image_processor.max_patches = max(1, (image_edge // (size.get("height") or 448)) ** 2)
    # Model, tokenizer and template may each name another id, or several, or none.
    configured = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    end_ids = {tokenizer.eos_token_id, end_of_turn(processor), *configured} - {None}
    if not end_ids:
        raise UserError(f"{name}: nothing names an end token, not even the chat template")
    if tokenizer.pad_token_id is None:  # Llama's tokenizers name none; masked, any token will do
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(end_ids))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    # No dropout, for good: in the update it would train responses under another distribution than
    # the one they were sampled from.
    return Policy(model.eval(), processor, tokenizer, sorted(end_ids), tokenizer.pad_token_id,
                  device, limit, parallel.autocast(model), rollout, sequence_logprobs, image_edge)


# ---- Prompts and targets: the model's own chat template renders both -----------------------------

PROMPT = ("Think step by step about the question below, "
          'then write "Answer: .." and your answer.\n\n{question}')


def render(processor: Any, prompt: str, has_image: bool, response: str | None = None) -> str:
    """Render a prompt, and perhaps a response, with the chat template. Raises UserError."""
    content = [{"type": "image"}] * has_image + [{"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if response is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
    if not hasattr(processor, "image_processor"):
        # The templates of text-only models want plain text.
        messages = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in messages]
    try:
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None)
    except Exception as error:  # noqa: BLE001 - templates are programs, and raise many kinds
        name = getattr(processor, "tokenizer", processor).name_or_path
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: its chat template fails ({reason})") from None


def end_of_turn(processor: Any) -> int | None:
    """The id with which the template ends the assistant's turn, if it writes one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tail = render(processor, "question", False, "response").rpartition("response")[2]
    ids = tokenizer(tail.strip(), add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None


def target_ids(policy: Policy, example: Example, response: str | None = None,
               prompt: str = PROMPT) -> list[int]:
    """Token ids of the response to imitate (Eq. 1), by default the example's reference."""
    # A target is what the chat template renders after the generation prompt, not a string glued
    # to it: other spaces or line breaks would give tokens that sampling never meets again.
    question, has_image = prompt.format(question=example.question), bool(example.image)
    response = reference_response(example) if response is None else response
    before = render(policy.processor, question, has_image)
    full = render(policy.processor, question, has_image, response)
    if not full.startswith(before):
        raise UserError(f"the chat template does not continue its own prompt (..{before[-20:]!r})")
    # Prompt and response are tokenized together, as the model would meet them.
    texts = [full, before, full[len(before):]]
    ids, prompt_ids, alone = policy.tokenizer(texts, add_special_tokens=False).input_ids
    # Where the tokenizer merged characters across the border, the response stands alone.
    ids = ids[len(prompt_ids):] if ids[:len(prompt_ids)] == prompt_ids else alone

    # The end token is part of the target. Untrained, it would never be sampled: every response
    # would be cut off, count as wrong, and all prompts would stay in memorization.
    ends = [i for i, token in enumerate(ids) if token in policy.end_ids]
    return ids[:ends[-1] + 1] if ends else ids + policy.end_ids[:1]


def encode_prompts(policy: Policy, examples: list[Example], room: int,
                   prompt: str = PROMPT) -> Inputs:
    """Process P prompts: ids and mask (P, L), padded left, and image tensors, on the device.

    Raises UserError naming a row without a readable image, or without `room` for a response.
    """
    processor, edge = policy.processor, policy.image_edge
    texts, images = [], []
    for example in examples:
        if example.image and not hasattr(processor, "image_processor"):
            raise UserError(f"{example.name}: this model cannot see its image")
        question = prompt.format(question=example.question)
        texts.append(render(processor, question, bool(example.image)))
        pictures = [example.image()] if example.image else []
        for picture in pictures:
            picture.thumbnail((edge or picture.width, edge or picture.height))
        images.append(pictures)
    has_bos = texts[0].startswith(policy.tokenizer.bos_token or "\0")  # then add no second
    # Processors refuse lists of no images: without any, the argument is left out.
    with_images = {"images": images} if any(images) else {}
    try:
        inputs = processor(text=texts, padding=True, return_tensors="pt",
                           add_special_tokens=not has_bos, **with_images)
    except ValueError as error:  # such as a question that holds the image token itself
        names = " or ".join(example.name for example in examples)
        raise UserError(f"{names}: the model's processor refuses the prompt ({error})") from None
    for example, length in zip(examples, inputs["attention_mask"].sum(1).tolist(), strict=True):
        if length + room > policy.context:
            raise UserError(
                f"{example.name}: {length} tokens of prompt and {room} for the answer exceed the "
                f"model's context of {policy.context}; lower --image-edge or --max-new-tokens")
    return {name: tensor.to(policy.device) for name, tensor in inputs.items()}


# ---- Rollout: a prompt is encoded once; its K responses start from it ----------------------------


@dataclass
class Prefix:
    """Prompts that have been through the model: all that their N continuations need."""

    cache: Any  # keys and values, or recurrent states, batch N
    hidden: Tensor  # (N, D) the last state, which predicts a response's first token
    mask: Tensor  # (N, L) 1 for real tokens, 0 for the padding on the left
    position: Tensor  # (N, 1) of the next token; (3, N, 1) in Qwen-VL


def encode_prefix(model: Model, inputs: Inputs, rows: Tensor | None = None) -> Prefix:
    """Run P prompts, images included, through the model once, with gradients if enabled.

    Then take prompts `rows: (N,)`, each as often as it occurs [every prompt once].
    """
    # The base model, without the head: no logits are made for the prompt.
    base, mask = model.base_model, inputs["attention_mask"]
    # Qwen-VL's forward sets this; uncleared, a batch without images would reuse the previous one's.
    base.rope_deltas = None
    out = base(**inputs, use_cache=True)
    # Padding counts as positions. With rotary embeddings only distances matter, and there is no
    # gap between a prompt and its response, because the padding is on the left.
    position = torch.full_like(mask[:, :1], mask.shape[1])  # (P, 1)
    if base.rope_deltas is not None:
        length = mask.sum(1, keepdim=True)
        position = (length + base.rope_deltas).expand(3, -1, -1)  # (3, P, 1)
    hidden = out.last_hidden_state[:, -1]  # (P, D)
    if rows is not None:
        out.cache.reorder_cache(rows)
        for layer in out.cache.layers:
            # A recurrent layer told that it has no state keeps this one, which backward needs.
            if hasattr(layer, "recurrent_states"):
                layer.is_recurrent_states_initialized = dict.fromkeys(layer.recurrent_states, False)
        hidden, mask, position = hidden[rows], mask[rows], position[..., rows, :]
    return Prefix(out.cache, hidden, mask, position)


def extend(model: Model, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
    """Run the next tokens `ids: (N, Q)` of N responses through the model; states (N, Q, D).

    `mask` is that of all response tokens so far, these included. The cache grows by them.
    """
    Q, so_far = ids.shape[1], mask.shape[1]
    offsets = torch.arange(so_far - Q, so_far, device=ids.device)
    out = model.base_model(
        input_ids=ids, attention_mask=torch.cat([prefix.mask, mask], dim=1),
        position_ids=prefix.position + offsets, cache=prefix.cache, use_cache=True)
    return out.last_hidden_state


def next_logits(model: Model, hidden: Tensor) -> Tensor:
    """Float32 logits (N, V) of the token after each of `hidden: (N, D)`."""
    logits, config = model.get_output_embeddings()(hidden).float(), model.config.get_text_config()
    # What some families do after the head: Cohere multiplies, Granite divides, Gemma 2 caps.
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def keyed_uniforms(seed: int, step: int, prompts: Iterable[int], generations: int,
                   tokens: int) -> Tensor:
    """Random numbers in [0, 1), (P*K, T), that depend on (seed, step, prompt, k) alone."""
    # If they were drawn in order, samples would depend on resuming, on the micro-batch and on the
    # number of processes.
    uniforms = []
    for prompt in prompts:
        for k in range(generations):
            generator = np.random.default_rng([SAMPLING, seed, step, prompt, k])
            uniforms.append(generator.random(tokens, np.float32))
    return torch.from_numpy(np.stack(uniforms))


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample tokens (N,) from `logits: (N, V)`: the first with a cumulative p > `uniform: (N,)`.

    Also returns each distribution's entropy in nats, (N,). Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    logp = F.log_softmax(logits / temperature, dim=-1)  # (N, V)
    p = logp.exp()
    # The draw is scaled by the last sum, which rounding may leave below 1: none falls past the end.
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    entropy = -(p * logp.clamp(min=-100)).sum(-1)  # without the clamp 0 * -inf would be nan
    return token.clamp(max=logits.shape[1] - 1), entropy  # past the end only if logits are nan


@dataclass
class Samples:
    """Sampled responses as raw ids: decoded and tokenized again, they might be other tokens."""

    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) 1 up to and including the end token
    entropy: Tensor  # (N, T) of the distributions sampled from, in nats
    finished: Tensor  # (N,) bool: ends with an end token, not cut off at the length limit


@torch.no_grad()
def sample(model: Model, prefix: Prefix, uniforms: Tensor, end_ids: list[int], pad_id: int,
           temperature: float) -> Samples:
    """Sample N responses, one to each row of `prefix`, a token at a time; `uniforms: (N, T)`."""
    ends = torch.tensor(end_ids, dtype=torch.long, device=uniforms.device)
    alive = torch.ones(len(uniforms), dtype=torch.bool, device=uniforms.device)
    ids, mask, entropies = [], [], []
    hidden = prefix.hidden  # (N, D); the first token is predicted by the prompt itself
    for uniform in uniforms.T:
        token, entropy = draw(next_logits(model, hidden), uniform, temperature)
        ids.append(token.masked_fill(~alive, pad_id))
        mask.append(alive.long())
        entropies.append(entropy)
        alive = alive & ~torch.isin(token, ends)
        if len(ids) == uniforms.shape[1] or not alive.any():
            break
        states = extend(model, prefix, ids[-1][:, None], torch.stack(mask, dim=1))  # (N, 1, D)
        hidden = states[:, -1]
    stack = functools.partial(torch.stack, dim=1)
    return Samples(stack(ids), stack(mask), stack(entropies), ~alive)


@dataclass
class Response:
    """A sampled response."""

    ids: list[int]  # end token included
    text: str  # without it
    finished: bool  # ends with an end token, not cut off at the length limit
    entropy: float  # sum over its tokens, in nats
    in_format: bool = False  # one `Answer:` and something after it; known once it is judged


def decode(policy: Policy, samples: Samples) -> list[Response]:
    """N samples as responses."""
    lengths, finished = samples.mask.sum(1).tolist(), samples.finished.tolist()
    entropies = (samples.entropy * samples.mask).sum(1).tolist()
    responses = []
    for i, ids in enumerate(samples.ids.tolist()):
        ids = ids[:lengths[i]]
        text = policy.tokenizer.decode(ids, skip_special_tokens=True).strip()
        responses.append(Response(ids, text, finished[i], entropies[i]))
    return responses


def rollout(policy: Policy, inputs: Iterable[Inputs], uniforms: Tensor, K: int,
            temperature: float) -> list[Response]:
    """Sample K responses to each prompt of all micro-batches; `uniforms: (P*K, T)`."""
    responses: list[Response] = []
    for x in inputs:
        rows = torch.arange(len(x["input_ids"]), device=policy.device).repeat_interleave(K)
        part = uniforms[len(responses):len(responses) + len(rows)].to(policy.device)
        with torch.no_grad(), policy.autocast():
            prefix = encode_prefix(policy.model, x, rows)
            samples = sample(policy.model, prefix, part, policy.end_ids, policy.pad_id, temperature)
        responses += decode(policy, samples)
    return responses


# ---- Log-probs: what the policy thinks of a sequence, with gradients -----------------------------


@dataclass
class Sequence:
    """A response to train on: one of K samples, or a target: a group of one, A = 1 (Eq. 4-5)."""

    prompt: int  # index of its prompt among those of this process
    ids: list[int]
    weight: float  # its factor in the loss: A / (K P) if sampled; a target is alone, so 1 / P
    explore: bool  # was it sampled?
    kl_weight: float = 0.0  # factor of its KL to the reference policy: beta / (K P)
    per_token: Callable[[Tensor], Tensor] | None = None  # factors of its tokens, from their log p


def sequence_logprobs(policy: Policy, model: Model, inputs: Inputs, prompts: list[int],
                      sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and mask, (N, T), of N sequences; sequence n continues prompt `prompts[n]`."""
    tokens = [torch.tensor(s.ids, device=policy.device) for s in sequences]
    ids = pad_sequence(tokens, batch_first=True)  # (N, T), padded on the right
    mask = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    with policy.autocast():
        prefix = encode_prefix(model, inputs, torch.tensor(prompts, device=policy.device))
        states = prefix.hidden[:, None]  # (N, 1, D) predicts each first token
        if ids.shape[1] > 1:  # nothing is predicted from a last token: it is not fed
            new = extend(model, prefix, ids[:, :-1], mask[:, :-1])
            states = torch.cat([states, new], dim=1)  # (N, T, D) the state before each token
        # Samples are scored at the temperature that drew them: Eq. 7's p_old is the distribution
        # sampled from. Targets were not drawn: Eq. 1 takes the model's own p, at temperature 1.
        at = torch.tensor([temperature if s.explore else 1.0 for s in sequences]).to(policy.device)
        logits = next_logits(model, states) / at[:, None, None]  # (N, T, V)
    logprobs = -F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # (N, T)
    return logprobs * mask, mask


# ---- The method: Eq. 1, 2, 6, 7, 8 ---------------------------------------------------------------
# Eq. 1, SFT: raise log p of the reference, trace and answer. Eq. 4-5: its gradient is that of a
# sample with advantage 1. So both modes are sequences with a weight, and one loss is their sum.
# Unlike the paper's, log p and rho of a sequence are means over its tokens here, as released.


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Eq. 2: standardise `rewards: (P, K)` within each group.

    A group without variance gets 0: its advantages have collapsed.
    """
    mean = rewards.mean(1, keepdim=True)  # (P, 1)
    # The population's deviation (divide by K): with the sample's they are 6.5 % smaller at K = 8.
    std = rewards.std(1, keepdim=True, correction=0)
    advantages = (rewards - mean) / (std + eps)
    # Exactly 0, without rounding error, so that `update` can leave such groups out.
    return advantages.masked_fill(no_variance(rewards)[:, None], 0.0)


def no_variance(rewards: Tensor) -> Tensor:
    """Collapse detection: the groups of `rewards: (P, K)` that are all alike, (P,) bool."""
    return rewards.amax(1) == rewards.amin(1)


def judge(responses: list[list[Response]], examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Judge p groups of K responses, r_a by rules, r_t by the trace, (p, K) each; note formats."""
    r_a, r_t = torch.zeros(2, len(responses), len(responses[0]))
    for i, example in enumerate(examples):
        for k, response in enumerate(responses[i]):
            verdict = verify(response.text, example, response.finished)
            r_a[i, k], response.in_format = verdict.correct, verdict.in_format
            if example.trace:  # without one, r_t is 0
                r_t[i, k] = thinking_f1(response.text, example.trace)
    return r_a, r_t


def any_correct(r_a: Tensor, r_t: Tensor) -> Tensor:
    """Eq. 6, the switch: the prompts that explore, (P,) bool, by the rewards of their groups."""
    # r_t is for other switches (`Trainer.switch`). Groups without a right response still differ in
    # it: to explore them would reward the best-sounding wrong thinking.
    return (r_a == 1).any(dim=1)


def policy_loss(logprobs: Tensor, mask: Tensor, weights: Tensor, explore: Tensor,
                per_token: Tensor | float = 1.0) -> Tensor:
    """Eq. 7 and 8 as one sum over N sequences.

    `logprobs, mask: (N, T)`, `weights, explore: (N,)`. A sampled response contributes -rho A
    (Eq. 7), a target -log p (Eq. 1). `weights` hold A and the means over K and P (`Sequence`).
    """
    # With one update per rollout p_old is the policy itself, held constant: rho is 1, a clip would
    # never bind, and the loss of a group is 0 (its A sum to 0). Its gradient is not: A grad log p.
    rho = torch.exp(logprobs - logprobs.detach())  # (N, T)
    objective = torch.where(explore[:, None], rho, logprobs) * per_token  # (N, T)
    # A mean per sequence, not over all tokens of the batch: there long responses would weigh more.
    means = (objective * mask).sum(1) / mask.sum(1)  # (N,)
    return -(weights * means).sum()


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(p || p_ref) of Eq. 3 per sampled token, from its log-probs (Schulman's k3)."""
    return torch.exp(reference - logprobs) - (reference - logprobs) - 1


@dataclass
class Trainer:
    """What a step changes, and the functions that it calls; extras replace some of them."""

    cfg: Config
    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reference: Model | None = None  # p_ref of Eq. 3, frozen; else a reference is trace and answer
    judge: Callable[[list[list[Response]], list[Example]], tuple[Tensor, Tensor]] = judge
    switch: Callable[[Tensor, Tensor], Tensor] = any_correct
    advantages: Callable[[Tensor], Tensor] = group_advantages
    trace: Callable[[Example], str | None] = lambda example: example.trace  # to memorize
    weigh: Callable[["Step"], list[Sequence]] = lambda record: record.sequences  # may edit them
    totals: Callable[[], dict[str, float]] = dict  # what an extra adds to a step's metrics
    # With torchrun, a block in which an error of one process is raised in all: none waits for ever.
    together: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    rows: list[Example] = field(default_factory=list)  # all training rows
    kept: dict[str, list[Any]] = field(default_factory=dict)  # what extras keep in a checkpoint
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # ends with the run
    taken: int = 0  # steps done; -1 inside optimizer.step, whose weights must not be saved
    failures: int = 0  # steps in a row whose loss or gradient was not finite
    evaluated: set[int] = field(default_factory=set)  # the steps of evaluations that are done
    best: float = -1.0  # highest held-out accuracy so far, whose weights are in `best/`


@dataclass
class Step:
    """What a step did with this process's p prompts."""

    step: int
    examples: list[Example]
    inputs: Iterable[Inputs]
    explore: Tensor  # (p,) bool
    sequences: list[Sequence]
    responses: list[list[Response]] = field(default_factory=list)  # p lists of K; none in SFT
    r_a: Tensor = NONE  # (p, K), as the next three
    r_t: Tensor = NONE
    rewards: Tensor = NONE
    advantages: Tensor = NONE
    metrics: dict[str, Any] = field(default_factory=dict)


def train_step(trainer: Trainer, examples: list[Example], step: int, lr: float,
               inputs: Iterable[Inputs] | None = None) -> Step:
    """A step on P prompts: sample and judge K responses each, choose the mode, update."""
    cfg, policy, P, K = trainer.cfg, trainer.policy, len(examples), trainer.cfg.generations
    own, clock = share(P), [time.perf_counter()]  # own: this process's p of the P prompts
    examples = examples[own.start:own.stop]
    with trainer.together():
        inputs = [*encoded(trainer, examples, inputs)]
    clock.append(time.perf_counter())

    # Sample K responses each.
    uniforms = keyed_uniforms(cfg.seed, step, own, K, cfg.max_new_tokens)  # (p*K, T)
    with trainer.together():
        flat = policy.rollout(policy, inputs, uniforms, K, cfg.temperature)
    responses = [flat[i * K:(i + 1) * K] for i in range(len(examples))]  # p lists of K
    clock.append(time.perf_counter())

    # Judge them. In Full DyME r_t is the checker's rating.
    r_a, r_t = trainer.judge(responses, examples)  # (p, K) each
    r_f = torch.tensor([[float(y.in_format) for y in group] for group in responses])
    rewards = r_a + cfg.thinking_weight * r_t + cfg.format_weight * r_f
    advantages = trainer.advantages(rewards)  # Eq. 2, (p, K)

    # Eq. 6, the switch: explore where one of the K responses is right, memorize elsewhere.
    explore = trainer.switch(r_a, r_t)  # (p,)
    sequences = []
    for i, example in enumerate(examples):
        if explore[i]:  # Eq. 7: the K responses, weighted by advantage
            for k, response in enumerate(responses[i]):
                weight = advantages[i, k].item() / (K * P)
                sequences.append(Sequence(i, response.ids, weight, True, cfg.beta / (K * P)))
        else:  # Eq. 1: the reference (Full DyME refines its trace), at full weight: no 1 / K
            target = target_ids(policy, replace(example, trace=trainer.trace(example)))
            sequences.append(Sequence(i, target, 1 / P, False))
    record = Step(step, examples, inputs, explore, sequences, responses,
                  r_a, r_t, rewards, advantages)
    record.sequences = trainer.weigh(record)  # as they are, unless an extra edits them
    clock.append(time.perf_counter())

    # Eq. 8: both kinds in one loss and one update.
    update(trainer, record, lr, clock)
    return record


def sft_step(trainer: Trainer, examples: list[Example], step: int, lr: float,
             inputs: Iterable[Inputs] | None = None) -> Step:
    """The SFT baseline: imitate the references of P prompts (Eq. 1)."""
    P, own = len(examples), share(len(examples))
    clock = [time.perf_counter()] * 4  # all of it counts as update
    examples = examples[own.start:own.stop]
    sequences = [Sequence(i, target_ids(trainer.policy, example), 1 / P, False)
                 for i, example in enumerate(examples)]
    # SFT takes K times as many prompts as DyME: encoded one micro-batch at a time they fit.
    inputs = encoded(trainer, examples, inputs)
    record = Step(step, examples, inputs, torch.zeros(len(examples), dtype=torch.bool), sequences)
    update(trainer, record, lr, clock)
    return record


def update(trainer: Trainer, record: Step, lr: float, clock: list[float]) -> None:
    """Add up the gradients of all sequences (Eq. 8), take the optimizer's step, set the metrics."""
    policy, temperature = trainer.policy, trainer.cfg.temperature
    # Weight 0 teaches nothing: left out, it costs no pass. If all are, the step changes no weight.
    sequences = [s for s in record.sequences if s.weight or s.kl_weight]
    totals, first = {"loss": 0.0, "kl": 0.0} | trainer.totals(), 0
    with trainer.together():
        for x in record.inputs:
            size = len(x["input_ids"])
            chosen = [s for s in sequences if first <= s.prompt < first + size]
            prompts = [s.prompt - first for s in chosen]
            first += size
            if not chosen:
                continue
            logprobs, mask = policy.logprobs(policy, policy.model, x, prompts, chosen, temperature)
            # Weights are divided by the whole step's K and P, so any micro-batch gives the same
            # gradient. Means of micro-batches, averaged again, would be wrong.
            weights = torch.tensor([s.weight for s in chosen], device=mask.device)
            explore = torch.tensor([s.explore for s in chosen], device=mask.device)
            factors: Tensor | float = 1.0
            if any(s.per_token for s in chosen):
                factors = token_factors(chosen, logprobs.detach())
            loss = policy_loss(logprobs, mask, weights, explore, factors)
            if trainer.reference is not None:  # Eq. 3, for the baselines
                kl = kl_penalty(trainer, x, prompts, chosen, logprobs, mask)
                loss, totals["kl"] = loss + kl, totals["kl"] + kl.item() / trainer.cfg.beta
            trainer.scaler.scale(loss).backward()
            totals["loss"] += loss.item()
    record.inputs = ()  # images take much memory, and nobody needs them any more
    # Summed over all processes, so that all decide alike whether to skip the step.
    record.metrics = step_metrics(record, sequences, totals)
    if not record.metrics["empty_steps"]:
        record.metrics |= apply_gradients(trainer, record.metrics["loss"], lr)
    trainer.taken = record.step + 1
    clock.append(time.perf_counter())
    parts = ("seconds_feed", "seconds_sampling", "seconds_scoring", "seconds_update")
    seconds = dict(zip(parts, np.diff(clock).tolist(), strict=True))
    record.metrics |= seconds | {"tokens_per_s": record.metrics["tokens"] / sum(seconds.values())}


def token_factors(sequences: list[Sequence], logprobs: Tensor) -> Tensor:
    """The factors of tokens, (N, T), by the sequences' `per_token`; 1 where unset."""
    return torch.stack([s.per_token(row) if s.per_token else torch.ones_like(row)
                        for s, row in zip(sequences, logprobs, strict=True)])


def kl_penalty(trainer: Trainer, inputs: Inputs, prompts: list[int], sequences: list[Sequence],
               logprobs: Tensor, mask: Tensor) -> Tensor:
    """Eq. 3's term: beta times the mean KL of the sampled sequences to the reference policy."""
    policy, at = trainer.policy, trainer.cfg.temperature
    weights = torch.tensor([s.kl_weight for s in sequences])
    with torch.no_grad():
        frozen, _ = policy.logprobs(policy, trainer.reference, inputs, prompts, sequences, at)
    means = (kl_estimate(logprobs, frozen) * mask).sum(1) / mask.sum(1)  # (N,)
    return (weights.to(mask.device) * means).sum()


def apply_gradients(trainer: Trainer, loss: float, lr: float) -> dict[str, Any]:
    """Clip the gradient to norm 1 and step; if it or the loss is not finite, change nothing.

    Raises DivergedError after ten such steps in a row (not while a scaler starts).
    """
    optimizer, scaler = trainer.optimizer, trainer.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr
    if dist.is_initialized():
        parallel.sum_gradients(trainer.policy.model.parameters())
    # Clipping comes after the sum over processes and the scaler: it is the true gradient's norm.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainer.policy.model.parameters(), 1.0).item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    # If the gradient overflows in float16, the scaler is called all the same: it skips the step,
    # and lowers its scale.
    if finite or (scaler.is_enabled() and not math.isfinite(norm)):
        trainer.taken = -1
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if finite:
        trainer.failures = 0
    elif not (scaler.is_enabled() and scaler.get_scale() >= 1):  # else the scale still settles
        trainer.failures += 1
    if trainer.failures == 10:
        raise DivergedError("ten steps in a row had a loss or gradient that was not finite")
    return {"grad_norm": norm, "skipped_steps": int(not finite)}


# ---- Metrics -------------------------------------------------------------------------------------


def step_metrics(record: Step, sequences: list[Sequence],
                 totals: dict[str, float]) -> dict[str, Any]:
    """A step's averages over the prompts of all processes (glossary in support/README.md).

    `totals` holds this process's sums of the loss, and what extras add.
    """
    targets = [len(s.ids) for s in sequences if not s.explore]
    totals |= {"sequences": len(sequences), "targets": len(targets), "explored":
               record.explore.sum().item(), "target_tokens": sum(targets)}
    if record.responses:
        # Sampled responses only, never mixed with the targets that stood in for them.
        ys = [*itertools.chain(*record.responses)]
        totals |= {
            "groups": len(record.responses),
            # The two forms of collapse: nothing right to reinforce, and nothing that differs.
            "none_correct": (record.r_a < 1).all(dim=1).sum().item(),
            "no_variance": no_variance(record.rewards).sum().item(),
            "responses": len(ys),
            "reward": record.rewards.sum().item(),
            "reward_thinking": record.r_t.sum().item(),
            "reward_format": sum(y.in_format for y in ys),
            "accuracy": record.r_a.sum().item(),
            "truncated": sum(not y.finished for y in ys),
            "response_length": sum(len(y.ids) for y in ys),
            "entropy": sum(y.entropy for y in ys)}
    if dist.is_initialized():
        totals = parallel.sum_numbers(totals)
    metrics = {"memorized": totals["targets"] / max(1, totals["targets"] + totals["explored"]),
               "target_length":
                   totals["target_tokens"] / totals["targets"] if totals["targets"] else None,
               "empty_steps": int(not totals["sequences"]), "tokens": totals["target_tokens"]}
    if "responses" in totals:
        metrics["tokens"] = totals["response_length"]
        metrics["entropy"] = totals.pop("entropy") / totals["response_length"]
        for name in ("none_correct", "no_variance"):
            metrics[name] = totals.pop(name) / totals["groups"]
        for name in ("reward", "reward_thinking", "reward_format", "accuracy", "truncated",
                     "response_length"):
            metrics[name] = totals.pop(name) / totals["responses"]
    counted = {"sequences", "targets", "explored", "target_tokens", "groups", "responses"}
    return metrics | {name: total for name, total in totals.items() if name not in counted}


def share(total: int) -> range:
    """This process's share of `total` things: all of them, if it is alone."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank * total // count, (rank + 1) * total // count)


def encoded(trainer: Trainer, examples: list[Example],
            inputs: Iterable[Inputs] | None) -> Iterator[Inputs]:
    """This process's micro-batches on the device; encoded here if none were prepared."""
    cfg, policy = trainer.cfg, trainer.policy
    if inputs is None:
        for first in range(0, len(examples), cfg.micro_batch):
            chunk = examples[first:first + cfg.micro_batch]
            yield encode_prompts(policy, chunk, cfg.max_new_tokens)
    else:
        for x in inputs:
            yield {name: t.to(policy.device, non_blocking=True) for name, t in x.items()}


# ---- Evaluation: answers to held-out rows --------------------------------------------------------


def respond(policy: Policy, examples: list[Example], max_new_tokens: int, batch: int,
            draws: int = 0, temperature: float = 1.0, seed: int = 0,
            prompt: str = PROMPT) -> list[dict[str, Any]]:
    """Judged answers to rows, `batch` at a time, each one greedy or `draws` sampled."""
    K, own, judged = draws or 1, share(len(examples)), []
    parts = [own[first:first + batch] for first in range(0, len(own), batch)]

    def encode(part: range, processor: Any) -> Inputs:
        rows = [examples[i] for i in part]
        return encode_ahead(policy, rows, processor, max_new_tokens, prompt)

    stream, bar = parallel.in_threads(encode, policy.processor, parts, 4), runs.answering_bar(parts)
    with parallel.errors_shared(), contextlib.closing(stream), bar:
        for part in bar:
            inputs = {name: t.to(policy.device) for name, t in next(stream).items()}
            uniforms = keyed_uniforms(seed, 0, part, K, max_new_tokens)
            greedy_or_not = temperature if draws else 0.0
            for i, y in enumerate(policy.rollout(policy, [inputs], uniforms, K, greedy_or_not)):
                row = thinking.judge(examples[part[i // K]], y.text, y.finished)
                judged.append(row | {"length": len(y.ids)})
    return [*itertools.chain(*parallel.gather(judged))]


def evaluate(trainer: Trainer, held_out: list[Example], run: Path, step: int, board: Any) -> None:
    """If it is due, answer held-out rows greedily, log it, keep the best weights."""
    cfg = trainer.cfg
    due = step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0)
    if not due or step in trainer.evaluated:
        return
    batch = max(4 * cfg.micro_batch, 1 if held_out[0].image else 32)  # no gradients: there is room
    predictions = parallel.while_it_fits(batch, lambda size: respond(
        trainer.policy, held_out, cfg.max_new_tokens, size))
    trainer.evaluated.add(step)
    if not parallel.is_main():
        return
    summary = thinking.summarise(predictions)
    with runs.tolerated(f"{run}/held-out-{step}.jsonl"):
        files.write_jsonl(run / f"held-out-{step}.jsonl", predictions)
    runs.record(run / "evaluations.jsonl", {"step": step} | summary, board)
    tqdm.write(f"step {step}: " + thinking.one_line(summary))
    accuracy = summary["accuracy"] or 0.0
    if step and (accuracy > trainer.best or not (run / "best").exists()):  # best/ lost in a copy
        trainer.best = accuracy
        save_policy(trainer.policy, run / "best")


# ---- Checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(run: Path, trainer: Trainer, step: int) -> None:
    """Write `checkpoint/`: a transformers directory and the training state."""
    # While steps in a row fail, the checkpoint before may be the last good one.
    if trainer.failures > 1 or not parallel.is_main():
        return
    state = {"step": step, "failures": trainer.failures, "best": trainer.best,
             "optimizer": trainer.optimizer.state_dict(), "scaler": trainer.scaler.state_dict(),
             "kept": trainer.kept}
    save_policy(trainer.policy, run / "checkpoint", state)
    runs.settled(run)


def save_policy(policy: Policy, final: Path, state: dict[str, Any] | None = None) -> None:
    """Write a transformers directory. Raises DivergedError if its weights are not finite."""
    runs.check_weights(policy.model)
    with files.replaced_folder(final) as folder:
        policy.model.save_pretrained(folder)
        policy.processor.save_pretrained(folder)
        if state:
            runs.write_state(folder, state)


def load_checkpoint(run: Path, trainer: Trainer) -> int:
    """Restore what is not in the weights (`load_policy` has loaded those); the next step."""
    # No random state is kept: sampling and data order follow from (seed, step).
    state = runs.read_state(run, trainer.optimizer, trainer.policy.device)
    if state["scaler"] and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.failures, trainer.best, trainer.kept = state["failures"], state["best"], state["kept"]
    return state["step"]


# ---- The run -------------------------------------------------------------------------------------


def make_trainer(cfg: Config, policy: Policy) -> Trainer:
    """Set up what trains, and attach the extras that the settings ask for. Raises UserError."""
    policy = replace(policy, autocast=parallel.autocast(policy.model, cfg.precision))
    if not cfg.plain:
        policy = extra("fast").speed_up(policy)
    if not cfg.train_vision:
        freeze_vision(policy.model)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    # One fused kernel: eight times as fast as a loop over parameters, on the CPU too.
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.01, fused=True)
    scaler = parallel.gradient_scaler(policy.model, cfg.precision)
    # Passed, though they are the defaults: so `dyme.any_correct = mine`, done before, takes effect.
    trainer = Trainer(cfg, policy, optimizer, scaler, judge=judge, switch=any_correct,
                      advantages=group_advantages)
    if dist.is_initialized():
        trainer.together = parallel.errors_shared
    if cfg.mode in ("grpo", "two-stage"):
        trainer.switch = always_explore
    asked = [EXTRAS[name] for name in EXTRAS if getattr(cfg, name) != getattr(Config, name)]
    for module in dict.fromkeys(asked):
        extra(module).attach(trainer)
    return trainer


def extra(name: str) -> Any:
    """A module of support/ that imports this file."""
    return importlib.import_module(f"support.{name}")


def always_explore(r_a: Tensor, r_t: Tensor) -> Tensor:
    """GRPO: every prompt explores, (P,) bool."""
    return torch.ones(len(r_a), dtype=torch.bool)


def freeze_vision(model: Model) -> None:
    """Stop gradients to the vision tower; its connector to the language model must learn."""
    for tower in vision_towers(model):
        tower.requires_grad_(False)
        for name, part in tower.named_children():  # Qwen keeps its connectors inside the tower
            part.requires_grad_(name in ("merger", "deepstack_merger_list", "connector"))


def vision_towers(model: Model) -> list[Model]:
    """The modules that encode images, as the families name them."""
    names = ("vision_model", "vision_tower", "vision_encoder", "visual", "high_res_vision_model")
    return [getattr(model.base_model, name) for name in names if hasattr(model.base_model, name)]


def load_reference(trainer: Trainer, run: Path, step: int) -> Model:
    """The KL's reference: the base; in two-stage, as released, the model after SFT."""
    cfg, after_sft = trainer.cfg, run / "after-sft"
    with parallel.errors_shared():  # the others wait until it is written
        if cfg.mode == "two-stage" and step == cfg.sft_steps and parallel.is_main():
            save_policy(trainer.policy, after_sft)
    source = str(after_sft) if cfg.mode == "two-stage" else cfg.model
    reference = load_policy(source, trainer.policy.device)
    total = parallel.sum_weights(reference.model)
    before = trainer.kept.setdefault("reference", [total])[0]  # in a resumed run, of its start
    if not math.isclose(total, before, rel_tol=1e-6):
        raise UserError(f"{source}: has other weights than when the run began to compare with it")
    reference = reference if cfg.plain else extra("fast").speed_up(reference)
    return reference.model.requires_grad_(False)


def schedule(cfg: Config, step: int) -> tuple[str, float]:
    """Mode and learning rate of a step: in each stage warm-up, then linear decay."""
    mode, first, last = cfg.mode, 0, cfg.steps
    if cfg.mode == "two-stage" and step < cfg.sft_steps:
        mode, last = "sft", cfg.sft_steps
    elif cfg.mode == "two-stage":
        mode, first = "grpo", cfg.sft_steps
    # A short stage must not be all warm-up.
    warmup = min(cfg.warmup, (last - first) // 2)
    rise = (step - first + 1) / (warmup + 1)
    fall = (last - step) / (last - first - warmup)
    return mode, cfg.lr * min(rise, fall, 1.0)


def step_rows(cfg: Config, step: int, count: int) -> list[int]:
    """Which of `count` rows a step takes, by (seed, step) alone; shuffled by epoch."""
    # An SFT step takes K times as many rows, to train on as many responses as the other steps.
    sft_before = {"sft": step, "two-stage": min(step, cfg.sft_steps)}.get(cfg.mode, 0)
    start = cfg.prompts * (step - sft_before) + cfg.prompts * cfg.generations * sft_before
    size = cfg.prompts * (cfg.generations if schedule(cfg, step)[0] == "sft" else 1)
    epochs = range(start // count, (start + size - 1) // count + 1)
    orders = {e: np.random.default_rng([SHUFFLING, cfg.seed, e]).permutation(count) for e in epochs}
    return [int(orders[i // count][i % count]) for i in range(start, start + size)]


def encode_ahead(policy: Policy, examples: list[Example], processor: Any, room: int,
                 prompt: str = PROMPT) -> Inputs:
    """`encode_prompts` in a thread, with its own processor; ready for the device."""
    on_cpu = replace(policy, device=torch.device("cpu"), processor=processor)
    # Not entered: on leaving, autocast empties its cache of cast weights, which CUDA graphs read.
    half = getattr(policy.autocast(), "fast_dtype", None)
    return parallel.for_device(encode_prompts(on_cpu, examples, room, prompt), policy.device, half)


def feed_prompts(trainer: Trainer, steps: range) -> Generator[Inputs]:
    """This process's encoded micro-batches; threads prepare the next step's meanwhile."""
    cfg = trainer.cfg
    def jobs() -> Iterator[list[Example]]:
        for step in steps:
            batch = [trainer.rows[i] for i in step_rows(cfg, step, len(trainer.rows))]
            own = share(len(batch))
            for first in range(own.start, own.stop, cfg.micro_batch):
                yield batch[first:min(first + cfg.micro_batch, own.stop)]

    def encode(part: list[Example], processor: Any) -> Inputs:
        return encode_ahead(trainer.policy, part, processor, cfg.max_new_tokens)

    ahead = max(4, math.ceil(len(share(cfg.prompts)) / cfg.micro_batch))  # a step's at least
    return parallel.in_threads(encode, trainer.policy.processor, jobs(), ahead)


def train(cfg: Config) -> None:
    """Carry out a run in its folder, locked against other runs."""
    source = model_source(cfg.model)
    if not cfg.resume and not Path(source).exists():  # fail before the data is downloaded
        with settings.loading(cfg.model, NAMES):
            transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    with runs.opened(cfg) as (examples, held_out):
        train_and_evaluate(cfg, examples, held_out)


def train_and_evaluate(cfg: Config, examples: list[Example], held_out: list[Example]) -> None:
    """Load, evaluate, train, evaluate, and say where everything is."""
    folder, device = Path(cfg.out), parallel.select_device(cfg.device)
    # Without a checkpoint yet, a resumed run starts from the beginning.
    resumed = cfg.resume and (folder / "checkpoint").exists()
    policy = load_policy(str(folder) if resumed else cfg.model, device, cfg.image_edge)
    parallel.check_same(policy.model)
    cfg.precision = parallel.settle_precision(policy.model, cfg.precision)
    cfg.micro_batch = cfg.micro_batch or parallel.pass_size(device, cfg, examples)
    with parallel.errors_shared():
        trainer = make_trainer(cfg, policy)
    trainer.rows = data.check_references(examples, policy, lambda example: len(
        target_ids(policy, example)) + encode_prompts(policy, [example], 0)["input_ids"].shape[1])
    step = load_checkpoint(folder, trainer) if resumed else 0
    with parallel.errors_shared():  # nobody goes on before the folder is ready
        runs.begin(cfg, step, examples, held_out)
    runs.print_start(cfg, device, len(trainer.rows), held_out, step)
    trainer.evaluated = {row["step"] for row in files.read_jsonl(folder / "evaluations.jsonl")}
    board = runs.open_board(cfg.tensorboard, folder, step)
    with trainer.closing:
        evaluate(trainer, held_out, folder, step, board)
        finished = train_loop(trainer, held_out, folder, step, board)
    if not finished:
        runs.print_stopped(folder)
        raise KeyboardInterrupt
    if trainer.failures > 1:
        raise DivergedError(f"the last {trainer.failures} steps had no finite loss or gradient")
    runs.print_summary(folder, cfg.mode, cfg.steps)


def train_loop(trainer: Trainer, held_out: list[Example], folder: Path, first: int,
               board: Any) -> bool:
    """Take the steps from `first` on, evaluate and save; False if interrupted."""
    cfg, step, saved, stop = trainer.cfg, first, first, False
    stream = feed_prompts(trainer, range(first, cfg.steps))
    bar = runs.progress_bar(cfg.mode, first, cfg.steps)
    trainer.taken = first
    with bar, runs.finish_step_on_interrupt() as interrupted:
        try:
            while step < cfg.steps and not stop:
                kept = {name: [*things] for name, things in trainer.kept.items()}
                try:
                    record = take_step(trainer, step, folder, stream)
                except torch.OutOfMemoryError:
                    if cfg.micro_batch == 1 or trainer.taken < 0:
                        raise
                    record = None
                if record is None:  # what the failed step had made is free by now
                    trainer.kept.update(kept)
                    stream.close()
                    stream = with_less_memory(trainer, step)
                    continue
                step += 1
                shown = runs.describe_groups(record, trainer.policy.tokenizer)
                runs.log_step(folder, record.metrics, shown, board)
                runs.advance(bar, f"{cfg.mode} {step}/{cfg.steps}", record.metrics)
                stop = any(parallel.gather(bool(interrupted)))
                # Evaluate before the save: a resumed run then repeats what is missing.
                if not stop or step == cfg.steps:
                    evaluate(trainer, held_out, folder, step, board)
                if cfg.save_every and step % cfg.save_every == 0:
                    save_checkpoint(folder, trainer, step)
                    saved = step
        finally:  # however it ends, no finished step is lost
            stream.close()
            if trainer.taken > saved:
                save_checkpoint(folder, trainer, trainer.taken)
    return step == cfg.steps


def take_step(trainer: Trainer, step: int, folder: Path, stream: Iterator[Inputs]) -> Step:
    """Step number `step` of the run, in the mode of its stage."""
    cfg = trainer.cfg
    mode, lr = schedule(cfg, step)
    if cfg.mode == "two-stage" and step == cfg.sft_steps:
        trainer.optimizer.state.clear()  # GRPO is a run of its own: no momentum comes from SFT
    if cfg.beta and mode == "grpo" and trainer.reference is None:
        trainer.reference = load_reference(trainer, folder, step)
    batch = [trainer.rows[i] for i in step_rows(cfg, step, len(trainer.rows))]
    inputs = itertools.islice(stream, math.ceil(len(share(len(batch))) / cfg.micro_batch))
    take = sft_step if mode == "sft" else train_step
    record = take(trainer, batch, step, lr, inputs)
    peak = parallel.peak_memory_gib(trainer.policy.device)
    about = {"step": step, "mode": mode, "lr": lr, "peak_memory_gib": peak}
    record.metrics = about | record.metrics
    return record


def with_less_memory(trainer: Trainer, step: int) -> Generator[Inputs]:
    """Inputs from `step` on, half as many prompts in a pass, which changes no gradient."""
    size = trainer.cfg.micro_batch = trainer.cfg.micro_batch // 2
    trainer.optimizer.zero_grad()
    parallel.free_memory()
    if parallel.is_main():
        print(f"out of memory: --micro-batch {size} from now on", file=sys.stderr)
    return feed_prompts(trainer, range(step, trainer.cfg.steps))


def main() -> int:
    """Read the settings, join other processes if there are any, and train; the exit code."""
    def program() -> None:
        cfg = parse_config()
        with parallel.processes(cfg.device):
            train(cfg)

    return runs.run_main(program)


if __name__ == "__main__":
    # The module, not this script: extras import `dyme`, and there must be one copy of it.
    import dyme
    sys.exit(dyme.main())
