"""The two jobs of dyme.py that take the time, done faster: `rollout` and `sequence_logprobs`.

    policy = fast.speed_up(policy)  # the same policy with these in the place of the plain ones

Values, sampled ids and gradients are those of dyme.py, up to rounding (test_fast.py). What differs:
the K responses of a prompt share one copy of its keys and values, as one row of K parallel
tokens when sampling, and in the update as a tree, in which what they begin with alike is run once;
query heads that share keys do so without copies; images are encoded once for both; a step of
decoding is recorded and replayed, on CUDA as a graph, on a CPU as TorchScript; on an x86 processor
oneDNN multiplies.

Shapes as in dyme.py; R packed rows of Q tokens, M predictions; H query heads in G groups.
"""

import contextlib
import copy
import functools
import itertools
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import dyme
from dyme import Inputs, Model, Policy, Prefix, Response, Samples, Sequence
from support import parallel, runs


def speed_up(policy: Policy) -> Policy:
    """The same policy, faster; as it is where its model does something that is not known here."""
    model, faster = policy.model, replace(policy, rollout=rollout, logprobs=sequence_logprobs)
    if hasattr(model, "sped_up"):
        return faster
    config = model.config.get_text_config()
    before = config._attn_implementation
    kinds = {*(getattr(config, "layer_types", None) or [])}
    try:
        expected = trial_logprobs(policy)
        use_grouped_attention(model)
        if kinds - {"full_attention"} or not kinds and getattr(config, "sliding_window", None):
            raise NotImplementedError("layers without full attention")
        difference = (trial_logprobs(faster) - expected).abs().max().item()
        if not difference < 0.05:
            raise ArithmeticError(f"log-probs differ by {difference:.2g}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - models fail in many ways, and all mean the same here
        config._attn_implementation = before
        tqdm.write(f"going on as with --plain: {type(error).__name__}: {error}", file=sys.stderr)
        return policy
    encode_images_once(model)
    use_onednn(model)
    model.sped_up = True
    return faster


@torch.no_grad()
def trial_logprobs(policy: Policy) -> Tensor:
    """Log-probs, (2, 4), of two short sequences after a prompt of three tokens, in float32."""
    policy = replace(policy, autocast=contextlib.nullcontext)
    ids = torch.arange(10, 13, device=policy.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sequences = [Sequence(0, [13, 14, 15, 16], 1.0, True), Sequence(0, [17, 18], 1.0, True)]
    return policy.logprobs(policy, policy.model, inputs, [0, 0], sequences, 1.0)[0]


# ---- Several responses in one row: keys and values of a prompt are shared ------------------------


def extend(model: Model, prefix: Prefix, ids: Tensor, offsets: Tensor, visible: Tensor) -> Tensor:
    """Run tokens `ids: (P, Q)` of several responses to a prompt as one row; states (P, Q, D).

    They stand at `offsets: (P, Q)` from the prompt's end. Each sees its prompt and, of the Q'
    response tokens in the cache by then, those that `visible: (P, Q, Q')` marks: its own response.
    """
    # So K responses share one copy of their prompt; K would take K times its memory and time.
    prompt = prefix.mask.bool()[:, None, None].expand(-1, 1, ids.shape[1], -1)  # (P, 1, Q, L)
    visible = torch.cat([prompt, visible[:, None]], dim=3)  # (P, 1, Q, L + Q')
    mask = additive_mask(visible, model.config.get_text_config(), prefix.hidden.dtype)
    out = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=prefix.position + offsets,
        cache=prefix.cache, use_cache=True)
    return out.last_hidden_state


# ---- Sampling ------------------------------------------------------------------------------------


def rollout(policy: Policy, inputs: Iterable[Inputs], uniforms: Tensor, K: int,
            temperature: float) -> list[Response]:
    """`dyme.rollout`, with the responses of all micro-batches sampled together."""
    model, uniforms = policy.model, uniforms.to(policy.device)
    with torch.no_grad(), policy.autocast():
        prefixes = [dyme.encode_prefix(model, x) for x in inputs]
        with packed_weights(model, len(uniforms)):
            samples = Decoder(policy, prefixes, uniforms, temperature).sample()
    return dyme.decode(policy, samples)


class Decoder:
    """K responses to each of P prompts, a token at a time; N = P*K responses of up to T tokens.

    Every buffer is written in place, so that a step can be recorded as a CUDA graph.
    """

    def __init__(self, policy: Policy, prefixes: list[Prefix], uniforms: Tensor,
                 temperature: float) -> None:
        """Start from the prompts; uses up the prefixes."""
        (N, T), device = uniforms.shape, uniforms.device
        self.P = sum(len(prefix.mask) for prefix in prefixes)
        self.K = N // self.P
        self.model, self.pad_id = policy.model, policy.pad_id
        self.end_ids = torch.tensor(policy.end_ids, dtype=torch.long, device=device)
        self.uniforms, self.temperature = uniforms, temperature

        # Token `t` of every response is the newest. Response k keeps its token t in column
        # t K + k after the longest prompt. The last token is never fed back, hence T - 1.
        self.longest = max(prefix.mask.shape[1] for prefix in prefixes)
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        columns = torch.arange(self.K * (T - 1), device=device)
        first = torch.arange(self.K, device=device)
        # The t from which on response k sees a column; T if another's tokens are in it.
        self.since = torch.where(columns % self.K == first[:, None], columns // self.K, T)
        self.slots = self.longest + first  # where the cache keeps token t
        self.prefix = merge(prefixes, len(columns), self.slots)

        self.ids = torch.full((N, T), self.pad_id, device=device)
        self.entropy = torch.zeros(N, T, device=device)
        self.rows = torch.arange(N, device=device)  # the responses that are still sampled
        self.alive = torch.ones(N, dtype=torch.bool, device=device)  # of these

    def sample(self) -> Samples:
        """Sample until all have ended: as many tokens as the longest response has."""
        on_cuda = self.uniforms.is_cuda
        step = self.step if on_cuda else without_python(self)
        block = 128 if on_cuda else 1  # tokens by which attention is widened at a time
        logits = dyme.next_logits(self.model, self.prefix.hidden)  # (P, V)
        self.choose(logits.repeat_interleave(self.K, 0))  # the prompt predicts the first token
        for i in range(1, self.uniforms.shape[1]):
            # Asking whether all have ended makes the CPU wait for the GPU: there every 16 tokens.
            if (i % 16 == 1 or not on_cuda) and not self.alive.any():
                break
            if i % 16 == 1 and not on_cuda:  # a CUDA graph is bound to its shapes
                self.leave_out_finished()
            widens = (i - 1) % block == 0
            if widens:
                self.widen(i - 1 + block)
            # A graph is bound to its shapes: one for each width. The first two steps run plainly:
            # they warm up, and cast the weights.
            if on_cuda and (i == 3 or (widens and i > 3)):
                step = capture(self.model, self.step)
            step()
        ends = torch.isin(self.ids, self.end_ids).long()
        mask = (ends.cumsum(1) == ends).long()  # up to the first end token
        T = int(mask.sum(1).max())
        return Samples(self.ids[:, :T], mask[:, :T], self.entropy[:, :T], ends.any(1))

    def leave_out_finished(self) -> None:
        """Go on without the prompts whose responses have all ended, once they are half of all."""
        alive = self.alive.view(self.P, self.K)
        kept = alive.any(1).nonzero().squeeze(1)
        if 2 * len(kept) > self.P:
            return
        self.rows = self.rows.view_as(alive)[kept].flatten()
        self.alive = alive[kept].flatten()
        prefix, self.P = self.prefix, len(kept)
        prefix.mask, prefix.position = prefix.mask[kept], prefix.position[..., kept, :]
        for layer in prefix.cache.layers:
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]

    def widen(self, tokens: int) -> None:
        """Limit attention to the first `tokens` positions; later ones are still empty."""
        self.open = min(self.K * tokens, self.since.shape[1])
        for layer in self.prefix.cache.layers:
            layer.end = self.longest + self.open

    def choose(self, logits: Tensor) -> None:
        """Draw token t of every response; those that have ended get padding."""
        token, entropy = dyme.draw(logits, self.uniforms[self.rows, self.t], self.temperature)
        token = token.masked_fill(~self.alive, self.pad_id)
        self.ids[self.rows, self.t] = token
        self.entropy[self.rows, self.t] = entropy
        self.alive.logical_and_((token[:, None] != self.end_ids).all(1))

    def step(self) -> None:
        """Feed token t of every response to the model, then choose token t + 1."""
        tokens = self.ids[self.rows, self.t].view(-1, self.K)  # (P, K)
        # Response k sees its own tokens so far.
        visible = (self.since[:, :self.open] <= self.t).expand(tokens.shape[0], -1, -1)
        offsets = self.t.expand_as(tokens)
        hidden = extend(self.model, self.prefix, tokens, offsets, visible)  # (P, K, D)
        self.t.add_(1)
        self.slots.add_(self.K)
        self.choose(dyme.next_logits(self.model, hidden.flatten(0, 1)))


class Slots(DynamicLayer):
    """A layer's keys and values while decoding: the prompts', then room for new tokens.

    They are written in place: a cache that grows is copied for every token, and a CUDA graph is
    bound to its addresses.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values  # (P, G, L + room, D)
        self.slots = slots  # (K,) shared by all layers: where the K tokens of this step go
        self.end = keys.shape[2]  # so much of the room is attended to: the rest is still empty

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any,
               **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values of the new tokens, (P, G, K, D); all keys and values so far."""
        self.keys.index_copy_(2, self.slots, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slots, value_states.to(self.values.dtype))
        return self.keys[:, :, :self.end], self.values[:, :, :self.end]


def merge(prefixes: list[Prefix], room: int, slots: Tensor) -> Prefix:
    """Put prompts of all micro-batches side by side, with `room` for new tokens; uses them up."""
    longest = max(prefix.mask.shape[1] for prefix in prefixes)

    def join(parts: list[Tensor]) -> Tensor:
        """Pad `parts`, (P_i, G, L_i, D) each, and join them to (P, G, longest + room, D)."""
        # Keys come in float32 (from the rotary embedding), values in half precision.
        padded = [F.pad(in_precision(x), (0, 0, longest - x.shape[2], room)) for x in parts]
        return torch.cat(padded)

    layers = []
    for same_layer in zip(*(prefix.cache.layers for prefix in prefixes), strict=True):
        keys = join([layer.keys for layer in same_layer])
        values = join([layer.values for layer in same_layer])
        layers.append(Slots(keys, values, slots))
        for layer in same_layer:  # freed before the next layer's copy is made
            layer.keys = layer.values = None
    # Padding is on the left.
    masks = [F.pad(prefix.mask, (longest - prefix.mask.shape[1], 0)) for prefix in prefixes]
    hidden = torch.cat([prefix.hidden for prefix in prefixes])
    position = torch.cat([prefix.position for prefix in prefixes], dim=-2)
    return Prefix(Cache(layers=layers), hidden, torch.cat(masks), position)


# ---- Log-probs -----------------------------------------------------------------------------------


def sequence_logprobs(policy: Policy, model: Model, inputs: Inputs, prompts: list[int],
                      sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor]:
    """`dyme.sequence_logprobs`, with the sequences of a prompt packed in rows, as trees."""
    device = policy.device
    # Attention grows with the square of a row's length: it is kept no longer than the prompt.
    limit = inputs["input_ids"].shape[1]
    row_prompts, rows, states = pack(prompts, [s.ids for s in sequences], limit)
    packed = [torch.tensor(row, dtype=torch.long).T for row in rows]
    ids, offsets, ends = pad_sequence(packed, batch_first=True).to(device).unbind(2)  # (R, Q) each
    # What several sequences predict from the same state is computed once: M log-probs for them all.
    distinct: dict[tuple[int, int, int, bool], int] = {}
    places = [torch.tensor([distinct.setdefault((row, column, token, s.explore), len(distinct))
                            for column, token in zip(columns, s.ids, strict=True)])
              for (row, columns), s in zip(states, sequences, strict=True)]
    state_row, state_column, predicted, sampled = zip(*distinct, strict=True)  # M each

    with policy.autocast():
        prefix = dyme.encode_prefix(model, inputs, torch.tensor(row_prompts, device=device))
        hidden = prefix.hidden[:, None]  # (R, 1, D)
        if ids.shape[1]:
            # A token sees its prompt, itself, and the tokens before it that it follows in its tree.
            column = torch.arange(ids.shape[1], device=device)[:, None]  # (Q, 1)
            follows = (column < ends[:, None, :]).tril()  # (R, Q, Q)
            new = extend(model, prefix, ids, offsets, follows)
            hidden = torch.cat([hidden, new], dim=1)  # (R, 1 + Q, D)
        at = torch.tensor([temperature if s else 1.0 for s in sampled], device=device)  # (M,)
        logprobs = token_logprobs(model, hidden[state_row, state_column],
                                  torch.tensor(predicted, device=device), at)
    mask = pad_sequence([torch.ones_like(place) for place in places], batch_first=True).to(device)
    place = pad_sequence(places, batch_first=True).to(device)  # (N, T)
    return logprobs[place] * mask, mask


def token_logprobs(model: Model, hidden: Tensor, ids: Tensor, temperature: Tensor,
                   chunk: int = 1024) -> Tensor:
    """Log-probs (M,) of tokens `ids: (M,)` after states `hidden: (M, D)`."""

    def part(hidden: Tensor, ids: Tensor, temperature: Tensor) -> Tensor:
        logits = dyme.next_logits(model, hidden).div_(temperature[:, None])  # (M, V)
        return -F.cross_entropy(logits, ids, reduction="none")

    if len(ids) <= chunk:
        return part(hidden, ids, temperature)
    # Logits are made for `chunk` tokens at a time, and once more in the backward pass, so that all
    # M of them (gigabytes in float32) never exist at once.
    pieces = zip(*(x.split(chunk) for x in (hidden, ids, temperature)), strict=True)
    again = functools.partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*piece) for piece in pieces])


