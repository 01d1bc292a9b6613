"""DyME: teach a small vision-language model to think, by dynamic memorization and exploration.

A single-file reference of "Empowering Small VLMs to Think with Dynamic Memorization and Exploration" (Liu,
Deng, Chen; ICLR 2026; arXiv 2506.23061), in the order the data flows: settings, model, prompts, rollout,
switch, loss, step, run. The paper itself is `train_step` and what it calls; rewards and data: see reward.py.

    python dyme.py                                        # a tiny VLM on toy charts: minutes on a laptop CPU
    python dyme.py --mode grpo --seed 1                   # a baseline on the same path
    python dyme.py --model SmolVLM-256M --data chartqa    # the real thing, on a GPU
    python dyme.py --resume --out runs/NAME               # go on after Ctrl-C or a crash
"""

import argparse  # noqa: I001, which would give every name below a line
import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from reward import (DivergedError, Example, Helper, UserError, advance, append_row, bar_interval, begin_run,
                    build_parser, build_tiny_model, build_tiny_processor, check_config, check_model_name,
                    data_name, finish_step_on_interrupt, gather, half_precision, is_main, judge, load_rows,
                    open_board, open_helper, own_chunks, peak_memory_gib, prepare_run, processes, read_jsonl,
                    record, reference_response, report, resumed_settings, run_main, select_device, share,
                    shrink, sum_gradients, summarise, thinking_f1, tiny_words, toy_lessons, verify,
                    write_jsonl)

# ---- Settings: every field is a flag, the comment beside it its help -----------------------------


@dataclass
class Config:
    """All settings of a run; the values here are the toy preset, `REAL` holds what differs for other data."""

    # What to train
    model: str = "tiny"  # tiny, a short name (SmolVLM-256M, ...), a hub id or a local directory
    data: str = "toy"  # toy, chartqa (or its folder or zip), DOMAIN:FOLDER, or your own .json/.jsonl rows
    mode: str = "dyme"  # dyme, or a baseline on the same path: sft, grpo, two-stage
    out: str = ""  # run folder (default: runs/MODEL-DATA-MODE-sSEED)
    # Steps
    steps: int = 400  # optimisation steps
    epochs: float = 0.0  # passes over the data at --prompts a step; if above 0, it sets --steps
    prompts: int = 8  # prompts in an optimisation step (sft takes prompts x generations targets)
    generations: int = 8  # K, the responses sampled for a prompt
    micro_batch: int = 64  # prompts per forward pass: lower saves memory, the gradient is the same
    # Rollouts
    max_new_tokens: int = 48  # length limit of a sampled response
    temperature: float = 1.0  # sampling temperature
    # Switch, learning rate, loss
    switch: str = "any-correct"  # dyme: any-correct (Eq. 6), threshold:T, anneal, budget:N, explore, memorize
    sft_steps: int = 100  # two-stage: steps of SFT before GRPO
    lr: float = 0.0  # peak learning rate (0: the mode's own)
    warmup: int = 10  # steps of linear warm-up, before linear decay to zero
    thinking_weight: float = 1.0  # w_t, weight of the thinking reward r_t
    format_weight: float = 0.0  # w_f, weight of the format reward r_f (the paper has none)
    beta: float = 0.0  # weight of KL(p || p_ref) in grpo and two-stage (Eq. 3); loads the model twice
    released_code: bool = False  # do as the authors' release where it departs from the paper (see README)
    # Visual supervision
    helper_url: str = ""  # Full DyME: an OpenAI-compatible chat server, such as http://127.0.0.1:8000/v1
    helper_model: str = ""  # the model to ask for there
    helper_key_env: str = ""  # the environment variable that holds the key, if the server wants one
    helper_concurrency: int = 8  # requests at a time
    no_checker: bool = False  # keep the static r_t: the helper only refines
    no_refiner: bool = False  # keep the static traces: the helper only checks
    # Data and repeatability
    seed: int = 0  # data order and sampling; on the CPU it makes a run reproducible
    traces: str = "low"  # toy: quality of the thinking traces, high, medium or low (ungrounded values)
    hints: str = ""  # chartqa: a released DyME trace file, joined by question and answer
    augmented: bool = False  # chartqa: train on the machine-written questions too
    image_edge: int = 0  # longest image edge in pixels (0: the processor's own); less means fewer tiles
    vision_cache: float = 0.0  # GiB in which to keep the frozen tower's output for later epochs
    train_vision: bool = False  # train the vision tower too (frozen in the paper)
    # Run
    eval_every: int = 200  # steps between evaluations on held-out rows (0: only before and after)
    eval_rows: int = 512  # held-out rows in an evaluation
    save_every: int = 100  # steps between checkpoints (0: only at the end)
    tensorboard: bool = False  # also write metrics for TensorBoard, into the run folder
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # replace the run in --out
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    benchmark: int = 0  # only time this many steps, with coin-flip rewards and responses of full length


# The paper's main configuration has 32 prompts, K = 8, 10 epochs, 300 new tokens; warm-up is our addition.
REAL = {"epochs": 10.0, "prompts": 32, "micro_batch": 2, "max_new_tokens": 300, "warmup": 50,
        "sft_steps": 500, "eval_rows": 200}
LEARNING_RATES = {"toy": {"dyme": 5e-4, "grpo": 5e-4, "two-stage": 1e-4, "sft": 1e-4},
                  "real": {"dyme": 8e-5, "grpo": 1e-5, "two-stage": 1e-5, "sft": 1e-5}}
CHOICES = {"mode": ("dyme", "sft", "grpo", "two-stage"), "traces": ("high", "medium", "low")}
CHANGEABLE_ON_RESUME = {"out", "resume", "overwrite", "device", "micro_batch", "eval_every", "save_every",
                        "benchmark", "helper_url", "helper_key_env", "helper_concurrency", "tensorboard"}


def parse_config(argv: list[str] | None = None) -> Config:
    """Read the command line: preset by data, then flags, then (with --resume) the run's own settings."""
    notes = {name: f"{value:g} for real data" for name, value in REAL.items()}
    notes["lr"] = str(LEARNING_RATES).translate(str.maketrans("", "", "{}'"))
    given = vars(build_parser(Config, __doc__, CHOICES, notes).parse_args(argv))
    toy = given.get("data", Config.data) == "toy"
    preset = {} if toy else REAL | ({"epochs": 0.0} if "steps" in given else {})
    preset = preset | ({"format_weight": 1.0} if "released_code" in given else {})
    cfg = Config(**(preset | given))
    name = f"{Path(cfg.model).name}-{data_name(cfg.data)}-{cfg.mode}-s{cfg.seed}".replace(" ", "_")
    cfg.out, cfg.lr = cfg.out or f"runs/{name}", cfg.lr or LEARNING_RATES["toy" if toy else "real"][cfg.mode]
    if cfg.resume:
        cfg = Config(**resumed_settings(cfg, given, CHANGEABLE_ON_RESUME))
    check_config(cfg, {"tiny", *MODELS})
    return cfg


# ---- Model: a policy is a model, its processor, and the ids that end a response ------------------

MODELS = {
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
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B-Instruct",  # text only, as are the SmolLM2
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "SmolLM2-360M": "HuggingFaceTB/SmolLM2-360M-Instruct",
}


