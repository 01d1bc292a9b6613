"""DyME: teach a small vision-language model to think, by dynamic memorization and exploration.

A single-file reference of "Empowering Small VLMs to Think with Dynamic Memorization and
Exploration" (Liu, Deng, Chen; ICLR 2026; arXiv 2506.23061), in the order the data flows:
settings, policy, prompts, rollout, rewards and advantages, switch, loss, step, run.

The paper on one screen is `train_step`. Rewards are in reward.py; what the paper takes for
granted (data, run folders, processes) is in support/. With one process `parallel` does nothing.

Shapes: P prompts, K responses to each (a group), N = P K responses or sequences; L tokens of a
prompt, T of a response; R packed rows of Q tokens, M tokens to predict; V words, D width.
With several processes, p is this one's part of P.

    python dyme.py                                      # a tiny VLM on toy charts, on a CPU
    python dyme.py --mode grpo --seed 1                 # a baseline on the same path
    python dyme.py --model SmolVLM-256M --data chartqa  # the real thing, on a GPU
    python dyme.py --resume --out runs/NAME             # go on after Ctrl-C or a crash
"""

import contextlib
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from reward import Example, reference_response, thinking_f1, verify
from support import (
    DivergedError,
    UserError,
    ablations,
    attention,
    cache,
    feed,
    files,
    full_dyme,
    graphs,
    memory,
    metrics,
    models,
    onednn,
    parallel,
    references,
    rows,
    runs,
    samples,
    settings,
    thinking,
    vision,
)

Model = torch.nn.Module
Inputs = dict[str, Tensor]  # a micro-batch of encoded prompts, as a model takes it

# ---- Settings: every field is a flag, the comment beside it is its help --------------------------


@dataclass
class Config:
    """All settings of a run, with the toy's values; `REAL` is for other data."""

    # What to train
    model: str = "tiny"  # tiny, a short name (SmolVLM-256M, ...), a hub id or a directory
    data: str = "toy"  # toy, chartqa (or its folder or zip), DOMAIN:FOLDER, own rows (.jsonl)
    mode: str = "dyme"  # dyme, or a baseline on the same path: sft, grpo, two-stage
    out: str = ""  # run folder (default: runs/MODEL-DATA-MODE-sSEED)
    # Steps
    steps: int = 600  # optimisation steps
    epochs: float = 0.0  # passes over the data, both stages included; sets --steps
    prompts: int = 8  # prompts in a step (sft: prompts x generations targets)
    generations: int = 8  # K, the responses sampled for a prompt
    micro_batch: int = 64  # prompts per forward pass (0: what fits); same gradient
    # Rollouts
    max_new_tokens: int = 48  # length limit of a sampled response
    temperature: float = 1.0  # sampling temperature
    # Switch, learning rate, loss
    switch: str = "any-correct"  # any-correct (Eq. 6); threshold:T, anneal, budget:N, ...
    sft_steps: int = 150  # two-stage: steps of SFT before GRPO (0: one pass)
    lr: float = 0.0  # peak learning rate (0: the mode's own)
    warmup: int = 10  # steps of linear warm-up, before linear decay to zero
    thinking_weight: float = 1.0  # w_t, weight of r_t (grpo, two-stage: 0)
    format_weight: float = 0.0  # w_f, weight of the format reward r_f (the paper has none)
    beta: float = 0.0  # weight of KL in grpo and two-stage (Eq. 3); loads the model twice
    released_code: bool = False  # do as the authors' release where it departs from the paper
    # Visual supervision
    helper_url: str = ""  # Full DyME: an OpenAI-compatible server, as http://127.0.0.1:8000/v1
    helper_model: str = ""  # the model to ask for there
    helper_key_env: str = ""  # the environment variable that holds its key, if it wants one
    helper_concurrency: int = 8  # requests at a time
    no_checker: bool = False  # keep the static r_t: the helper only refines
    no_refiner: bool = False  # keep the static traces: the helper only checks
    # Data and repeatability
    seed: int = 0  # data order and sampling; on the CPU it makes a run reproducible
    traces: str = "low"  # toy: quality of the thinking traces: high, medium, low (ungrounded)
    hints: str = ""  # a trace file of the release: train on the rows that it has a trace for
    augmented: bool = False  # chartqa: train on the machine-written questions too
    image_edge: int = 0  # longest image edge in pixels (0: the processor's own)
    vision_cache: float = 0.0  # GiB to keep the frozen tower's output in for later epochs
    train_vision: bool = False  # train the vision tower too (frozen in the release)
    # Run
    eval_every: int = 150  # steps between evaluations (0: only before and after)
    eval_rows: int = 512  # held-out rows in an evaluation
    save_every: int = 100  # steps between checkpoints (0: only at the end)
    tensorboard: bool = False  # also write metrics for TensorBoard, into the run folder
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # replace the run in --out
    device: str = "auto"  # auto, cpu, cuda or cuda:N


# Settings for real data: the release's main configuration (K = 8 there too), and a warm-up.
REAL = {"epochs": 10.0, "prompts": 32, "micro_batch": 0, "max_new_tokens": 300,
        "warmup": 50, "sft_steps": 0, "eval_rows": 200}
LEARNING_RATES = {
    "toy": {"dyme": 5e-4, "grpo": 1e-4, "two-stage": 5e-4, "sft": 2e-4},
    "real": {"dyme": 8e-5, "grpo": 1e-5, "two-stage": 1e-5, "sft": 1e-5},
}
CHOICES = {"mode": ("dyme", "sft", "grpo", "two-stage"), "traces": ("high", "medium", "low")}


def parse_config(argv: list[str] | None = None) -> Config:
    """Read the flags, over a preset by data, or over the settings of the run to resume."""
    notes = {name: f"{value:g} for real data" for name, value in REAL.items()}
    notes["lr"] = re.sub("[{}']", "", str(LEARNING_RATES))
    given = vars(settings.build_parser(Config, __doc__, CHOICES, notes).parse_args(argv))

    preset = "toy" if given.get("data", Config.data) == "toy" else "real"
    defaults = (REAL if preset == "real" else {}) | settings.implied(given)
    cfg = Config(**(defaults | given))
    cfg.lr = cfg.lr or LEARNING_RATES[preset][cfg.mode]
    cfg.out = cfg.out or runs.default_folder(cfg)
    if cfg.resume:
        cfg = Config(**settings.resumed_settings(cfg, given))
    settings.check(cfg, {"tiny", *models.NAMES}, CHOICES)
    return cfg


# ---- Policy: a model, its processor, and the ids that end a response -----------------------------