def pack(prompts: list[int], sequences: list[list[int]], limit: int) -> tuple[list, list, list]:
    """Lay sequences of ids that continue `prompts` out as trees, in rows of up to `limit` tokens.

    Returns the prompt of every row; its tokens: their ids, distances from the prompt's end, and the
    column after the last that follows each; and of every sequence the row and the columns of the
    states that predict its tokens.
    """
    # Sequences that begin alike share these tokens, and those of a row a copy of their prompt. A
    # policy that is sure of itself samples the same several times.
    row_prompts: list[int] = []
    rows: list[tuple[list[int], list[int], list[int]]] = []
    states: list[tuple[int, list[int]]] = [(0, [])] * len(sequences)
    path: list[int] = []  # where the tokens of the sequence before stand
    before: list[int] = []
    # All rows will be padded to the longest: as long as that they may be in any case.
    limit = max(limit, *(len(ids) - 1 for ids in sequences))
    # In this order whatever a sequence shares with any before, it shares with the last.
    for n in sorted(range(len(prompts)), key=lambda n: (prompts[n], sequences[n])):
        fed = sequences[n][:-1]  # nothing is predicted from a sequence's last token
        shared = 0
        while shared < min(len(before), len(fed)) and before[shared] == fed[shared]:
            shared += 1
        full = not rows or len(rows[-1][0]) + len(fed) - shared > limit
        if full or row_prompts[-1] != prompts[n]:
            row_prompts.append(prompts[n])
            rows.append(([], [], []))
            shared = 0
        ids, offsets, ends = rows[-1]
        path = path[:shared] + [*range(len(ids), len(ids) + len(fed) - shared)]
        ids += fed[shared:]
        offsets += range(shared, len(fed))
        ends += [0] * (len(fed) - shared)
        for column in path:
            ends[column] = len(ids)
        # Column 0 of the states is the prompt's last, which predicts token 0.
        states[n] = (len(rows) - 1, [0, *(column + 1 for column in path)])
        before = fed
    return row_prompts, rows, states