@dataclass
class Policy:
    """A model to train or evaluate, with what is needed to talk to it."""

    model: torch.nn.Module
    processor: Any
    end_ids: list[int]  # every id that ends a response: the model's, the tokenizer's, the template's
    pad_id: int
    device: torch.device
    image_edge: int = 0

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Half precision for forward passes on CUDA, over float32 weights; full precision elsewhere."""
        cuda = self.device.type == "cuda"
        return torch.autocast("cuda", dtype=half_precision()) if cuda else contextlib.nullcontext()


def load_policy(name: str, device: torch.device, image_edge: int = 0) -> Policy:
    """Load a short name, a hub id, a model directory or a run folder. Raises UserError if it cannot."""
    import transformers

    check_model_name(name, MODELS)
    run = Path(name) / "checkpoint"
    source = str(run) if run.is_dir() else MODELS.get(name, name)
    try:
        if not Path(source).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise ValueError("no such directory, nor the form of a hub id")
        processor = transformers.AutoProcessor.from_pretrained(source)  # of a text-only model: its tokenizer
        kind = transformers.AutoModelForImageTextToText
        if type(transformers.AutoConfig.from_pretrained(source)) not in kind._model_mapping:
            kind = transformers.AutoModelForCausalLM
        model, info = kind.from_pretrained(source, dtype=torch.float32, use_safetensors=True,
                                           output_loading_info=True)
    except Exception as error:  # noqa: BLE001 - loaders raise many kinds, and all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        package = next((p for p in ("torchvision", "num2words") if p in reason.lower()), None)
        advice = f"pip install {package}" if package else f"give a hub id, a directory or one of {[*MODELS]}"
        raise UserError(f"--model {name}: cannot be loaded ({reason}); {advice}") from None
    if info["missing_keys"]:
        raise UserError(f"--model {name}: has no weights for {min(info['missing_keys'])}")
    return make_policy(model.to(device), processor, device, image_edge)


def make_policy(model: torch.nn.Module, processor: Any, device: torch.device, image_edge: int = 0) -> Policy:
    """Find what ends a response and set the processor up. Raises UserError without a chat template."""
    name, tokenizer = model.name_or_path or "the model", getattr(processor, "tokenizer", processor)
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise UserError(f"{name} has no chat template; use the instruct version")
    tokenizer.padding_side = "left"  # a prompt must end where its response begins
    image_processor = getattr(processor, "image_processor", None)
    if image_edge and "longest_edge" in (getattr(image_processor, "size", None) or {}):
        image_processor.size["longest_edge"] = image_edge
    configured = np.atleast_1d(model.generation_config.eos_token_id).tolist()  # from an id, a list or None
    end_ids = sorted({tokenizer.eos_token_id, end_of_turn(processor), *configured} - {None})
    if not end_ids:
        raise UserError(f"{name}: neither tokenizer, generation config nor chat template names an end token")
    pad_id = end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # eval() for good, dropout off: responses are trained under the distribution they were sampled from.
    return Policy(model.eval(), processor, end_ids, pad_id, device, image_edge)


def vision_towers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that encode images, as the families name them."""
    names = ("vision_model", "vision_tower", "visual")
    return [getattr(model.model, name) for name in names if hasattr(model.model, name)]


def freeze_vision(model: torch.nn.Module) -> None:
    """Stop gradients to the vision tower; the connector from it to the language model stays trained."""
    for tower in vision_towers(model):
        tower.requires_grad_(False)
        if hasattr(tower, "merger"):  # Qwen keeps its connector inside the tower
            tower.merger.requires_grad_(True)


# ---- Prompts and targets: the model's own chat template renders both -----------------------------

PROMPT = 'Think step by step about the question below, then write "Answer: .." and your answer.\n\n{question}'