@dataclass
class Policy:
    """A model, and what is needed to talk to it."""

    model: Model
    processor: Any
    end_ids: list[int]  # every id that ends a response
    pad_id: int
    device: torch.device
    image_edge: int = 0

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Half precision for forward passes on CUDA, full precision elsewhere.

        The weights stay float32: in bf16 a step of 1e-5 would be lost in rounding.
        """
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=parallel.half_precision())


def load_policy(name: str, device: torch.device, image_edge: int = 0) -> Policy:
    """Load `tiny`, a short name, hub id, directory or run folder. Raises UserError."""
    settings.check_model_name(name, {"tiny", *models.NAMES})
    with models.errors_told(name):
        model, processor = models.load_pretrained(models.source(name))
    parallel.limit_threads(sum(p.numel() for p in model.parameters()))
    onednn.use_onednn(model.to(device))
    return make_policy(model, processor, device, image_edge)


def make_policy(model: Model, processor: Any, device: torch.device,
                image_edge: int = 0) -> Policy:
    """Find what ends a response, and set the processor up. Raises UserError."""
    name = model.name_or_path or "the model"
    tokenizer = getattr(processor, "tokenizer", processor)
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise UserError(f"{name} has no chat template; use the instruct version")

    # Padding goes to the left of prompts: a response must begin right after its prompt.
    tokenizer.padding_side = "left"
    image_processor = getattr(processor, "image_processor", None)
    if image_edge and "longest_edge" in (getattr(image_processor, "size", None) or {}):
        image_processor.size["longest_edge"] = image_edge

    # Model, tokenizer and template may each name another id, or several, or none.
    configured = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    end_ids = {tokenizer.eos_token_id, end_of_turn(processor), *configured} - {None}
    if not end_ids:
        raise UserError(f"{name}: nothing names an end token, not even the chat template")
    pad_id = tokenizer.pad_token_id
    pad_id = min(end_ids) if pad_id is None else pad_id
    attention.use_grouped(model)
    # eval() for good: with dropout in the update, responses would be trained under another
    # distribution than the one they were sampled from.
    return Policy(model.eval(), processor, sorted(end_ids), pad_id, device, image_edge)


# ---- Prompts and targets: the model's own chat template renders both -----------------------------

PROMPT = ("Think step by step about the question below, "
          'then write "Answer: .." and your answer.\n\n{question}')


def render(processor: Any, prompt: str, has_image: bool, response: str | None = None) -> str:
    """Render a user's prompt, and perhaps a response, with the chat template."""
    content = [{"type": "image"}] * has_image + [{"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    if response is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
    if not hasattr(processor, "image_processor"):
        # The templates of text-only models want plain text.
        messages = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in messages]
    return models.apply_template(processor, messages, response is None)


def end_of_turn(processor: Any) -> int | None:
    """The id with which the template ends the assistant's turn, if it writes one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tail = render(processor, "question", False, "response").rpartition("response")[2]
    ids = tokenizer(tail.strip(), add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None


def target_ids(policy: Policy, example: Example, response: str | None = None,
               prompt: str = PROMPT) -> list[int]:
    """Token ids of the response to imitate (Eq. 1), by default the example's reference."""

    def tokens(text: str) -> list[int]:
        return policy.tokenizer(text, add_special_tokens=False).input_ids

    # A target is what the chat template renders after the generation prompt, not a string glued
    # to it: other spaces or line breaks would give tokens that sampling never meets again.
    question, has_image = prompt.format(question=example.question), bool(example.image)
    response = reference_response(example) if response is None else response
    before = render(policy.processor, question, has_image)
    full = render(policy.processor, question, has_image, response)
    if not full.startswith(before):
        raise UserError("the model's chat template does not continue the prompt that it renders")
    # Prompt and response are tokenized together, as the model would meet them.
    ids, prompt_ids = tokens(full), tokens(before)
    if ids[:len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids):]
    else:  # the tokenizer merged characters across the border
        ids = tokens(full[len(before):])

    # The end token is part of the target. Untrained, it would never be sampled: every response
    # would be cut off, count as wrong, and all prompts would stay in memorization.
    ends = [i for i, token in enumerate(ids) if token in policy.end_ids]
    return ids[:ends[-1] + 1] if ends else ids + policy.end_ids[:1]


def encode_prompts(policy: Policy, examples: list[Example], room: int, prompt: str = PROMPT) -> Inputs:
    """Process P prompts: ids and mask (P, L), padded left, and image tensors, on the device.

    Raises UserError naming a row whose image cannot be read, or that leaves no `room` for the
    response.
    """
    processor = policy.processor
    texts, images = [], []
    for example in examples:
        if example.image and not hasattr(processor, "image_processor"):
            raise UserError(f"{example.name}: has an image, which this model cannot see")
        question = prompt.format(question=example.question)
        texts.append(render(processor, question, bool(example.image)))
        pictures = [example.image()] if example.image else []
        images.append([rows.shrink(picture, policy.image_edge) for picture in pictures])
    has_bos = texts[0].startswith(policy.tokenizer.bos_token or "\0")
    # A processor does not take a batch without any image as one with empty lists.
    with_images = {"images": images} if any(images) else {}
    try:
        inputs = processor(text=texts, padding=True, return_tensors="pt",
                           add_special_tokens=not has_bos, **with_images)
    except ValueError as error:  # such as a question that holds the image token itself
        names = " or ".join(example.name for example in examples)
        raise UserError(f"{names}: the processor refuses the prompt ({error})") from None

    lengths = inputs["attention_mask"].sum(1).tolist()
    models.check_room(policy.model, examples, lengths, room)
    return feed.to_device(inputs, policy.device)


def encode_ahead(policy: Policy, examples: list[Example], processor: Any, room: int,
                 prompt: str = PROMPT) -> Inputs:
    """`encode_prompts` in a thread, with its own processor; ready for the device."""
    on_cpu = replace(policy, device=torch.device("cpu"), processor=processor)
    inputs = encode_prompts(on_cpu, examples, room, prompt)
    return feed.for_device(inputs, policy.device)


def full_length(policy: Policy, example: Example) -> int:
    """Tokens of a row's prompt and reference together."""
    prompt = encode_prompts(policy, [example], room=0)["input_ids"]  # (1, L)
    return prompt.shape[1] + len(target_ids(policy, example))


# ---- Rollout: a prompt is encoded once, images included; its K responses share the result --------
# On a first reading: `encode_prefix`, then `rollout` at the end; between is what makes it fast.


@dataclass
class Prefix:
    """Prompts that have been through the model: all that their continuations need."""

    cache: Any  # keys and values, batch P
    hidden: Tensor  # (P, D) the last state, which predicts a response's first token
    mask: Tensor  # (P, L) 1 for real tokens, 0 for the padding on the left
    position: Tensor  # (P, 1) of the next token; (3, P, 1) in Qwen-VL


def encode_prefix(model: Model, inputs: Inputs) -> Prefix:
    """Run prompts and images through the model once, with gradients if enabled."""
    # The base model, without the head: no logits are made for the prompt.
    base, mask = model.base_model, inputs["attention_mask"]
    # A pass of Qwen-VL sets this: not cleared, a batch without images would inherit the last one's.
    base.rope_deltas = None
    out = base(**inputs, use_cache=True)
    # Padding counts as positions. With rotary embeddings only distances matter, and there is no
    # gap between a prompt and its response, because the padding is on the left.
    position = torch.full_like(mask[:, :1], mask.shape[1])  # (P, 1)
    if base.rope_deltas is not None:
        length = mask.sum(1, keepdim=True)
        position = (length + base.rope_deltas).expand(3, -1, -1)  # (3, P, 1)
    return Prefix(out.cache, out.last_hidden_state[:, -1], mask, position)