# ---- Attention: query heads that share keys and values, with a mask, without copies --------------
# transformers repeats keys and values for every query head as soon as there is a mask: in decoding
# that is the whole cache, in every layer, for every token (7 times the memory traffic on
# SmolVLM-256M).


def use_grouped_attention(model: Model) -> None:
    """Let the language model attend by `grouped_attention`, which has groups; towers by head."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", grouped_mask)
    model.config.get_text_config()._attn_implementation = "grouped"
    AttentionInterface.register("by_head", attention_by_head)
    AttentionMaskInterface.register("by_head", sdpa_mask)
    for tower in dyme.vision_towers(model):
        tower.config._attn_implementation = "by_head"


def grouped_attention(module: Model, query: Tensor, key: Tensor, value: Tensor,
                      mask: Tensor | None, scaling: float | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v, (B, Q, H, D), of q (B, H, Q, D), k and v (B, G, S, D).

    The H/G heads of a group share its keys: they are treated as H/G times Q queries of one head,
    for which the mask, (B, 1, H/G Q, S) from `additive_mask`, has a row each.
    """
    if mask is None:  # causal, which the kernels know by themselves, groups included
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    B, H, Q, D = query.shape
    folded = query.reshape(B, key.shape[1], -1, D)  # (B, G, H/G Q, D)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, H, Q, -1).transpose(1, 2).contiguous(), None