def render(processor: Any, prompt: str, has_image: bool, response: str | None = None) -> str:
    """Render a user's prompt, and perhaps the assistant's response, with the chat template."""
    content = [{"type": "image"}] * has_image + [{"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    if response is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
    if not hasattr(processor, "image_processor"):  # the templates of text-only models want plain text
        messages = [message | {"content": message["content"][-1]["text"]} for message in messages]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)


def end_of_turn(processor: Any) -> int | None:
    """The id with which the chat template ends the assistant's turn, None if it writes none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tail = render(processor, "question", False, "response").rpartition("response")[2]
    ids = tokenizer(tail.strip(), add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None


def target_ids(policy: Policy, prompt: str, has_image: bool, response: str) -> list[int]:
    """Ids of a target: what the chat template renders after the generation prompt, up to its end token."""
    before = render(policy.processor, prompt, has_image)
    full = render(policy.processor, prompt, has_image, response)
    if not full.startswith(before):
        raise UserError("the model's chat template does not continue the prompt that it renders")
    ids, prefix, rest = (policy.tokenizer(text, add_special_tokens=False).input_ids
                         for text in (full, before, full[len(before):]))
    ids = ids[len(prefix):] if ids[:len(prefix)] == prefix else rest
    ends = [i for i, token in enumerate(ids) if token in policy.end_ids]
    return ids[:ends[-1] + 1] if ends else ids + policy.end_ids[:1]  # untrained, it would never be sampled


def encode_prompts(policy: Policy, examples: list[Example], room: int,
                   prompt: str = PROMPT) -> dict[str, Tensor]:
    """Process a batch of prompts: ids and mask (P, L), padded left, and image tensors, on the device.

    Raises UserError naming a row whose image cannot be read, or that leaves no `room` for the response.
    """
    texts = [render(policy.processor, prompt.format(question=e.question), bool(e.image)) for e in examples]
    if any(e.image for e in examples) and not hasattr(policy.processor, "image_processor"):
        raise UserError(f"{examples[0].name}: has an image, which this model cannot see")
    images = [[shrink(e.image(), policy.image_edge)] if e.image else [] for e in examples]
    has_bos = texts[0].startswith(policy.tokenizer.bos_token or "\0")
    try:
        inputs = policy.processor(**({"images": images} if any(images) else {}), text=texts, padding=True,
                                  return_tensors="pt", add_special_tokens=not has_bos)
    except ValueError as error:  # such as a question that holds the image token itself
        names = " or ".join(e.name for e in examples)
        raise UserError(f"{names}: the processor refuses the prompt ({error})") from None
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", math.inf)
    for example, length in zip(examples, inputs["attention_mask"].sum(1).tolist(), strict=True):
        if length + room > limit:
            raise UserError(f"{example.name}: {length} tokens of prompt and {room} for the answer exceed the "
                            f"model's context of {limit}; lower --image-edge or --max-new-tokens")
    return {name: tensor.to(policy.device) for name, tensor in inputs.items()}


# ---- Rollout: a prompt is encoded once, images included; its K responses read the same cache -----


@dataclass
class Prefix:
    """Prompts that have been through the model: all that their continuations need."""

    cache: Any  # keys and values, batch P
    hidden: Tensor  # (P, D), the last hidden state: what predicts the first token of a response
    mask: Tensor  # (P, L) 1 for real tokens, 0 for the padding on the left
    position: Tensor  # (P, 1) of the next token; (3, P, 1) in Qwen-VL


def encode_prefix(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Prefix:
    """Run prompts and images through the model once; with gradients enabled, the cache carries them."""
    base, mask = model.base_model, inputs["attention_mask"]
    base.rope_deltas = None  # Qwen-VL sets it; else a batch without images would inherit the last one
    out = base(**inputs, use_cache=True)
    position = torch.full_like(mask[:, :1], mask.shape[1])  # padding counts: only distances matter
    if base.rope_deltas is not None:
        position = (mask.sum(1, keepdim=True) + base.rope_deltas).expand(3, -1, -1)
    return Prefix(out.past_key_values, out.last_hidden_state[:, -1], mask, position)


@contextlib.contextmanager
def vision_once(model: torch.nn.Module, store: dict[int, Tensor] | None = None,
                budget: float = 0.0) -> Iterator[None]:
    """Let a frozen vision tower encode a batch of images once, for sampling and for the update.

    Sampling keeps its output, before the connector, and the update takes it: the connector gets its gradient.
    A tower with a trainable part, such as Qwen's with its connector inside, runs every time. With a `budget`
    in bytes, `store` keeps it for later epochs too.
    """
    kept, batch = {}, [None]
    towers = [m for m in vision_towers(model) if not any(p.requires_grad for p in m.parameters())]

    def encode(tower: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        pixels = batch[0]  # kept alive along with its features, so that its id stays its own
        _, features = kept.pop(id(pixels), (None, None))
        if features is None and budget and not kwargs.get("output_hidden_states"):
            features = encode_new_tiles(tower, store, budget, args, kwargs)
        elif features is None:
            features = type(tower).forward(tower, *args, **kwargs)
        if not torch.is_grad_enabled():
            kept[id(pixels)] = pixels, copy.copy(features)  # models write into the output they are given
        return features

    def remember(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        batch[0] = inputs.get("pixel_values")

    hook = model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    for tower in towers:
        tower.forward = functools.partial(encode, tower)
    try:
        yield
    finally:
        hook.remove()
        for tower in towers:
            del tower.forward


def encode_new_tiles(tower: torch.nn.Module, store: dict[int, Tensor], budget: float, args: Any,
                     kwargs: dict[str, Any]) -> BaseModelOutput:
    """A tower's output for a batch of image tiles, run only on those not in `store`, which it fills."""
    tiles = args[0] if args else kwargs["pixel_values"]
    keys = [hash(tile.cpu().numpy().tobytes()) for tile in tiles]
    new = [i for i, key in enumerate(keys) if key not in store]
    known = {key: store[key] for key in keys if key in store}

    def pick(x: Any) -> Any:
        return x[new] if isinstance(x, Tensor) and len(x) == len(tiles) else x

    if new:
        out = type(tower).forward(tower, *map(pick, args), **{name: pick(x) for name, x in kwargs.items()})
        known |= dict(zip([keys[i] for i in new], out.last_hidden_state, strict=True))
    for key in [keys[i] for i in new]:
        if (len(store) + 1) * known[key].nbytes <= budget:
            store[key] = known[key].clone()
    return BaseModelOutput(last_hidden_state=torch.stack([known[key] for key in keys]))


def branch(prefix: Prefix, rows: Tensor) -> Prefix:
    """Take prompts `rows: (N,)`, each as often as it occurs; uses up the prefix's cache."""
    for layer in prefix.cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
    return Prefix(prefix.cache, prefix.hidden[rows], prefix.mask[rows], prefix.position[..., rows, :])


def extend(model: torch.nn.Module, prefix: Prefix, ids: Tensor, offsets: Tensor, visible: Tensor) -> Tensor:
    """Run tokens `ids: (P, Q)` of several responses to a prompt as one row; hidden states (P, Q, D).

    They stand at `offsets: (P, Q)` from the prompt's end, and see it and what `visible: (P, Q, Q')` marks of
    the Q' tokens now behind it: their own response so far. So K responses share one copy of the prompt's
    keys and values, when sampling and in the update; it need not be repeated K times.
    """
    prompt = prefix.mask.bool()[:, None, None].expand(-1, 1, ids.shape[1], -1)
    return model.base_model(
        input_ids=ids, attention_mask=torch.cat([prompt, visible[:, None]], dim=3), use_cache=True,
        position_ids=prefix.position + offsets, past_key_values=prefix.cache).last_hidden_state


def next_logits(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Float32 logits (N, V) of the token behind `hidden: (N, D)`."""
    return model.get_output_embeddings()(hidden).float()


@dataclass
class Rollout:
    """Sampled responses as raw ids: they are trained as they are, never decoded and tokenized again."""

    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) 1 up to and including the end token
    finished: Tensor  # (N,) bool: an end token came before the length limit
    entropy: Tensor  # (N, T) of the distributions sampled from, in nats


def keyed_uniforms(seed: int, step: int, prompts: Iterable[int], generations: int, tokens: int) -> Tensor:
    """Random numbers in [0, 1), (P*K, T), that depend on (seed, step, prompt, k) and not on batch shape."""
    keys = [[seed, step, prompt, k] for prompt in prompts for k in range(generations)]
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(tokens, np.float32) for key in keys]))


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample tokens (N,) by inverting the distribution of `logits: (N, V)` at `uniform: (N,)`.

    Also returns its entropy, (N,). Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    logp = F.log_softmax(logits / temperature, dim=-1)
    p = logp.exp()
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1), -(p * logp.clamp(min=-100)).sum(-1)


class Slots(DynamicLayer):
    """A layer's keys and values while decoding: the prompts', then room for the tokens of all branches.

    They are written in place: a cache that grows is copied for every token, and a CUDA graph is bound to
    its addresses.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int, slots: Tensor) -> None:
        super().__init__()
        half = torch.is_autocast_enabled(keys.device.type) and torch.get_autocast_dtype(keys.device.type)
        self.keys, self.values = (F.pad(x.to(half or x.dtype), (0, 0, 0, room)) for x in (keys, values))
        self.slots = slots  # (K,) shared by all layers: where the K tokens of this step go

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write `keys, values: (P, H, K, D)` of the new tokens; all keys and values so far."""
        self.keys.index_copy_(2, self.slots, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.slots, values.to(self.values.dtype))
        return self.keys, self.values


def merge(prefixes: list[Prefix], room: int, slots: Tensor) -> Prefix:
    """Put prompts that were encoded in chunks side by side, padded left, with `room` for new tokens."""
    longest = max(p.mask.shape[1] for p in prefixes)

    def stack(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([F.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in tensors])

    layers = [Slots(stack(x.keys for x in same), stack(x.values for x in same), room, slots)
              for same in zip(*(p.cache.layers for p in prefixes), strict=True)]
    return Prefix(Cache(layers=layers), torch.cat([p.hidden for p in prefixes]),
                  stack(p.mask[..., None] for p in prefixes).squeeze(-1),
                  torch.cat([p.position for p in prefixes], dim=-2))


@torch.no_grad()
def sample(model: torch.nn.Module, prefixes: list[Prefix], uniforms: Tensor, end_ids: list[int], pad_id: int,
           temperature: float) -> Rollout:
    """Sample K = N / P responses for each of P prompts, with `uniforms: (N, T)`, all of them at once.

    A step reads and writes only tensors that stay where they are, so that it can be a CUDA graph.
    """
    (rows, limit), device, prompts = uniforms.shape, uniforms.device, sum(len(p.mask) for p in prefixes)
    K = rows // prompts
    t, own = torch.zeros(1, dtype=torch.long, device=device), torch.eye(K, dtype=torch.bool, device=device)
    ends, places = torch.tensor(end_ids, device=device), torch.arange(K, device=device)
    slots = places + max(p.mask.shape[1] for p in prefixes)
    prefix = merge(prefixes, K * (limit - 1), slots)
    visible = torch.zeros(prompts, K, K * (limit - 1), dtype=torch.bool, device=device)
    ids, mask = torch.full((rows, limit), pad_id, device=device), torch.zeros_like(uniforms, dtype=torch.long)
    entropies, alive = torch.zeros_like(uniforms), torch.ones(rows, dtype=torch.bool, device=device)
    logits = next_logits(model, prefix.hidden).repeat_interleave(K, 0)

    def choose() -> None:
        token, entropy = draw(logits, uniforms.index_select(1, t).squeeze(1), temperature)
        token = token.masked_fill(~alive, pad_id)
        for kept, new in ((ids, token), (mask, alive.long()), (entropies, entropy)):
            kept.index_copy_(1, t, new[:, None])
        alive.logical_and_((token[:, None] != ends).all(1))

    def step() -> None:
        visible.index_copy_(2, places, own.expand(prompts, -1, -1))
        hidden = extend(model, prefix, ids.index_select(1, t).view(prompts, K), t.expand(prompts, K), visible)
        logits.copy_(next_logits(model, hidden.flatten(0, 1)))
        for counter, by in ((t, 1), (places, K), (slots, K)):
            counter.add_(by)
        choose()

    choose()
    for i in range(1, limit):
        if (i % 16 == 1 or device.type == "cpu") and not alive.any():  # the CPU waits here for the GPU
            break
        if i == 3 and device.type == "cuda" and not hasattr(model, "uncapturable"):  # two steps to warm up,
            step = capture(model, step)  # and to cast the weights
        step()
    length = int(mask.sum(1).max())
    return Rollout(ids[:, :length], mask[:, :length], ~alive, entropies[:, :length])


def capture(model: torch.nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    """Record a step as a CUDA graph: to replay it is one call, where Python would launch every kernel."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on meanwhile
            step()
    except RuntimeError as error:  # which leaves the capture's stream in use
        torch.cuda.set_stream(torch.cuda.default_stream())
        model.uncapturable = True
        tqdm.write(f"decoding without a CUDA graph, slowly: {str(error).splitlines()[0]}", file=sys.stderr)
        return step
    return graph.replay


def rollout(policy: Policy, inputs: Iterable[dict[str, Tensor]], uniforms: Tensor,
            temperature: float) -> Rollout:
    """Sample K = N / P responses for each of the P prompts of all chunks, with `uniforms: (N, T)`."""
    with torch.no_grad(), policy.autocast():
        return sample(policy.model, [encode_prefix(policy.model, x) for x in inputs],
                      uniforms.to(policy.device), policy.end_ids, policy.pad_id, temperature)


def decode(policy: Policy, rolled: Rollout) -> tuple[list[list[int]], list[str], list[bool]]:
    """A rollout as lists over responses: their ids, their texts without the end token, whether they ended."""
    ids = [row[:n] for row, n in zip(rolled.ids.tolist(), rolled.mask.sum(1).tolist(), strict=True)]
    texts = [policy.tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids]
    return ids, texts, rolled.finished.tolist()


# ---- Score, advantages, switch: the heart of the paper -------------------------------------------


@dataclass
class Groups:
    """P groups of K sampled and scored responses."""

    ids: list[list[int]]  # P*K responses, end token included
    texts: list[str]  # P*K
    finished: list[bool]  # P*K
    correct: Tensor  # (P, K) r_a in {0, 1}
    thinking: Tensor  # (P, K) r_t in [0, 1]
    in_format: Tensor  # (P, K) r_f in {0, 1}
    rewards: Tensor  # (P, K) r = r_a + w_t r_t + w_f r_f
    entropy: Tensor  # (P, K) sum over the tokens of a response, in nats

    @classmethod
    def join(cls, parts: list["Groups"]) -> "Groups":
        """The groups of several processes as one."""
        columns = ([getattr(part, f.name) for part in parts] for f in dataclasses.fields(cls))
        return cls(*(torch.cat(c) if isinstance(c[0], Tensor) else [*itertools.chain(*c)] for c in columns))


def score(policy: Policy, rolled: Rollout, examples: list[Example], thinking_weight: float,
          format_weight: float) -> Groups:
    """Verify all responses and compare their thinking with the reference trace (r_t is 0 without one)."""
    ids, texts, finished = decode(policy, rolled)
    generations = len(texts) // len(examples)
    owners = [e for e in examples for _ in range(generations)]
    verdicts = [verify(text, e, f) for text, e, f in zip(texts, owners, finished, strict=True)]
    parts = torch.tensor([[v.correct, thinking_f1(text, e.hint) if e.hint else 0.0, v.in_format]
                          for text, e, v in zip(texts, owners, verdicts, strict=True)], dtype=torch.float32)
    correct, thinking, in_format = parts.view(-1, generations, 3).unbind(2)
    rewards = correct + thinking_weight * thinking + format_weight * in_format
    entropy = (rolled.entropy * rolled.mask).sum(1).view_as(correct).cpu()
    return Groups(ids, texts, finished, correct, thinking, in_format, rewards, entropy)


def group_advantages(rewards: Tensor, eps: float = 1e-4, sample_std: bool = False) -> Tensor:
    """Eq. 2: standardise `rewards: (P, K)` within groups by the population std (`sample_std`: the release's).

    A group without variance gets exactly 0: its advantages have collapsed, it has nothing to teach.
    """
    std = rewards.std(1, keepdim=True, correction=int(sample_std))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (std + eps)
    return advantages.masked_fill(no_variance(rewards)[:, None], 0.0)


def no_variance(rewards: Tensor) -> Tensor:
    """Collapse detection: which groups of `rewards: (P, K)` are all alike, (P,) bool."""
    return rewards.amax(1) == rewards.amin(1)


def choose_mode(correct: Tensor) -> Tensor:
    """Eq. 6, the switch: does a prompt explore, as one of its responses is right? (P, K) r_a to (P,) bool."""
    return correct.amax(1) == 1


def switch_modes(rule: str, correct: Tensor, rewards: Tensor, progress: float) -> tuple[Tensor, Tensor]:
    """By a rule of Table 1b: which prompts explore, (P,) bool, and the weights of their targets, (P,).

    `correct` and `rewards` are r_a and r, (P, K); `progress` is the share of the run that is done.
    """
    name, _, value = rule.partition(":")
    everyone, explore = torch.ones(len(correct), dtype=torch.bool), choose_mode(correct)  # any-correct: Eq. 6
    if name == "threshold":  # the whole batch explores once its average reward passes the threshold
        explore = everyone & (rewards.mean() >= float(value))
    elif name in ("anneal", "explore"):
        explore = everyone
    elif name == "memorize":
        explore = ~everyone
    weights = (~explore).float()
    if name == "anneal":  # beside exploration, at every step, by a cosine from 1 to 0
        weights = everyone * (1 + math.cos(math.pi * progress)) / 2
    elif name == "budget":  # failures wait in a buffer, see `train_step`
        weights = torch.zeros_like(weights)
    return explore, weights


@dataclass
class Sequence:
    """A response to train on: a sampled one with its advantage, or a target, with advantage 1 (Eq. 4-5)."""

    prompt: int  # its place in the step
    ids: list[int]
    weight: float  # its factor in the loss: A / (K P) for a sampled response, 1 / P for a target
    explore: bool


def exploration_sequences(ids: list[list[int]], advantages: Tensor, explore: Tensor,
                          keep_zeros: bool = False) -> list[Sequence]:
    """Sampled responses of the prompts that explore; `advantages: (P, K)`, `explore: (P,)`.

    Advantage 0 teaches nothing: leaving it out saves its forward pass (a KL term needs it: `keep_zeros`).
    """
    prompts, generations = advantages.shape
    return [Sequence(i // generations, ids[i], a / (generations * prompts), True)
            for i, a in enumerate(advantages.flatten().tolist())
            if explore[i // generations] and (a != 0 or keep_zeros)]


def memorization_sequences(policy: Policy, examples: list[Example], weights: list[float]) -> list[Sequence]:
    """Ground-truth responses of the prompts whose target has a weight."""
    return [Sequence(p, target_ids(policy, PROMPT.format(question=e.question), bool(e.image),
                                   reference_response(e)), weight, False)
            for p, (e, weight) in enumerate(zip(examples, weights, strict=True)) if weight]


# ---- Loss: exploration and memorization in one sum -----------------------------------------------


def pack(rows: list[int], lengths: list[int], limit: int) -> tuple[list[int], list[int], list[int]]:
    """Lay sequences of `lengths` to the prompts `rows` end to end, in rows of up to `limit` tokens.

    Returns the prompt of every packed row, and the packed row and the start of every sequence. Sequences
    are not padded to the longest, and share a copy of the prompt. But attention grows with the square of a
    row: up to the prompt's own length it stays the smaller part.
    """
    owners, places, starts, used = [], [], [], 0
    for row, length in zip(rows, lengths, strict=True):
        if not owners or owners[-1] != row or used + length > limit:
            owners, used = [*owners, row], 0
        places.append(len(owners) - 1)
        starts.append(used)
        used += length
    return owners, places, starts


def completion_logprobs(model: torch.nn.Module, prefix: Prefix, rows: list[int], sequences: list[list[int]],
                        temperature: Tensor, limit: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs and mask (N, T) of sequences that continue the prompts `rows`, at `temperature: (N,)`."""
    device, lengths = prefix.mask.device, torch.tensor([len(ids) for ids in sequences])
    owners, places, starts = pack(rows, (lengths - 1).tolist(), limit or prefix.mask.shape[1])
    prefix = branch(prefix, torch.tensor(owners, device=device))
    packed: list[list[tuple[int, int, int]]] = [[] for _ in owners]  # (token, offset, its sequence)
    for i, (place, ids) in enumerate(zip(places, sequences, strict=True)):
        packed[place] += [(token, t, i) for t, token in enumerate(ids[:-1])]  # nothing follows the last token
    states = prefix.hidden[:, None]
    if any(packed):
        ids, offsets, owner = pad_right(packed, -1, device).unbind(2)
        visible = (owner[:, :, None] == owner[:, None]).tril()
        states = torch.cat([states, extend(model, prefix, ids.clamp(min=0), offsets, visible)], dim=1)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    column = torch.arange(mask.shape[1]) + torch.tensor(starts)[:, None]  # token t is predicted behind t - 1,
    column[:, 0] = 0  # and the first one behind the prompt
    column, place, temperature = (x.to(device).expand(mask.shape)[mask] for x in (
        column, torch.tensor(places)[:, None], temperature[:, None]))
    tokens = torch.tensor([token for ids in sequences for token in ids], device=device)
    logprobs = token_logprobs(model, states[place, column], tokens, temperature)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs), mask.long()


def token_logprobs(model: torch.nn.Module, hidden: Tensor, ids: Tensor, temperature: Tensor,
                   chunk: int = 1024) -> Tensor:
    """Log-probs of tokens `ids: (M,)` behind `hidden: (M, D)`, at `temperature: (M,)`.

    Logits are made `chunk` tokens at a time, and again in the backward pass: float32 (M, V) of a whole batch
    never exists. What fits into one chunk is not made twice.
    """
    def part(hidden: Tensor, ids: Tensor, temperature: Tensor) -> Tensor:
        return -F.cross_entropy(next_logits(model, hidden).div_(temperature[:, None]), ids, reduction="none")

    if len(ids) <= chunk:
        return part(hidden, ids, temperature)
    parts = zip(hidden.split(chunk), ids.split(chunk), temperature.split(chunk), strict=True)
    return torch.cat([checkpoint(part, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def policy_loss(logprobs: Tensor, mask: Tensor, weights: Tensor, explore: Tensor) -> Tensor:
    """Eq. 7 and 8 as one sum over sequences: `logprobs, mask: (N, T)`, `weights: (N,)`, `explore: (N,)` bool.

    A sampled response contributes -rho A (Eq. 7). With one update per rollout rho is 1, so a clip would not
    bind, and its gradient is that of A log p. A target contributes -log p (Eq. 1), the same with A = 1
    (Eq. 4-5). Tokens are averaged per sequence; the means over K and over prompts are in the weights.
    """
    rho = torch.exp(logprobs - logprobs.detach())
    return -(weights * token_mean(torch.where(explore[:, None], rho, logprobs), mask)).sum()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values: (N, T)` over each row's real tokens, (N,)."""
    return (values * mask).sum(1) / mask.sum(1)


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(p || p_ref) of Eq. 3 per token, from log-probs of sampled tokens (Schulman's k3: r - 1 - log r)."""
    return torch.exp(reference - logprobs) - (reference - logprobs) - 1


def pad_right(rows: list[list[Any]], value: int, device: torch.device) -> Tensor:
    """Stack lists as (N, T), or lists of k-tuples as (N, T, k)."""
    width = next(len(row[0]) for row in rows if row)
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, device=device).view(-1, width) for row in rows],
                                           batch_first=True, padding_value=value)


# ---- One training step: sample, score, choose the mode, take the loss ----------------------------


@dataclass
class Trainer:
    """What a step changes (policy, optimiser, scaler) and what it needs."""

    cfg: Config
    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reference: torch.nn.Module | None = None  # frozen copy of the policy for the KL term
    score: Callable[..., Groups] = score
    helper: Helper | None = None
    buffer: list[Example] = field(default_factory=list)  # failures, for --switch budget
    features: dict[int, Tensor] = field(default_factory=dict)  # of images, for --vision-cache
    board: Any = None  # a TensorBoard writer
    failures: int = 0  # steps in a row whose gradient was not finite


def train_step(trainer: Trainer, examples: list[Example], step: int, method: str, lr: float,
               inputs: Iterable[dict[str, Tensor]] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a step by `method` (dyme, grpo or sft) on P prompts; its metrics, and one of its groups in full.

    `inputs` are this process's chunks of encoded prompts (see `own_chunks`), if they are at hand.
    """
    cfg, policy, prompts, K = trainer.cfg, trainer.policy, len(examples), trainer.cfg.generations
    own, chunks, clock = share(prompts), own_chunks(prompts, cfg.micro_batch), [time.perf_counter()] * 4
    if inputs is None:
        inputs = (encode_prompts(policy, examples[c.start:c.stop], cfg.max_new_tokens) for c in chunks)
    inputs = ({key: x.to(policy.device, non_blocking=True) for key, x in chunk.items()} for chunk in inputs)
    explore, targets = torch.zeros(prompts, dtype=torch.bool), torch.ones(prompts)
    groups, advantages, sequences = None, None, []
    if method != "sft":  # which takes its many prompts as they come, to save memory
        stream, inputs = inputs, []
        gather(lambda: inputs.extend(stream))
        clock[1] = time.perf_counter()
        uniforms = keyed_uniforms(cfg.seed, step, own, K, cfg.max_new_tokens)
        rolled = rollout(policy, inputs, uniforms, cfg.temperature)
        clock[2] = time.perf_counter()
        groups = Groups.join(gather(lambda: trainer.score(
            policy, rolled, examples[own.start:own.stop], cfg.thinking_weight, cfg.format_weight)))
        groups = rate_thinking(trainer, groups, examples)
        advantages = group_advantages(groups.rewards, sample_std=cfg.released_code)  # Eq. 2
        if cfg.released_code:
            advantages[groups.correct.amin(1) == 1] = 0.0
        rule = cfg.switch if method == "dyme" else "explore"
        explore, targets = switch_modes(rule, groups.correct, groups.rewards, step / cfg.steps)  # Eq. 6
        examples = rewrite_traces(trainer, examples, ~explore | (targets > 0))
        sequences = exploration_sequences(groups.ids, advantages, explore, keep_zeros=cfg.beta > 0)
        clock[3] = time.perf_counter()
    targets /= prompts * (K if cfg.released_code and method == "dyme" else 1)
    sequences += memorization_sequences(policy, examples, targets.tolist())
    metrics = {"step": step, "method": method, "lr": lr, "empty_steps": int(not sequences)}
    if sequences:
        totals = gather(lambda: accumulate_gradients(trainer, inputs, chunks, sequences, prompts))  # Eq. 7, 8
        metrics |= {key: sum(total[key] for total in totals) for key in totals[0]}
        metrics |= apply_gradients(trainer, metrics["loss"], lr)
    metrics |= step_metrics(groups, int(explore.sum()), sequences)
    if trainer.helper and method != "sft":
        counts = gather(trainer.helper.take_counts)
        metrics |= {key: sum(part[key] for part in counts) for key in counts[0]}
    if cfg.switch.startswith("budget") and method == "dyme":
        failed = [e for e, found in zip(examples, explore, strict=True) if not found]
        metrics |= memorize_buffer(trainer, failed, step, lr)
    clock.append(time.perf_counter())
    names = ("seconds_feed", "seconds_sampling", "seconds_scoring", "seconds_update")
    metrics |= {name: b - a for name, (a, b) in zip(names, itertools.pairwise(clock), strict=True)}
    metrics |= {"tokens_per_s": metrics["tokens"] / (clock[4] - clock[0]),
                "peak_memory_gib": peak_memory_gib(policy.device)}
    return metrics, {"step": step} | watched_group(policy, examples, groups, advantages, explore, sequences)


def rate_thinking(trainer: Trainer, groups: Groups, examples: list[Example]) -> Groups:
    """Full DyME's checker: the helper's ratings in place of r_t, where it gives one, of what may explore."""
    cfg, helper, K, own = trainer.cfg, trainer.helper, trainer.cfg.generations, share(len(examples))
    if not helper or cfg.no_checker or cfg.switch == "memorize":
        return groups
    rated = choose_mode(groups.correct) | cfg.switch.startswith(("threshold", "anneal", "explore"))
    pairs = [(examples[p], groups.texts[p * K + k]) for p in own if rated[p] for k in range(K)]
    replies = itertools.chain(*gather(lambda: helper.map(helper.rate, pairs)))
    thinking = groups.thinking.clone()
    for p, k in itertools.product(rated.nonzero().flatten().tolist(), range(K)):
        rating = next(replies)  # in this order, as every process rated its own share of the prompts
        thinking[p, k] = thinking[p, k] if rating is None else rating
        helper.remember(groups.texts[p * K + k], rating)
    rewards = groups.rewards + cfg.thinking_weight * (thinking - groups.thinking)
    return dataclasses.replace(groups, thinking=thinking, rewards=rewards)


def rewrite_traces(trainer: Trainer, examples: list[Example], memorize: Tensor) -> list[Example]:
    """Full DyME's refiner: traces to be memorized, `memorize: (P,)`, as the helper rewrites them."""
    if not trainer.helper or trainer.cfg.no_refiner:
        return examples
    chosen = [(examples[p],) for p in share(len(examples)) if memorize[p]]
    traces = itertools.chain(*gather(lambda: trainer.helper.map(trainer.helper.refine, chosen)))
    return [dataclasses.replace(e, hint=next(traces)) if memorized else e
            for e, memorized in zip(examples, memorize.tolist(), strict=True)]


def memorize_buffer(trainer: Trainer, failed: list[Example], step: int, lr: float) -> dict[str, Any]:
    """`--switch budget:N`: keep prompts that failed; an SFT step on N of them once there are as many."""
    size = int(trainer.cfg.switch.partition(":")[2])
    trainer.buffer += failed
    if len(trainer.buffer) < size:
        return {}
    batch, trainer.buffer = trainer.buffer[:size], trainer.buffer[size:]
    metrics, _ = train_step(trainer, batch, step, "sft", lr)
    explored = trainer.cfg.prompts - len(failed)
    return {"memorized": size / (size + explored), "target_length": metrics["target_length"]}


def accumulate_gradients(trainer: Trainer, inputs: Iterable[dict[str, Tensor]], chunks: list[range],
                         sequences: list[Sequence], prompts: int) -> dict[str, float]:
    """Backward through every chunk with something to train on; this process's part of loss and KL.

    The weights hold the step's own denominators, so any chunking gives the same gradient.
    """
    cfg, policy, total = trainer.cfg, trainer.policy, {"loss": 0.0, "kl": 0.0}
    for x, chunk in zip(inputs, chunks, strict=True):
        chosen = [s for s in sequences if s.prompt in chunk]
        if not chosen:
            continue
        rows = [s.prompt - chunk.start for s in chosen]
        logprobs, mask, explore = sequence_logprobs(policy, policy.model, x, rows, chosen, cfg.temperature)
        weights = torch.tensor([s.weight for s in chosen], device=policy.device)
        loss = policy_loss(logprobs, mask, weights, explore)
        if trainer.reference is not None and chosen[0].explore:
            with torch.no_grad():
                frozen, *_ = sequence_logprobs(policy, trainer.reference, x, rows, chosen, cfg.temperature)
            kl = token_mean(kl_estimate(logprobs, frozen), mask).sum() / (cfg.generations * prompts)
            loss, total["kl"] = loss + cfg.beta * kl, total["kl"] + kl.item()
        trainer.scaler.scale(loss).backward()
        total["loss"] += loss.item()
    return total


def sequence_logprobs(policy: Policy, model: torch.nn.Module, inputs: dict[str, Tensor], rows: list[int],
                      sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and mask (N, T) of sequences on a chunk's prompts `rows`, and which explore, (N,).

    Sampled responses are taken at the sampling temperature, targets at 1.
    """
    explore = torch.tensor([s.explore for s in sequences], device=policy.device)
    with policy.autocast():
        logprobs, mask = completion_logprobs(
            model, encode_prefix(model, inputs), rows, [s.ids for s in sequences],
            torch.where(explore, temperature, 1.0))
    return logprobs, mask, explore


def apply_gradients(trainer: Trainer, loss: float, lr: float) -> dict[str, Any]:
    """Clip the gradient to norm 1 and step; if loss or gradient is not finite, change nothing.

    Raises DivergedError after ten such steps in a row, not counting a float16 scaler's search for its scale.
    """
    optimizer, scaler = trainer.optimizer, trainer.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr
    sum_gradients(trainer.policy.model.parameters())
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainer.policy.model.parameters(), 1.0).item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite or (scaler.is_enabled() and not math.isfinite(norm)):  # such a step the scaler skips by itself
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    searching = scaler.is_enabled() and scaler.get_scale() >= 1
    trainer.failures = 0 if finite else trainer.failures + (not searching)
    if trainer.failures == 10:
        raise DivergedError("ten steps in a row had a loss or gradient that was not finite; try a lower --lr")
    return {"grad_norm": norm, "skipped_steps": int(not finite)}


def step_metrics(groups: Groups | None, explored: int, sequences: list[Sequence]) -> dict[str, Any]:
    """Summarise a step: sampled responses only, never mixed with the targets that stood in for them."""
    targets = [len(s.ids) for s in sequences if not s.explore]
    metrics = {"memorized": len(targets) / max(1, len(targets) + explored), "tokens": sum(targets),
               "target_length": sum(targets) / len(targets) if targets else None}
    if groups:
        tokens = sum(map(len, groups.ids))
        metrics |= {
            "reward": groups.rewards.mean().item(), "reward_thinking": groups.thinking.mean().item(),
            "reward_format": groups.in_format.mean().item(), "accuracy": groups.correct.mean().item(),
            "none_correct": 1 - choose_mode(groups.correct).float().mean().item(),
            "no_variance": no_variance(groups.rewards).float().mean().item(),
            "entropy": groups.entropy.sum().item() / tokens,
            "truncated": 1 - sum(groups.finished) / len(groups.ids),
            "response_length": tokens / len(groups.ids), "tokens": tokens}
    return metrics


def watched_group(policy: Policy, examples: list[Example], groups: Groups | None, advantages: Tensor | None,
                  explore: Tensor, sequences: list[Sequence]) -> dict[str, Any]:
    """A prompt of a step in full, for `samples.jsonl`: of least hash, so that many return in each epoch."""
    p = min(range(len(examples)), key=lambda i: zlib.crc32(examples[i].name.encode()))
    example, target = examples[p], next((s.ids for s in sequences if s.prompt == p and not s.explore), None)
    parts = {} if groups is None else {"r_a": groups.correct, "r_t": groups.thinking, "r_f": groups.in_format,
                                       "reward": groups.rewards, "advantage": advantages}
    rows = range(p * groups.correct.shape[1], (p + 1) * groups.correct.shape[1]) if groups else []
    modes = {(True, False): "exploration", (False, True): "memorization", (True, True): "both"}
    return {"name": example.name, "question": example.question, "answer": example.answer,
            "facts": example.facts, "mode": modes.get((bool(explore[p]), bool(target)), "buffered"),
            "target": target and policy.tokenizer.decode(target, skip_special_tokens=True).strip(),
            "responses": [{"text": groups.texts[row], "finished": groups.finished[row]}
                          | {name: round(part[p, k].item(), 4) for name, part in parts.items()}
                          for k, row in enumerate(rows)]}


# ---- Evaluation: answers to held-out rows --------------------------------------------------------


def respond(policy: Policy, examples: list[Example], max_new_tokens: int, batch: int, samples: int = 0,
            temperature: float = 1.0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Answer rows greedily, or with `samples` draws each, and yield a judged prediction per response."""
    for start in tqdm(range(0, len(examples), batch), "answering", ncols=80, leave=False,
                      disable=None if len(examples) > batch and is_main() else True):
        part = examples[start:start + batch]
        inputs = encode_prompts(policy, part, max_new_tokens)
        uniforms = keyed_uniforms(seed, 0, range(start, start + len(part)), samples or 1, max_new_tokens)
        rolled = rollout(policy, [inputs], uniforms, temperature if samples else 0.0)
        for i, (ids, text, finished) in enumerate(zip(*decode(policy, rolled), strict=True)):
            yield judge(part[i // (samples or 1)], text, finished) | {"length": len(ids)}


# ---- A run is a folder ---------------------------------------------------------------------------


def save_checkpoint(run: Path, trainer: Trainer, step: int) -> None:
    """Write `checkpoint/`, a transformers directory with the training state in it; the old one goes last."""
    if not is_main():
        return
    new, old, final = (run / f"checkpoint{ending}" for ending in (".tmp", ".old", ""))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    trainer.policy.model.save_pretrained(new)
    trainer.policy.processor.save_pretrained(new)
    kept = {"buffer": [(e.name, e.hint) for e in trainer.buffer],
            "examples": [*trainer.helper.examples] if trainer.helper else []}
    torch.save({"step": step, "failures": trainer.failures, "kept": kept,
                "optimizer": trainer.optimizer.state_dict(), "scaler": trainer.scaler.state_dict()},
               new / "training_state.pt")
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: Path, trainer: Trainer, rows: list[Example]) -> int:
    """Restore optimiser, scaler, buffer and example pool, and return the step to go on with.

    No random state is kept: sampling and data order are functions of (seed, step).
    """
    state = torch.load(run / "checkpoint" / "training_state.pt", trainer.policy.device, weights_only=True)
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and trainer.scaler.is_enabled():  # a run may go on with another precision
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.failures, by_name = state["failures"], {e.name: e for e in rows}
    trainer.buffer = [dataclasses.replace(by_name[n], hint=hint) for n, hint in state["kept"]["buffer"]]
    if trainer.helper:
        trainer.helper.examples.extend(state["kept"]["examples"])
    return state["step"]


# ---- The run -------------------------------------------------------------------------------------


def make_trainer(cfg: Config, policy: Policy, base: str) -> Trainer:
    """Set up optimiser and scaler for the parameters that train, and the reference model if KL needs one."""
    reference = load_policy(base, policy.device).model.requires_grad_(False) if cfg.beta else None
    if not cfg.train_vision:
        freeze_vision(policy.model)
    cuda = policy.device.type == "cuda"
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=cfg.lr,
                                  weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(policy.device.type, enabled=cuda and half_precision() == torch.float16)
    return Trainer(cfg, policy, optimizer, scaler, reference, helper=open_helper(cfg))


def stage(cfg: Config, step: int) -> tuple[str, float]:
    """Method and learning rate of a step: warm-up, then linear decay to zero, in each stage of the run."""
    method, first, last = cfg.mode, 0, cfg.steps
    if cfg.mode == "two-stage":
        early = step < cfg.sft_steps
        method, first, last = ("sft", 0, cfg.sft_steps) if early else ("grpo", cfg.sft_steps, cfg.steps)
    warmup = min(cfg.warmup, (last - first) // 2)  # keeps a short stage from being all warm-up
    rise, fall = (step - first + 1) / (warmup + 1), (last - step) / (last - first - warmup)
    return method, cfg.lr * min(rise, fall, 1.0)


def step_rows(cfg: Config, step: int, rows: int) -> list[int]:
    """Rows of a step, a function of (seed, step): every epoch in a new order; sft takes K times as many."""
    sft_steps = {"sft": step, "two-stage": min(step, cfg.sft_steps)}.get(cfg.mode, 0)
    start = cfg.prompts * (step - sft_steps + cfg.generations * sft_steps)
    count = cfg.prompts * (cfg.generations if stage(cfg, step)[0] == "sft" else 1)
    orders = {epoch: np.random.default_rng([cfg.seed, epoch]).permutation(rows)
              for epoch in range(start // rows, (start + count - 1) // rows + 1)}
    return [int(orders[i // rows][i % rows]) for i in range(start, start + count)]


def feed(trainer: Trainer, rows: list[Example], steps: range) -> Iterator[dict[str, Tensor]]:
    """This process's encoded chunks, step after step: threads make the next step's while this one runs."""
    cfg, local = trainer.cfg, threading.local()
    threads, ahead = max(1, min(4, (os.cpu_count() or 1) // 2)), len(own_chunks(cfg.prompts, cfg.micro_batch))
    policy = dataclasses.replace(trainer.policy, device=torch.device("cpu"))
    processors = [copy.deepcopy(policy.processor) for _ in range(threads)]  # a tokenizer serves one thread

    def take_processor() -> None:
        local.policy = dataclasses.replace(policy, processor=processors.pop())

    def encode(part: list[Example]) -> dict[str, Tensor]:
        if trainer.helper:  # the visual facts too are fetched while the step before runs, once per example
            trainer.helper.map(trainer.helper.facts, [(e,) for e in part])
        return encode_prompts(local.policy, part, cfg.max_new_tokens)

    waiting: collections.deque[Future] = collections.deque()
    pool = ThreadPoolExecutor(threads, initializer=take_processor)
    try:
        for step in steps:
            examples = [rows[i] for i in step_rows(cfg, step, len(rows))]
            for c in own_chunks(len(examples), cfg.micro_batch):
                waiting.append(pool.submit(encode, examples[c.start:c.stop]))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def train(cfg: Config) -> None:
    """Carry out a run: load, evaluate, train, evaluate, and say where everything is."""
    device = select_device(cfg.device)
    rows, held_out = load_rows(cfg)
    if cfg.mode == "two-stage" and not 0 < cfg.sft_steps < cfg.steps:
        raise UserError(f"--sft-steps {cfg.sft_steps}: must lie between 0 and the run's {cfg.steps} steps")
    gather(lambda: is_main() and prepare_run(cfg))
    run = Path(cfg.out)
    base = str(run.resolve().parent / "tiny-base") if cfg.model == "tiny" else cfg.model
    resumed = cfg.resume and (run / "checkpoint").exists()
    gather(lambda: is_main() and cfg.model == "tiny" and (cfg.beta or not resumed) and tiny_base(Path(base)))
    trainer = make_trainer(cfg, load_policy(str(run) if resumed else base, device, cfg.image_edge), base)
    gather(lambda: trainer.helper and trainer.helper.check_server())
    step = load_checkpoint(run, trainer, rows) if resumed else 0
    gather(lambda: is_main() and begin_run(cfg, step, resumed))
    trainer.board = open_board(cfg, step)
    if is_main():
        print(f"{run}: {cfg.mode} on {device}, {len(rows)} training rows, {len(held_out)} held out; "
              f"{'going on' if resumed else 'starting'} at step {step} of {cfg.steps}")
    if not read_jsonl(run / "evaluations.jsonl"):
        evaluate(trainer, held_out, run, step)
    if not train_loop(trainer, rows, held_out, run, step):
        if is_main():
            print(f"stopped; go on with: python dyme.py --resume --out {shlex.quote(str(run))}")
        raise KeyboardInterrupt
    if is_main():
        report(cfg, run)


def train_loop(trainer: Trainer, rows: list[Example], held_out: list[Example], run: Path, first: int) -> bool:
    """Take the steps from `first` on, with evaluations and checkpoints in between; False if interrupted."""
    cfg, stream = trainer.cfg, feed(trainer, rows, range(first, trainer.cfg.steps))
    bar = tqdm(total=cfg.steps, initial=first, desc=cfg.mode, ncols=80,
               disable=not (is_main() and sys.stderr.isatty()),  # a log gets a line per step instead
               bar_format="{desc} {percentage:3.0f}% {n}/{total} {elapsed}<{remaining}{postfix}")
    with bar, finish_step_on_interrupt() as interrupted, contextlib.closing(stream):
        for step in range(first, cfg.steps):
            method, lr = stage(cfg, step)
            examples = [rows[i] for i in step_rows(cfg, step, len(rows))]
            inputs = itertools.islice(stream, len(own_chunks(len(examples), cfg.micro_batch)))
            try:
                with vision_once(trainer.policy.model, trainer.features, cfg.vision_cache * 2**30):
                    metrics, group = train_step(trainer, examples, step, method, lr, inputs)
            except UserError:
                save_checkpoint(run, trainer, step)  # an unusable row must not cost the steps before it
                raise
            if is_main():
                record(run / "metrics.jsonl", metrics, trainer.board)
                append_row(run / "samples.jsonl", group)
            advance(bar, f"{cfg.mode} {step + 1}/{cfg.steps}", metrics)
            done, stop = step + 1, any(gather(lambda: bool(interrupted)))
            if done == cfg.steps or (cfg.eval_every and done % cfg.eval_every == 0):
                evaluate(trainer, held_out, run, done)  # before the save: a resumed run repeats what follows
            if done == cfg.steps or stop or (cfg.save_every and done % cfg.save_every == 0):
                save_checkpoint(run, trainer, done)
            if stop and done < cfg.steps:
                return False
    return True


def evaluate(trainer: Trainer, held_out: list[Example], run: Path, step: int) -> None:
    """Answer held-out rows greedily, into `held-out-STEP.jsonl`; averages go to `evaluations.jsonl`."""
    cfg, own = trainer.cfg, share(len(held_out))
    parts = gather(lambda: list(respond(trainer.policy, held_out[own.start:own.stop], cfg.max_new_tokens,
                                        4 * cfg.micro_batch)))
    if not is_main():
        return
    predictions = [*itertools.chain(*parts)]
    summary = summarise(predictions)
    write_jsonl(run / f"held-out-{step}.jsonl", predictions)
    record(run / "evaluations.jsonl", {"step": step} | summary, trainer.board)
    tqdm.write(f"step {step}: held-out accuracy {summary['strict']:.3f}, "
               f"answers in the format {summary['in_format']:.3f}")


# ---- The embedded default: a tiny model that sees toy charts, but rarely answers in the format ---

TINY_RECIPE = {"seed": 0, "steps": 700, "batch": 64, "lr": 3e-3, "warmup": 50, "flagged": 0.0002}


def tiny_policy(seed: int) -> Policy:
    """The tiny model with random weights, on the CPU."""
    words = tiny_words(PROMPT)
    return make_policy(build_tiny_model(seed, words), build_tiny_processor(words), torch.device("cpu"))


def tiny_base(folder: Path) -> Path:
    """Make the base model of the toy, once, on the CPU, and keep it in `folder` for all modes and seeds."""
    recipe = json.dumps(TINY_RECIPE)
    with contextlib.suppress(OSError):
        if (folder / "recipe.json").read_text() == recipe:
            return folder
    r, new = argparse.Namespace(**TINY_RECIPE), folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    policy = tiny_policy(r.seed)
    lessons = toy_lessons(r.seed, r.batch * r.steps, r.flagged, PROMPT)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=r.lr, weight_decay=0.01, fused=True)
    for step in tqdm(range(r.steps), "making the tiny base model", ncols=80, mininterval=bar_interval()):
        batch = list(itertools.islice(lessons, r.batch))
        inputs = encode_prompts(policy, [example for example, _ in batch], room=0, prompt="{question}")
        targets = [Sequence(i, target_ids(policy, example.question, True, response), 1 / r.batch, False)
                   for i, (example, response) in enumerate(batch)]
        logprobs, mask, explore = sequence_logprobs(policy, policy.model, inputs, [*range(r.batch)],
                                                    targets, temperature=1.0)
        policy_loss(logprobs, mask, torch.full((r.batch,), 1 / r.batch), explore).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = r.lr * min((step + 1) / r.warmup, 1 - 0.9 * step / r.steps)
        optimizer.step()
        optimizer.zero_grad()
    policy.model.save_pretrained(new)
    policy.processor.save_pretrained(new)
    (new / "recipe.json").write_text(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return folder


def main() -> None:
    """The program: read the settings, join the other processes if there are any, and train."""
    cfg = parse_config()
    with processes(select_device(cfg.device).type == "cuda"):
        if cfg.benchmark:
            from eval import benchmark  # which builds on this file: hence so late
            benchmark(cfg)
        else:
            train(cfg)


if __name__ == "__main__":
    sys.exit(run_main(main))