def repeat_prompts(prefix: Prefix, prompts: Tensor) -> Prefix:
    """Take prompts `prompts: (R,)`, each as often as it occurs; uses up the cache."""
    for layer in prefix.cache.layers:
        layer.keys = layer.keys.index_select(0, prompts)
        layer.values = layer.values.index_select(0, prompts)
    position = prefix.position[..., prompts, :]
    return Prefix(prefix.cache, prefix.hidden[prompts], prefix.mask[prompts], position)


def extend(model: Model, prefix: Prefix, ids: Tensor, offsets: Tensor, visible: Tensor) -> Tensor:
    """Run tokens `ids: (P, Q)` of several responses to a prompt as one row; states (P, Q, D).

    They stand at `offsets: (P, Q)` from the prompt's end. Each sees its prompt and, of the Q'
    response tokens in the cache by then, those that `visible: (P, Q, Q')` marks: its own response.
    """
    # So K responses share one copy of their prompt's keys and values, when sampling and in the
    # update. Repeating the prompt K times would take K times its memory and time.
    prompt = prefix.mask.bool()[:, None, None].expand(-1, 1, ids.shape[1], -1)  # (P, 1, Q, L)
    visible = torch.cat([prompt, visible[:, None]], dim=3)  # (P, 1, Q, L + Q')
    config, dtype = model.config.get_text_config(), prefix.hidden.dtype
    mask = attention.additive_mask(visible, config, dtype)  # (P, 1, H/G Q, L + Q')
    out = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=prefix.position + offsets,
        cache=prefix.cache, use_cache=True)
    return out.last_hidden_state


def next_logits(model: Model, hidden: Tensor) -> Tensor:
    """Float32 logits (N, V) of the token after each of `hidden: (N, D)`."""
    return model.get_output_embeddings()(hidden).float()


@dataclass
class Rollout:
    """Sampled responses as raw ids.

    They are trained as they are: decoded and tokenized again, they might be other tokens.
    """

    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) 1 up to and including the end token
    finished: Tensor  # (N,) bool: an end token came before the length limit
    entropy: Tensor  # (N, T) of the distributions sampled from, in nats


def keyed_uniforms(seed: int, step: int, prompts: Iterable[int], generations: int,
                   tokens: int) -> Tensor:
    """Random numbers in [0, 1), (P*K, T), that depend on (seed, step, prompt, k) alone."""
    # If they were drawn in order, samples would depend on resuming, on the micro-batch and on the
    # number of processes.
    uniforms = []
    for prompt in prompts:
        for k in range(generations):
            generator = np.random.default_rng([seed, step, prompt, k])
            uniforms.append(generator.random(tokens, np.float32))
    return torch.from_numpy(np.stack(uniforms))


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample tokens (N,) by inverting the distribution of `logits: (N, V)` at `uniform: (N,)`.

    Also returns its entropy, (N,). Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    logp = F.log_softmax(logits / temperature, dim=-1)  # (N, V)
    p = logp.exp()
    # The draw is scaled by the last sum, which rounding may leave below 1: none falls past the end.
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    entropy = -(p * logp.clamp(min=-100)).sum(-1)  # without the clamp 0 * -inf would be nan
    return token.clamp(max=logits.shape[1] - 1), entropy


def merge(prefixes: list[Prefix], room: int, slots: Tensor) -> Prefix:
    """Put prompts of several micro-batches side by side, with `room` for new tokens."""
    longest = max(prefix.mask.shape[1] for prefix in prefixes)
    kept = cache.merge([prefix.cache for prefix in prefixes], longest, room, slots)
    masks = []
    for prefix in prefixes:  # padding is on the left
        masks.append(F.pad(prefix.mask, (longest - prefix.mask.shape[1], 0)))
    hidden = torch.cat([prefix.hidden for prefix in prefixes])
    position = torch.cat([prefix.position for prefix in prefixes], dim=-2)
    return Prefix(kept, hidden, torch.cat(masks), position)


class Decoder:
    """K responses to each of P prompts, a token at a time; N = P*K responses of up to T tokens.

    Every buffer is written in place, so that a step can be recorded as a CUDA graph.
    """

    def __init__(self, model: Model, prefixes: list[Prefix], uniforms: Tensor, end_ids: list[int],
                 pad_id: int, temperature: float) -> None:
        (N, T), device = uniforms.shape, uniforms.device
        self.P = sum(len(prefix.mask) for prefix in prefixes)
        self.K = N // self.P
        self.model, self.uniforms = model, uniforms
        self.temperature, self.pad_id = temperature, pad_id
        self.end_ids = torch.tensor(end_ids, device=device)

        # Token `t` of every response is the newest. In the room for new tokens the K of them are at
        # `columns`; in the cache, after the longest prompt, at `slots`. The last token is never
        # fed back, hence T - 1.
        room = self.K * (T - 1)
        self.longest = max(prefix.mask.shape[1] for prefix in prefixes)
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.columns = torch.arange(self.K, device=device)
        self.slots = self.columns + self.longest
        self.prefix = merge(prefixes, room, self.slots)
        self.visible = torch.zeros(self.P, self.K, room, dtype=torch.bool, device=device)
        itself = torch.eye(self.K, dtype=torch.bool, device=device)
        self.itself = itself.expand(self.P, -1, -1)

        self.ids = torch.full((N, T), pad_id, device=device)
        self.mask = torch.zeros(N, T, dtype=torch.long, device=device)
        self.entropy = torch.zeros(N, T, device=device)
        self.alive = torch.ones(N, dtype=torch.bool, device=device)
        logits = next_logits(model, self.prefix.hidden)  # (P, V)
        self.logits = logits.repeat_interleave(self.K, 0)  # (N, V)

    def widen(self, tokens: int) -> None:
        """Attend to the room of so many tokens of each response: the rest is empty yet."""
        self.open = min(self.K * tokens, self.visible.shape[2])
        for layer in self.prefix.cache.layers:
            layer.end = self.longest + self.open

    def choose(self) -> None:
        """Draw token t of every response; those that have ended get padding."""
        uniform = self.uniforms.index_select(1, self.t).squeeze(1)  # (N,)
        token, entropy = draw(self.logits, uniform, self.temperature)
        token = token.masked_fill(~self.alive, self.pad_id)
        self.ids.index_copy_(1, self.t, token[:, None])
        self.mask.index_copy_(1, self.t, self.alive.long()[:, None])
        self.entropy.index_copy_(1, self.t, entropy[:, None])
        self.alive.logical_and_((token[:, None] != self.end_ids).all(1))

    def step(self) -> None:
        """Feed token t of every response to the model, then choose token t + 1."""
        # Response k alone sees its token t.
        self.visible.index_copy_(2, self.columns, self.itself)
        tokens = self.ids.index_select(1, self.t).view(self.P, self.K)
        offsets = self.t.expand(self.P, self.K)
        visible = self.visible[:, :, :self.open]
        hidden = extend(self.model, self.prefix, tokens, offsets, visible)  # (P, K, D)
        self.logits.copy_(next_logits(self.model, hidden.flatten(0, 1)))
        self.t.add_(1)
        self.columns.add_(self.K)
        self.slots.add_(self.K)
        self.choose()


