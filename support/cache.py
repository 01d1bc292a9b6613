"""The keys and values of a step's prompts, side by side, with room for the tokens of their responses."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Slots(DynamicLayer):
    """A layer's keys and values while decoding: the prompts', then room for new tokens.

    They are written in place: a cache that grows is copied for every token, and a CUDA graph is bound to its
    addresses.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values  # (P, G, L + room, D)
        self.slots = slots  # (K,) shared by all layers: where the K tokens of this step go
        self.end = keys.shape[2]  # so much of the room is attended to: the rest is still empty

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write `keys, values: (P, G, K, D)` of the new tokens; all keys and values so far."""
        self.keys.index_copy_(2, self.slots, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.slots, values.to(self.values.dtype))
        return self.keys[:, :, :self.end], self.values[:, :, :self.end]


def merge(caches: list[Any], longest: int, room: int, slots: Tensor) -> Cache:
    """One cache of the prompts of several, padded left to `longest` tokens, with `room` after them.

    Uses the given ones up: a layer's copy is freed before the next layer's is made.
    """
    layers = []
    for same_layer in zip(*(cache.layers for cache in caches), strict=True):
        keys = join([layer.keys for layer in same_layer], longest, room)
        values = join([layer.values for layer in same_layer], longest, room)
        layers.append(Slots(keys, values, slots))
        for layer in same_layer:
            layer.keys = layer.values = None
    return Cache(layers=layers)


def join(parts: Iterable[Tensor], longest: int, room: int) -> Tensor:
    """Concatenate `parts`, (P_i, G, L_i, D) each, to (P, G, longest + room, D); prompts end at `longest`."""
    parts = list(parts)
    dtype, device = parts[0].dtype, parts[0].device
    if torch.is_autocast_enabled(device.type):
        # Keys come in float32 (from the rotary embedding), values in half precision.
        dtype = torch.get_autocast_dtype(device.type)
    prompts, (_, heads, _, width) = sum(len(part) for part in parts), parts[0].shape
    joined = torch.zeros(prompts, heads, longest + room, width, dtype=dtype, device=device)
    first = 0
    for part in parts:
        joined[first:first + len(part), :, longest - part.shape[2]:longest] = part
        first += len(part)
    return joined
