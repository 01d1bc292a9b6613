"""A frozen vision tower runs once per image: for sampling, for the update and, if wanted, for later epochs."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput


def towers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that encode images, as the families name them."""
    names = ("vision_model", "vision_tower", "visual")
    return [getattr(model.model, name) for name in names if hasattr(model.model, name)]


def freeze(model: torch.nn.Module) -> None:
    """Stop gradients to the vision tower; the connector to the language model stays trained."""
    for tower in towers(model):
        tower.requires_grad_(False)
        if hasattr(tower, "merger"):  # Qwen keeps its connector inside the tower
            tower.merger.requires_grad_(True)


@contextlib.contextmanager
def once(model: torch.nn.Module, store: dict[int, Tensor] | None = None,
         budget: float = 0.0) -> Iterator[None]:
    """Let a frozen tower encode a batch of images once, for sampling and for the update.

    With a `budget` in GiB, `store` keeps the tower's output for later epochs too. A tower with a part that
    trains, such as Qwen's with its connector inside, runs every time. Of one that is asked for hidden states,
    such as LLaVA's, nothing is kept for later epochs.
    """
    # What is kept is the tower's output *before* the connector. Kept after it, the connector would get no
    # gradient: it would be frozen too, without a word.
    kept: dict[int, tuple[Tensor, Any]] = {}
    current_pixels: list[Tensor | None] = [None]

    def encode(tower: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        pixels = current_pixels[0]
        _, features = kept.pop(id(pixels), (None, None))
        if features is None and budget and not kwargs.get("output_hidden_states"):
            features = _encode_new_tiles(tower, store, budget, args, kwargs)
        elif features is None:
            features = type(tower).forward(tower, *args, **kwargs)
        if not torch.is_grad_enabled():  # sampling: the update of the same batch comes next
            # The pixels are kept too, so that no other tensor gets their id; the features as a copy, since
            # models write into the output that they are given.
            kept[id(pixels)] = pixels, copy.copy(features)
        return features

    def remember_pixels(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        current_pixels[0] = inputs.get("pixel_values")

    frozen = [t for t in towers(model) if not any(p.requires_grad for p in t.parameters())]
    hook = model.base_model.register_forward_pre_hook(remember_pixels, with_kwargs=True)
    for tower in frozen:
        tower.forward = functools.partial(encode, tower)
    try:
        yield
    finally:
        hook.remove()
        for tower in frozen:
            del tower.forward


def _encode_new_tiles(tower: torch.nn.Module, store: dict[int, Tensor], budget: float, args: Any,
                      kwargs: dict[str, Any]) -> BaseModelOutput:
    """The tower's output for a batch of image tiles; it runs only on those not in `store`, and fills it."""
    tiles = args[0] if args else kwargs["pixel_values"]
    keys = [hash(tile.float().cpu().numpy().tobytes()) for tile in tiles]
    new = [i for i, key in enumerate(keys) if key not in store]
    known = {key: store[key] for key in keys if key in store}

    def only_new(value: Any) -> Any:
        per_tile = isinstance(value, Tensor) and len(value) == len(tiles)
        return value[new] if per_tile else value

    if new:
        new_args = [only_new(value) for value in args]
        new_kwargs = {name: only_new(value) for name, value in kwargs.items()}
        states = type(tower).forward(tower, *new_args, **new_kwargs).last_hidden_state
        for i, state in zip(new, states, strict=True):
            known[keys[i]] = state
            if (len(store) + 1) * state.nbytes <= budget * 2**30:
                store[keys[i]] = state.clone()
    return BaseModelOutput(last_hidden_state=torch.stack([known[key] for key in keys]))
