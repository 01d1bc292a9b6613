"""What the model keeps of a prompt: keys and values, and the states of recurrent layers."""

from typing import Any

from torch import Tensor


def take_rows(model: Any, cache: Any, rows: Tensor) -> None:
    """Keep prompts `rows: (N,)` of a model's cache, each as often as it occurs. Raises ValueError.
    """
    # Llama 3.2 Vision must be told in every pass which patches a token sees; else it sees them as
    # if they were tokens before it, some of them.
    if hasattr(model.config.get_text_config(), "cross_attention_layers"):
        raise ValueError("layers that look at the image in every pass are not known here")
    cache.reorder_cache(rows)  # unlike batch_select_indices, it knows recurrent layers too
    for layer in cache.layers:
        # A recurrent layer writes its next state over this one, which the backward pass needs.
        # Told that there is no room yet, it makes some.
        if hasattr(layer, "is_recurrent_states_initialized"):
            layer.is_recurrent_states_initialized = dict.fromkeys(layer.recurrent_states, False)