@torch.no_grad()
def sample(model: Model, prefixes: list[Prefix], uniforms: Tensor, end_ids: list[int], pad_id: int,
           temperature: float) -> Rollout:
    """Sample K = N / P responses to each of P prompts; `uniforms: (N, T)`."""
    decoder = Decoder(model, prefixes, uniforms, end_ids, pad_id, temperature)
    step, on_cuda = decoder.step, uniforms.is_cuda
    block = 128 if on_cuda else 1  # tokens for which attention is widened at a time
    decoder.choose()  # the first token is predicted by the prompt itself
    for i in range(1, uniforms.shape[1]):
        # Asking whether all have ended makes the CPU wait for the GPU: there only every 16 tokens.
        if (i % 16 == 1 or not on_cuda) and not decoder.alive.any():
            break
        widens = (i - 1) % block == 0
        if widens:
            decoder.widen(i - 1 + block)
        # A graph is bound to its shapes: one for each width. The first two steps run plainly: they
        # warm up, and cast the weights.
        if on_cuda and (i == 3 or (widens and i > 3)):
            step = graphs.capture(model, decoder.step)
        step()
    T = int(decoder.mask.sum(1).max())
    ids, mask, entropy = (x[:, :T] for x in (decoder.ids, decoder.mask, decoder.entropy))
    return Rollout(ids, mask, ~decoder.alive, entropy)


def rollout(policy: Policy, inputs: Iterable[Inputs], uniforms: Tensor,
            temperature: float) -> Rollout:
    """Sample K = N / P responses for each of the P prompts of all micro-batches."""
    model, uniforms = policy.model, uniforms.to(policy.device)  # (N, T)
    with torch.no_grad(), policy.autocast():
        # The responses of all micro-batches are sampled together.
        prefixes = [encode_prefix(model, x) for x in inputs]
        return sample(model, prefixes, uniforms, policy.end_ids, policy.pad_id, temperature)


# ---- Rewards, advantages, switch: the heart of the paper -----------------------------------------


@dataclass
class Response:
    """A sampled response."""

    ids: list[int]  # end token included
    text: str  # without it
    finished: bool  # an end token came before the length limit


def decode(policy: Policy, rolled: Rollout) -> list[Response]:
    """A rollout as N responses."""
    responses = []
    finished = rolled.finished.tolist()
    lengths = rolled.mask.sum(1).tolist()
    for i, ids in enumerate(rolled.ids.tolist()):
        ids = ids[:lengths[i]]
        text = policy.tokenizer.decode(ids, skip_special_tokens=True).strip()
        responses.append(Response(ids, text, finished[i]))
    return responses


@dataclass
class Groups:
    """P groups of K sampled and scored responses; all tensors are (P, K)."""

    responses: list[list[Response]]  # P lists of K
    correct: Tensor  # r_a in {0, 1}
    thinking: Tensor  # r_t in [0, 1]
    in_format: Tensor  # r_f in {0, 1}
    rewards: Tensor  # r = r_a + w_t r_t + w_f r_f
    entropy: Tensor  # sum over the tokens of a response, in nats


def score(policy: Policy, rolled: Rollout, examples: list[Example], thinking_weight: float,
          format_weight: float) -> Groups:
    """Judge all responses: r_a by rules, r_t against the reference trace."""
    P, K = len(examples), len(rolled.ids) // len(examples)
    # Responses of a prompt stand side by side: p * K + k is response k of prompt p.
    flat = decode(policy, rolled)
    responses = [flat[p * K:(p + 1) * K] for p in range(P)]
    correct, thinking, in_format = torch.zeros(3, P, K)
    for p, example in enumerate(examples):
        for k, response in enumerate(responses[p]):
            verdict = verify(response.text, example, response.finished)
            correct[p, k], in_format[p, k] = verdict.correct, verdict.in_format
            if example.trace:  # without one, r_t is 0
                thinking[p, k] = thinking_f1(response.text, example.trace)
    rewards = correct + thinking_weight * thinking + format_weight * in_format  # (P, K)
    entropy = (rolled.entropy * rolled.mask).sum(1).view(P, K).cpu()
    return Groups(responses, correct, thinking, in_format, rewards, entropy)


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Eq. 2: standardise `rewards: (P, K)` within each group.

    A group without variance gets 0: its advantages have collapsed.
    """
    mean = rewards.mean(1, keepdim=True)  # (P, 1)
    # The population's deviation (divide by K). With K = 8 the sample's would make advantages 6 %
    # smaller, and memorization heavier by as much in Eq. 8.
    std = rewards.std(1, keepdim=True, correction=0)
    advantages = (rewards - mean) / (std + eps)
    # Exactly 0, without rounding error, so that `update` can leave such groups out.
    return advantages.masked_fill(no_variance(rewards)[:, None], 0.0)


def no_variance(rewards: Tensor) -> Tensor:
    """Collapse detection: the groups of `rewards: (P, K)` that are all alike, (P,) bool."""
    return rewards.amax(1) == rewards.amin(1)


def choose_mode(correct: Tensor) -> Tensor:
    """Eq. 6, the switch: which prompts have a right response? r_a, (P, K), to (P,) bool."""
    # It looks at r_a alone. Groups without a right response still differ in r_t: to explore them
    # would reward the best-sounding wrong thinking.
    return (correct == 1).any(dim=1)


# ---- Loss: exploration and memorization in one sum -----------------------------------------------
# On a first reading: `Sequence`, then `policy_loss`. Between them is how log-probs are made fast;
# `plain_loss` in test_dyme.py is the same without that.


@dataclass
class Sequence:
    """A response to train on: sampled, or a target, which has advantage 1 (Eq. 4-5)."""

    prompt: int  # index of its prompt among those of this process
    ids: list[int]
    weight: float  # its factor in the loss: A / (K P) if sampled, 1 / P for a target
    explore: bool  # was it sampled?
    kl_weight: float = 0.0  # factor of its KL to the reference policy: beta / (K P)


def pack(prompts: list[int], lengths: list[int], limit: int) -> tuple[list[int], list[int], list[int]]:
    """Lay sequences that continue `prompts` end to end, in rows of up to `limit` tokens.

    Returns the prompt of every row, and the row and the start of every sequence.
    """
    # So nothing is padded to the longest sequence, and sequences share a copy of their prompt. But
    # attention grows with the square of a row's length: it is kept no longer than the prompt.
    row_prompts, places, starts = [], [], []
    used = 0
    for prompt, length in zip(prompts, lengths, strict=True):
        if not row_prompts or row_prompts[-1] != prompt or used + length > limit:
            row_prompts.append(prompt)
            used = 0
        places.append(len(row_prompts) - 1)
        starts.append(used)
        used += length
    return row_prompts, places, starts


def completion_logprobs(model: Model, prefix: Prefix, prompts: list[int],
                        sequences: list[list[int]], temperature: Tensor,
                        limit: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs and mask, (N, T), of N sequences of ids at `temperature: (N,)`.

    Sequence n continues prompt `prompts[n]`. R rows of Q tokens hold them, packed; each token sees
    its prompt and its own sequence so far, not its neighbours.
    """
    device, lengths = prefix.mask.device, torch.tensor([len(ids) for ids in sequences])
    limit = limit or prefix.mask.shape[1]
    # Nothing is predicted from a sequence's last token, so it is left out of the input.
    row_prompts, rows_of, starts = pack(prompts, (lengths - 1).tolist(), limit)
    prefix = repeat_prompts(prefix, torch.tensor(row_prompts, device=device))  # batch R

    Q = max(start + len(ids) - 1 for start, ids in zip(starts, sequences, strict=True))
    tokens = torch.zeros(len(row_prompts), Q, dtype=torch.long)
    offsets = torch.zeros_like(tokens)  # a token's distance from the end of its prompt
    # The sequence that a token belongs to; -1 is padding.
    owner = torch.full_like(tokens, -1)
    # Where the state that predicts each of the M tokens will be found.
    state_row, state_column = [], []
    for n, ids in enumerate(sequences):
        row, start, fed = rows_of[n], starts[n], len(ids) - 1
        tokens[row, start:start + fed] = torch.tensor(ids[:-1], dtype=torch.long)
        offsets[row, start:start + fed] = torch.arange(fed)
        owner[row, start:start + fed] = n
        # Column 0 holds the prompt's last state, which predicts token 0. Token t is predicted by
        # the state of token t - 1, which stands in column start + t.
        state_row += [row] * len(ids)
        state_column += [0, *range(start + 1, start + len(ids))]

    states = prefix.hidden[:, None]  # (R, 1, D)
    if Q:
        visible = (owner[:, :, None] == owner[:, None, :]).tril()  # (R, Q, Q)
        new = extend(model, prefix, tokens.to(device), offsets.to(device), visible.to(device))
        states = torch.cat([states, new], dim=1)  # (R, 1 + Q, D)
    predicted = torch.tensor([*itertools.chain(*sequences)], device=device)  # (M,)
    temperatures = temperature.to(device).repeat_interleave(lengths.to(device))  # (M,)
    logprobs = token_logprobs(model, states[state_row, state_column], predicted, temperatures)
    per_sequence = logprobs.split(lengths.tolist())
    padded = torch.nn.utils.rnn.pad_sequence(per_sequence, batch_first=True)  # (N, T)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded, mask.long().to(device)