def attention_by_head(module: Model, query: Tensor, key: Tensor, value: Tensor,
                      attention_mask: Tensor | None = None, scaling: float | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:
    """softmax(q k^T scaling) v, (B, Q, H, D), of a frozen vision tower; q, k and v (B, H, Q, D)."""
    bf16 = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    many = query.shape[2] >= 512  # patches; Qwen's windows have 64
    if attention_mask is not None or torch.is_grad_enabled() or not (bf16 and many):
        return sdpa_attention_forward(module, query, key, value, attention_mask,
                                      scaling=scaling, **kwargs)
    out = torch.empty_like(query.transpose(1, 2))
    for i, head in itertools.product(*map(range, query.shape[:2])):
        # Scores of one head stay in the processor's cache: half the time of PyTorch's kernel.
        scores = query[i, head] * scaling @ key[i, head].T  # (Q, Q)
        out[i, :, head] = scores.softmax(1) @ value[i, head]
    return out, None


def grouped_mask(*args: Any, config: Any, dtype: torch.dtype = torch.float32,
                 **kwargs: Any) -> Tensor | None:
    """The mask of a pass as transformers describes it, in the form for `grouped_attention`."""
    visible = sdpa_mask(*args, config=config, dtype=dtype, **kwargs)
    return None if visible is None else additive_mask(visible, config, dtype)


def additive_mask(visible: Tensor, config: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """What to add to scores, (B, 1, H/G Q, S): 0 where `visible: (B, 1, Q, S)`, else the lowest."""
    # Made once for all layers: from a mask of booleans each would make, and keep, its own.
    device = visible.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    repeats = config.num_attention_heads // config.num_key_value_heads
    B, _, Q, S = visible.shape
    # CUDA's kernels copy a mask whose rows are not a multiple of 8 apart.
    mask = torch.zeros(B, 1, repeats, Q, -(-S // 8) * 8, dtype=dtype, device=visible.device)
    mask = mask[..., :S].masked_fill_(~visible[:, :, None], torch.finfo(dtype).min)
    return mask.flatten(2, 3)


# ---- A frozen vision tower runs once per batch of images -----------------------------------------


def encode_images_once(model: Model) -> None:
    """Keep a frozen tower's output for a batch, from sampling to the update, with its pixels.

    A tower with a part that trains, such as Qwen's with its connector inside, runs every time.
    """
    # What is kept is the tower's output *before* the connector. Kept after it, the connector would
    # get no gradient: it would be frozen too, without a word.
    kept = WeakTensorKeyDictionary()  # for as long as the pixels live, and for these alone
    pixels: list[Tensor | None] = [None]
    calls = [0]  # in this pass: DeepSeek-OCR-2 encodes an image whole, then its crops

    def remember_pixels(_: Model, __: Any, inputs: dict[str, Any]) -> None:
        pixels[0], calls[0] = inputs.get("pixel_values"), 0

    def in_order(_: Model, __: Any, patches: Any) -> Any:
        # They come transposed, and every norm after them would copy them.
        return patches.contiguous() if isinstance(patches, Tensor) else patches

    def encode(tower: Model, *args: Any, **kwargs: Any) -> Any:
        key = pixels[0]
        if key is None or any(p.requires_grad for p in tower.parameters()):
            return type(tower).forward(tower, *args, **kwargs)
        outputs, call = kept.setdefault(key, {}), calls[0]
        calls[0] += 1
        if call not in outputs:
            outputs[call] = type(tower).forward(tower, *args, **kwargs)
        return copy.copy(outputs[call])  # models write into the output that they are given

    model.base_model.register_forward_pre_hook(remember_pixels, with_kwargs=True)
    for tower in dyme.vision_towers(model):
        tower.forward = functools.partial(encode, tower)
        if embeddings := getattr(tower, "embeddings", None):
            embeddings.register_forward_hook(in_order)


# ---- CUDA graphs: a step of decoding is recorded once and replayed -------------------------------


@functools.cache
def recorder(device: int) -> SimpleNamespace:
    """A device's stream for recording, and the memory pool that its graphs share."""
    # torch.cuda.graph() would wait for the device and empty the allocator's cache every time.
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    # The latest graph is kept: without one alive the pool can't be recorded into again.
    return SimpleNamespace(stream=stream, pool=pool, latest=None)


def capture(model: Any, step: Callable[[], None]) -> Callable[[], None]:
    """Record a step that reads and writes fixed tensors alone; what to call in its place.

    If that fails, the step itself, now and ever after. Raises torch.OutOfMemoryError as such.
    """
    if hasattr(model, "uncapturable"):  # it failed before, and would fail again
        return step
    graph, own = torch.cuda.CUDAGraph(), recorder(torch.cuda.current_device())
    own.stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(own.stream):
            # Other threads, which prepare the next step's images, go on meanwhile.
            graph.capture_begin(pool=own.pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        # Where the step fails, ending the recording fails too: the first error is the cause.
        cause = error.__context__ or error
        recorder.cache_clear()  # its pool may be left open
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None  # a matter of memory, not of graphs
        model.uncapturable = True
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        tqdm.write(f"decoding without a CUDA graph, slowly: {reason}", file=sys.stderr)
        return step
    torch.cuda.current_stream().wait_stream(own.stream)
    own.latest = graph
    return graph.replay


# ---- TorchScript: on a CPU a step of decoding is recorded once for a model -----------------------
# Without Python in between, a step of the toy takes two thirds of the time.


def without_python(decoder: Decoder) -> Callable[[], None]:
    """A decoder's step as a program, recorded once for all decoders of a model.

    Forward hooks, and what else a model does in Python, run while it is recorded, and not again.
    """
    model, prefix, half = decoder.model, decoder.prefix, torch.is_autocast_enabled("cpu")
    packed = [layer for layer in model.modules() if getattr(layer, "packed", None) is not None]
    if half and not packed:  # a program would cast all weights for every token
        return decoder.step
    # Where a step finds its tensors. A program is given them anew each time, the weights too: what
    # it had recorded of them would not change with them.
    names = ("t", "since", "open", "slots", "rows", "alive", "ids", "entropy", "uniforms")
    places = [(vars(decoder), name) for name in names]
    places += [(vars(prefix), name) for name in ("mask", "position")]
    places += itertools.product(map(vars, prefix.cache.layers), ("keys", "values", "slots", "end"))
    places += [(vars(layer), "packed") for layer in packed]
    places += [(m._parameters, name) for m in model.modules()
               for name, p in m._parameters.items() if p is not None]
    # What else it depends on is recorded as it is.
    kind = (decoder.K, decoder.temperature, half, len(places), prefix.hidden.dtype,
            tuple(decoder.end_ids.tolist()), decoder.pad_id, dyme.draw)
    programs = vars(model).setdefault("programs", Programs())

    def put(values: Iterable[Any]) -> None:
        for (owner, name), value in zip(places, values, strict=True):
            owner[name] = value

    def run(*values: Tensor) -> Tensor:
        put(values)
        decoder.step()
        return decoder.t  # a program must return something

    def step() -> None:
        values = [owner[name] for owner, name in places]
        if kind not in programs:
            # A recording takes the step: on copies, but for the cache, where writing the same twice
            # does no harm.
            tensors = [*map(torch.as_tensor, values)]
            with runs.interrupts_held():  # a recording cut short can bring PyTorch down later
                programs[kind] = record(run, [x.clone() for x in tensors[:len(names)]]
                                        + tensors[len(names):])
                put(values)
        if programs[kind] is None:
            decoder.step()
        else:
            with torch.jit.optimized_execution(False):  # to optimize takes longer than it saves
                programs[kind](*map(torch.as_tensor, values))

    return step


class Programs(dict):
    """A model's recorded steps, which cannot be copied with it."""

    def __reduce__(self) -> tuple[type, tuple]:
        return Programs, ()


def record(run: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[..., Tensor] | None:
    """A function as TorchScript, or None if it does more than a sequence of operations."""
    once = [run]  # taken out: a program keeps what it was recorded from, here a decoder's cache
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # A number taken from a tensor, but for what PyTorch itself checks, would stay as it is.
            warnings.simplefilter("error", torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", module="torch.nn", category=torch.jit.TracerWarning)
            return torch.jit.trace(
                lambda *given: once.pop()(*given), tuple(tensors), check_trace=False)
    except Exception:  # noqa: BLE001 - models fail in many ways, and all mean the same here
        return None


# ---- Matrix products on a CPU --------------------------------------------------------------------
# For float32 PyTorch takes MKL. With AVX-512 on an AMD processor oneDNN was twice as fast; on one
# of Intel's, or with AVX2, it is a little slower. For few rows at a time, as in decoding, it is
# faster on all, if the weight is stored as it wants it (packed): else each call copies the weight.


@functools.cache
def onednn_is_faster() -> bool:
    """Does oneDNN multiply many rows of float32 faster than MKL on this processor?"""
    cpuinfo = Path("/proc/cpuinfo")
    name = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in name and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_onednn(model: Model, least: float = parallel.TINY) -> None:
    """Let linear layers multiply by oneDNN on an x86 processor, if there are `least` weights."""
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    large = model.num_parameters() >= least  # the toy keeps its rounding
    if x86 and large and model.device.type == "cpu":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear


@contextlib.contextmanager
def packed_weights(model: Model, rows: int) -> Iterator[None]:
    """For decoding `rows` tokens at a time: pack the weights outside the vision tower."""
    towers = {m for tower in dyme.vision_towers(model) for m in tower.modules()}
    layers = [m for m in model.modules() if type(m) is Linear and m not in towers]
    half = layers and torch.is_autocast_enabled("cpu")
    if half and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        layers = []  # with AVX2 alone oneDNN neither packs nor multiplies bf16
    try:
        for layer in layers:  # in bf16, autocast would cast them again for every token
            weight = in_precision(layer.weight.detach())
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        yield
    finally:  # the next step's weights are others
        for layer in layers:
            layer.packed = None


def in_precision(x: Tensor) -> Tensor:
    """The same values in the precision of the passes around."""
    device = x.device.type
    half = torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if half else x


class Linear(torch.nn.Linear):
    """A linear layer that multiplies by oneDNN, as PyTorch does by itself in bf16."""

    packed: Tensor | None = None  # the weight, while decoding

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: (..., D)` to (..., W)."""
        if self.packed is not None:
            bias = None if self.bias is None else in_precision(self.bias)
            multiply = scripted_product() if torch.jit.is_tracing() else product
            return multiply(in_precision(x), self.packed, bias)
        float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not float32 or x.numel() == 0 or not onednn_is_faster():
            return super().forward(x)
        y = Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class Product(torch.autograd.Function):
    """x w^T of `x: (..., D)` and `w: (W, D)`, with its gradients g w and g^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        """The product, (..., W)."""
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and w."""
        x, w = ctx.saved_tensors
        of_x = product(g, w.t()) if ctx.needs_input_grad[0] else None
        rows_g, rows_x = g.reshape(-1, len(w)), x.reshape(-1, w.shape[1])
        of_w = product(rows_g.t(), rows_x.t()) if ctx.needs_input_grad[1] else None
        return of_x, of_w


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T of `a: (..., D)` and `b: (N, D)`, (..., N), by oneDNN; needs no contiguous memory."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@functools.cache
def scripted_product() -> Callable[..., Tensor]:
    """`product` as it can be recorded, which its empty list otherwise prevents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(product)