def token_logprobs(model: Model, hidden: Tensor, ids: Tensor, temperature: Tensor,
                   chunk: int = 1024) -> Tensor:
    """Log-probs (M,) of tokens `ids: (M,)` after states `hidden: (M, D)`."""

    def part(hidden: Tensor, ids: Tensor, temperature: Tensor) -> Tensor:
        logits = next_logits(model, hidden).div_(temperature[:, None])  # (M, V)
        return -F.cross_entropy(logits, ids, reduction="none")

    if len(ids) <= chunk:
        return part(hidden, ids, temperature)
    # Logits are made for `chunk` tokens at a time, and once more in the backward pass, so that all
    # M of them (gigabytes in float32) never exist at once.
    logprobs = []
    pieces = (x.split(chunk) for x in (hidden, ids, temperature))
    for piece in zip(*pieces, strict=True):
        of_piece = checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(of_piece)
    return torch.cat(logprobs)


def sequence_logprobs(policy: Policy, model: Model, inputs: Inputs, prompts: list[int],
                      sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and mask, (N, T), of N sequences; and which were sampled, (N,)."""
    explore = torch.tensor([s.explore for s in sequences], device=policy.device)
    # rho = p / p_old, and p_old is what was sampled from, temperature included. At another one the
    # gradient would be that of another policy. Targets are taken at 1.
    temperatures = torch.where(explore, temperature, 1.0)  # (N,)
    ids = [s.ids for s in sequences]
    with policy.autocast():
        prefix = encode_prefix(model, inputs)
        logprobs, mask = completion_logprobs(model, prefix, prompts, ids, temperatures)
    return logprobs, mask, explore


def policy_loss(logprobs: Tensor, mask: Tensor, weights: Tensor, explore: Tensor) -> Tensor:
    """Eq. 7 and 8 as one sum over N sequences.

    `logprobs, mask: (N, T)`, `weights, explore: (N,)`. A sampled response contributes -rho A
    (Eq. 7), a target -log p (Eq. 1), which has the gradient of a sample with A = 1 (Eq. 4-5).
    The means over K responses and P prompts are in the weights.
    """
    # p_old is the policy itself, held constant: with one update per rollout rho is 1, so that a
    # clip would not bind. The gradient of rho is not 0: it is that of log p.
    rho = torch.exp(logprobs - logprobs.detach())  # (N, T)
    # Eq. 6 once more: rho for what was sampled, log p for targets.
    per_token = torch.where(explore[:, None], rho, logprobs)
    return -(weights * token_mean(per_token, mask)).sum()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values: (N, T)` over each row's real tokens, (N,)."""
    # Each row by itself: over the tokens of all rows at once, long responses would weigh more.
    return (values * mask).sum(1) / mask.sum(1)


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(p || p_ref) of Eq. 3 per sampled token, from its log-probs (Schulman's k3)."""
    return torch.exp(reference - logprobs) - (reference - logprobs) - 1


# ---- One training step: sample, judge, choose the mode, take the loss ----------------------------


@dataclass
class Trainer:
    """What a step changes (policy, optimiser, scaler, buffer) and what it needs."""

    cfg: Config
    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reference: Model | None = None  # frozen copy of the policy for the KL term
    score: Callable[..., Groups] = score  # the benchmark puts another in its place
    helper: full_dyme.Helper | None = None  # Full DyME's checker and refiner
    buffer: list[Example] = field(default_factory=list)  # failed prompts, for --switch budget
    features: dict[int, Tensor] = field(default_factory=dict)  # of images, for --vision-cache
    failures: int = 0  # steps in a row whose loss or gradient was not finite
    best: float = -1.0  # highest held-out accuracy so far, whose weights are in `best/`


@dataclass
class Step:
    """What a step did with this process's p prompts."""

    examples: list[Example]
    groups: Groups | None  # None in SFT, which samples nothing
    advantages: Tensor | None  # (p, K)
    explore: Tensor  # (p,) bool
    sequences: list[Sequence]
    metrics: dict[str, Any]


def train_step(trainer: Trainer, examples: list[Example], step: int, lr: float,
               rule: str = "any-correct", inputs: Iterable[Inputs] | None = None) -> Step:
    """A step on P prompts: sample and judge K responses each, choose the mode, update."""
    cfg, policy, watch = trainer.cfg, trainer.policy, runs.Stopwatch()
    P, K = len(examples), cfg.generations
    own = parallel.share(P)  # this process takes p of the P prompts: all, if it is alone
    examples = examples[own.start:own.stop]
    inputs = receive_inputs(trainer, examples, inputs)
    watch.lap("seconds_feed")

    # Sample K responses each. Judge them: r_a (`correct`), r_t (`thinking`), r (`rewards`), (p, K).
    uniforms = keyed_uniforms(cfg.seed, step, own, K, cfg.max_new_tokens)  # (p*K, T)
    rolled = rollout(policy, inputs, uniforms, cfg.temperature)
    watch.lap("seconds_sampling")
    groups = trainer.score(policy, rolled, examples, cfg.thinking_weight, cfg.format_weight)

    # Eq. 6, the switch: explore where one of the K responses is right, memorize elsewhere.
    explore = choose_mode(groups.correct)  # (p,)
    if rule != "any-correct":  # an ablation: another switching rule, of Table 1b
        highest = 1 + cfg.thinking_weight + cfg.format_weight
        explore = ablations.choose_mode(rule, groups.rewards, highest)
    if trainer.helper:  # Full DyME: its ratings replace r_t, its traces the references
        memorize = ~explore | (rule == "anneal")
        groups, examples = trainer.helper.supervise(groups, examples, explore, memorize)
    advantages = group_advantages(groups.rewards)  # Eq. 2, (p, K)
    if cfg.released_code:
        advantages = ablations.released_advantages(groups.rewards, groups.correct)
    watch.lap("seconds_scoring")

    # Both modes become sequences with a weight; the loss, in `policy_loss`, is their sum.
    sequences = []
    for i, example in enumerate(examples):
        if explore[i]:  # one is right: its K responses, weighted by advantage (Eq. 7)
            for k, response in enumerate(groups.responses[i]):
                weight = advantages[i, k].item() / (K * P)
                sequences.append(Sequence(i, response.ids, weight, True, cfg.beta / (K * P)))
        else:  # none is right: the reference (Eq. 1), as heavy as K responses together
            sequences.append(Sequence(i, target_ids(policy, example), 1 / P, False))
    sequences = adjust_for_ablations(trainer, sequences, examples, step)

    # Eq. 8: both kinds in one loss and one update.
    totals = metrics.group_totals(groups, explore, no_variance(groups.rewards))
    logged = update(trainer, inputs, sequences, totals, lr)
    watch.lap("seconds_update")
    return Step(examples, groups, advantages, explore, sequences, logged | watch.laps)


def sft_step(trainer: Trainer, examples: list[Example], lr: float,
             inputs: Iterable[Inputs] | None = None) -> Step:
    """The SFT baseline: imitate the references of P prompts (Eq. 1)."""
    policy, P, watch = trainer.policy, len(examples), runs.Stopwatch()
    own = parallel.share(P)
    examples = examples[own.start:own.stop]
    sequences = []
    for i, example in enumerate(examples):
        sequences.append(Sequence(i, target_ids(policy, example), 1 / P, False))
    # SFT takes K times as many prompts as DyME: encoded one micro-batch at a time they fit.
    logged = update(trainer, encoded(trainer, examples, inputs), sequences, {}, lr)
    watch.lap("seconds_update")
    explore = torch.zeros(len(examples), dtype=torch.bool)
    return Step(examples, None, None, explore, sequences, logged | watch.laps)


def encoded(trainer: Trainer, examples: list[Example],
            inputs: Iterable[Inputs] | None) -> Iterator[Inputs]:
    """This process's micro-batches on the device; encoded here if none were prepared."""
    cfg, policy = trainer.cfg, trainer.policy
    if inputs is None:
        chunks = parallel.chunks(examples, cfg.micro_batch)
        inputs = (encode_prompts(policy, chunk, cfg.max_new_tokens) for chunk in chunks)
    yield from (feed.to_device(x, policy.device) for x in inputs)


def receive_inputs(trainer: Trainer, examples: list[Example],
                   inputs: Iterable[Inputs] | None) -> list[Inputs]:
    """All micro-batches. If one process cannot encode a prompt, all raise its UserError."""
    with parallel.errors_shared():
        return list(encoded(trainer, examples, inputs))


def adjust_for_ablations(trainer: Trainer, sequences: list[Sequence], examples: list[Example],
                         step: int) -> list[Sequence]:
    """The weights of `--released-code`, the targets that `--switch anneal` adds."""
    cfg = trainer.cfg
    if cfg.released_code:
        sequences = ablations.released_weights(sequences, cfg.generations)
    if cfg.switch == "anneal":
        weight = ablations.anneal_weight(step / cfg.steps) / cfg.prompts
        for i, example in enumerate(examples):
            sequences.append(Sequence(i, target_ids(trainer.policy, example), weight, False))
    return sequences


def update(trainer: Trainer, inputs: Iterable[Inputs], sequences: list[Sequence],
           totals: dict[str, float], lr: float) -> dict[str, Any]:
    """Eq. 8: add up the gradients of all sequences, and take an optimiser step; metrics."""
    # Advantage 0 teaches nothing: left out, a collapsed group costs no forward pass and no update.
    sequences = [s for s in sequences if s.weight or s.kl_weight]
    totals |= metrics.target_totals(sequences)
    if trainer.helper:
        totals |= trainer.helper.take_counts()
    with parallel.errors_shared():
        totals |= accumulate_gradients(trainer, inputs, sequences)
    # Summed over all processes, so that all decide alike whether to skip the step.
    totals = parallel.sum_numbers(totals)
    logged = metrics.averages(totals)
    if totals["sequences"]:
        logged |= apply_gradients(trainer, totals["loss"], lr)
    return logged


def accumulate_gradients(trainer: Trainer, inputs: Iterable[Inputs],
                         sequences: list[Sequence]) -> dict[str, float]:
    """Backward through every micro-batch; this process's part of the loss and the KL."""
    # Weights are divided by the whole step's K and P, so any micro-batch gives the same gradient.
    # Means of micro-batches, averaged again, would be wrong where these differ in size.
    cfg, policy = trainer.cfg, trainer.policy
    total_loss, total_kl, first = 0.0, 0.0, 0
    for x in inputs:
        size = len(x["input_ids"])
        chosen = [s for s in sequences if first <= s.prompt < first + size]
        prompts = [s.prompt - first for s in chosen]
        first += size
        if not chosen:
            continue
        logprobs, mask, explore = sequence_logprobs(
            policy, policy.model, x, prompts, chosen, cfg.temperature)
        weights = torch.tensor([s.weight for s in chosen], device=policy.device)
        loss = policy_loss(logprobs, mask, weights, explore)
        if trainer.reference is not None and chosen[0].explore:  # Eq. 3, for the baselines
            with torch.no_grad():
                frozen, *_ = sequence_logprobs(
                    policy, trainer.reference, x, prompts, chosen, cfg.temperature)
            kl_weights = torch.tensor([s.kl_weight for s in chosen], device=policy.device)
            kl = (kl_weights * token_mean(kl_estimate(logprobs, frozen), mask)).sum()
            loss, total_kl = loss + kl, total_kl + kl.item() / cfg.beta
        trainer.scaler.scale(loss).backward()
        total_loss += loss.item()
    return {"loss": total_loss, "kl": total_kl}


def apply_gradients(trainer: Trainer, loss: float, lr: float) -> dict[str, Any]:
    """Clip the gradient to norm 1 and step; if it or the loss is not finite, change nothing.

    Raises DivergedError after ten such steps in a row, a float16 scaler's search apart.
    """
    optimizer, scaler = trainer.optimizer, trainer.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr
    parallel.sum_gradients(trainer.policy.model.parameters())
    # Clipping comes after the sum over processes and the scaler: it is the true gradient's norm.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainer.policy.model.parameters(), 1.0).item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    # If the gradient overflows in float16, the scaler is called all the same: it skips the step,
    # and lowers its scale.
    if finite or (scaler.is_enabled() and not math.isfinite(norm)):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if finite:
        trainer.failures = 0
    elif not (scaler.is_enabled() and scaler.get_scale() >= 1):
        trainer.failures += 1
    if trainer.failures == 10:
        raise DivergedError("ten steps in a row had a loss or gradient that was not finite; "
                            "try a lower --lr")
    return {"grad_norm": norm, "skipped_steps": int(not finite)}


# ---- Evaluation: answers to held-out rows --------------------------------------------------------


def respond(policy: Policy, examples: list[Example], max_new_tokens: int, batch: int,
            draws: int = 0, temperature: float = 1.0, seed: int = 0,
            prompt: str = PROMPT) -> list[dict[str, Any]]:
    """Judged answers to rows, one greedy or `draws` sampled each; processes share them."""
    K, own, judged = draws or 1, parallel.share(len(examples)), []
    parts = [*parallel.chunks(own, batch)]

    def encode(part: range, processor: Any) -> Inputs:
        batch = [examples[i] for i in part]
        return encode_ahead(policy, batch, processor, max_new_tokens, prompt)

    quiet = True if len(parts) < 2 or not parallel.is_main() else None
    stream = feed.in_threads(encode, policy.processor, parts, ahead=4)
    with parallel.errors_shared(), contextlib.closing(stream):
        for part in tqdm(parts, "answering", ncols=80, leave=False, disable=quiet):
            inputs = feed.to_device(next(stream), policy.device)
            uniforms = keyed_uniforms(seed, 0, part, K, max_new_tokens)
            rolled = rollout(policy, [inputs], uniforms, temperature if draws else 0.0)
            for i, response in enumerate(decode(policy, rolled)):
                row = thinking.judge(examples[part[i // K]], response.text, response.finished)
                judged.append(row | {"length": len(response.ids)})
    return [*itertools.chain(*parallel.gather(judged))]


def evaluate(trainer: Trainer, held_out: list[Example], run: Path, step: int, board: Any) -> None:
    """Answer held-out rows greedily, log it, and keep the best weights so far."""
    batch = 4 * trainer.cfg.micro_batch  # without gradients there is room for more
    predictions = respond(trainer.policy, held_out, trainer.cfg.max_new_tokens, batch)
    if not parallel.is_main():
        return
    summary = thinking.summarise(predictions)
    files.write_jsonl(run / f"held-out-{step}.jsonl", predictions)
    runs.record(run / "evaluations.jsonl", {"step": step} | summary, board)
    tqdm.write(f"step {step}: " + thinking.one_line(summary))
    if step and summary["accuracy"] > trainer.best:
        trainer.best = summary["accuracy"]
        save_policy(trainer.policy, run / "best")


# ---- Checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(run: Path, trainer: Trainer, step: int) -> None:
    """Write `checkpoint/`: a transformers directory and the training state."""
    if not runs.may_save(trainer.failures, ended=step == trainer.cfg.steps):
        return
    helper = trainer.helper
    state = {
        "step": step, "failures": trainer.failures, "best": trainer.best,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "kept": {"buffer": [(e.name, e.trace) for e in trainer.buffer],
                 "examples": [*helper.examples] if helper else []},
    }
    save_policy(trainer.policy, run / "checkpoint", state)


def save_policy(policy: Policy, final: Path, state: dict[str, Any] | None = None) -> None:
    """Write a transformers directory, if its weights are finite."""
    runs.check_weights(policy.model)
    with files.replaced_folder(final) as folder:
        policy.model.save_pretrained(folder)
        policy.processor.save_pretrained(folder)
        if state:
            torch.save(state, folder / "training_state.pt")


def load_checkpoint(run: Path, trainer: Trainer, examples: list[Example]) -> int:
    """Restore what is not in the weights (`load_policy` has loaded those); the next step.

    No random state is kept: sampling and data order are functions of (seed, step).
    """
    state = runs.read_state(run, trainer.optimizer, trainer.policy.device)
    if state["scaler"] and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.failures, trainer.best = state["failures"], state.get("best", -1.0)
    by_name = {example.name: example for example in examples}
    for name, hint in state["kept"]["buffer"]:
        trainer.buffer.append(replace(by_name[name], trace=hint))
    if trainer.helper:
        trainer.helper.examples.extend(state["kept"]["examples"])
    return state["step"]


# ---- The run -------------------------------------------------------------------------------------


def make_trainer(cfg: Config, policy: Policy) -> Trainer:
    """Set up what trains."""
    if not cfg.train_vision:
        # Only the tower is frozen: the connector to the language model must learn with it.
        vision.freeze(policy.model)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    # One fused kernel: eight times as fast as a loop over parameters, on the CPU too.
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.01, fused=True)
    scaler = parallel.gradient_scaler(policy.device)
    helper = full_dyme.open_helper(cfg, policy.tokenizer)
    return Trainer(cfg, policy, optimizer, scaler, helper=helper)


def load_reference(trainer: Trainer, run: Path, step: int) -> Model:
    """The KL's reference: the base; in two-stage, as released, the model after SFT."""
    cfg, after_sft = trainer.cfg, run / "after-sft"
    with parallel.errors_shared():  # nobody reads it before it is written
        begins = cfg.mode == "two-stage" and step == cfg.sft_steps
        if begins and parallel.is_main():
            save_policy(trainer.policy, after_sft)
    # A resumed run finds it there. Runs begun before it was kept go on with the base.
    source = str(after_sft) if after_sft.exists() else cfg.model
    model = load_policy(source, trainer.policy.device).model
    return model.requires_grad_(False)


def schedule(cfg: Config, step: int) -> tuple[str, float]:
    """Method and learning rate of a step: in each stage warm-up, then linear decay."""
    method, first, last = cfg.mode, 0, cfg.steps
    if cfg.mode == "two-stage":
        if step < cfg.sft_steps:
            method, last = "sft", cfg.sft_steps
        else:
            method, first = "grpo", cfg.sft_steps
    # A short stage must not be all warm-up.
    warmup = min(cfg.warmup, (last - first) // 2)
    rise = (step - first + 1) / (warmup + 1)
    fall = (last - step) / (last - first - warmup)
    return method, cfg.lr * min(rise, fall, 1.0)


def step_rows(cfg: Config, step: int, count: int) -> list[int]:
    """Which of `count` rows a step takes, by (seed, step) alone; shuffled by epoch."""
    # An SFT step takes K times as many rows, to train on as many responses as the other steps.
    sft_before = {"sft": step, "two-stage": min(step, cfg.sft_steps)}.get(cfg.mode, 0)
    start = cfg.prompts * (step - sft_before) + cfg.prompts * cfg.generations * sft_before
    size = cfg.prompts * (cfg.generations if schedule(cfg, step)[0] == "sft" else 1)
    return feed.shuffled_rows(cfg.seed, count, range(start, start + size))


def feed_prompts(trainer: Trainer, examples: list[Example], steps: range) -> Iterator[Inputs]:
    """This process's encoded micro-batches; threads prepare the next step's meanwhile."""
    cfg = trainer.cfg

    def jobs() -> Iterator[list[Example]]:
        for step in steps:
            batch = [examples[i] for i in step_rows(cfg, step, len(examples))]
            own = parallel.share(len(batch))
            yield from parallel.chunks(batch[own.start:own.stop], cfg.micro_batch)

    def encode(part: list[Example], processor: Any) -> Inputs:
        if trainer.helper:  # visual facts too are asked for while the step before runs
            trainer.helper.fetch_facts(part)
        return encode_ahead(trainer.policy, part, processor, cfg.max_new_tokens)

    ahead = max(4, micro_batches(cfg, cfg.prompts))
    return feed.in_threads(encode, trainer.policy.processor, jobs(), ahead)


def trial_update(trainer: Trainer, examples: list[Example]) -> None:
    """Forward and backward with responses of full length, for their memory alone."""
    cfg, policy, sequences = trainer.cfg, trainer.policy, []
    inputs = encode_prompts(policy, examples, cfg.max_new_tokens)
    for i in range(len(examples)):
        ids = [policy.pad_id] * cfg.max_new_tokens
        sequences += [Sequence(i, ids, 0.0, True)] * cfg.generations
    accumulate_gradients(trainer, [inputs], sequences)
    trainer.optimizer.zero_grad()


def micro_batches(cfg: Config, prompts: int) -> int:
    """How many micro-batches this process makes of a step of so many prompts."""
    return math.ceil(len(parallel.share(prompts)) / cfg.micro_batch)


def train(cfg: Config) -> None:
    """Carry out a run in its folder, where no other process may be."""
    if not cfg.resume:
        models.find(cfg.model)  # before its data is downloaded
    with runs.opened(cfg) as (examples, held_out):
        carry_out(cfg, examples, held_out)


def carry_out(cfg: Config, examples: list[Example], held_out: list[Example]) -> None:
    """Load, evaluate, train, evaluate, and say where everything is."""
    run, device = Path(cfg.out), parallel.select_device(cfg.device)
    # Without a checkpoint yet, a resumed run starts from the beginning.
    resumed = cfg.resume and (run / "checkpoint").exists()
    policy = load_policy(str(run) if resumed else cfg.model, device, cfg.image_edge)
    examples = references.check(examples, policy, lambda example: full_length(policy, example))
    trainer = make_trainer(cfg, policy)
    with parallel.errors_shared():
        if trainer.helper:
            trainer.helper.check_server()
    step = load_checkpoint(run, trainer, examples) if resumed else 0
    if not cfg.micro_batch:
        cfg.micro_batch = memory.choose_micro_batch(trial_update, trainer, examples)
    with parallel.errors_shared():  # nobody goes on before the folder is ready
        runs.begin(cfg, step, examples, held_out)
    runs.print_start(cfg, device, len(examples), len(held_out), step)
    board = runs.open_board(cfg.tensorboard, run, step)

    if not files.read_jsonl(run / "evaluations.jsonl"):
        evaluate(trainer, held_out, run, step, board)
    if not train_loop(trainer, examples, held_out, run, step, board):
        runs.print_stopped(run)
        raise KeyboardInterrupt
    runs.print_summary(run, cfg.mode, cfg.steps)


def train_loop(trainer: Trainer, examples: list[Example], held_out: list[Example], run: Path,
               first: int, board: Any) -> bool:
    """Take the steps from `first` on, evaluate and save; False if interrupted."""
    cfg = trainer.cfg
    stream = feed_prompts(trainer, examples, range(first, cfg.steps))
    bar = runs.progress_bar(cfg.mode, first, cfg.steps)
    with (bar, runs.finish_step_on_interrupt() as interrupted, contextlib.closing(stream),
          trainer.helper or contextlib.nullcontext()):
        for step in range(first, cfg.steps):
            method, lr = schedule(cfg, step)
            if cfg.beta and method == "grpo" and trainer.reference is None:
                trainer.reference = load_reference(trainer, run, step)
            batch = [examples[i] for i in step_rows(cfg, step, len(examples))]
            inputs = itertools.islice(stream, micro_batches(cfg, len(batch)))
            try:
                # A frozen tower encodes the step's images once, for sampling and for the update.
                with vision.once(trainer.policy.model, trainer.features, cfg.vision_cache):
                    done = take_step(trainer, batch, step, method, lr, inputs)
            except UserError:  # an unusable row must not cost the steps before it
                save_checkpoint(run, trainer, step)
                raise
            logged = {"step": step, "method": method, "lr": lr} | done.metrics
            logged |= metrics.speed(logged, trainer.policy.device)
            shown = samples.describe(step, done, trainer.policy.tokenizer)
            runs.log_step(run, logged, shown, board)
            runs.advance(bar, f"{cfg.mode} {step + 1}/{cfg.steps}", logged)

            ended, stop = step + 1 == cfg.steps, any(parallel.gather(bool(interrupted)))
            # Evaluate before the save: a resumed run then repeats what is missing.
            if ended or (cfg.eval_every and (step + 1) % cfg.eval_every == 0):
                evaluate(trainer, held_out, run, step + 1, board)
            if ended or stop or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                save_checkpoint(run, trainer, step + 1)
            if stop and not ended:
                return False
    return True


def take_step(trainer: Trainer, batch: list[Example], step: int, method: str, lr: float,
              inputs: Iterable[Inputs] | None = None) -> Step:
    """A step by `method`: dyme, grpo (which explores in any case) or sft."""
    rule = trainer.cfg.switch if method == "dyme" else "explore"
    if method == "sft":
        return sft_step(trainer, batch, lr, inputs)
    done = train_step(trainer, batch, step, lr, rule, inputs)
    if rule.startswith("budget:"):
        done.metrics |= ablations.memorize_failures(
            trainer.buffer, done, rule, lambda failed: sft_step(trainer, failed, lr).metrics)
    return done


def main() -> None:
    """Read the settings, join other processes if there are any, and train."""
    cfg = parse_config()
    with parallel.processes(cfg.device):
        train(cfg)


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
