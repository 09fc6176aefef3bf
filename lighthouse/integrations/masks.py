"""Why a mask that transformers asks for is not the plain causal one, in the words of the model's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from transformers import masking_utils
from transformers.masking_utils import causal_mask_function


def why_not_causal(mask_function: Callable[..., Any], config: Any) -> tuple[str, str] | None:
    """What stands in the way and the rule that it breaks; None for causal attention.

    Args:
        mask_function: who sees whom, as transformers made it: functions of functions, known by what made them.
        config: the model's.
    """
    if mask_function is causal_mask_function:
        return None
    made_by = {part.__qualname__.split(".")[0] for part in _parts(mask_function)}
    # Documents first: a window of packed documents is both, and the window may be the model's own.
    if masking_utils.packed_sequence_mask_function.__name__ in made_by:
        return "position_ids start anew within a sequence", "packed documents are not supported"
    if masking_utils.sliding_window_overlay.__name__ in made_by:
        window = getattr(config, "sliding_window", None)
        return f"sliding_window={window} in the model's config", "a sliding window is not supported"
    if masking_utils.chunked_overlay.__name__ in made_by:
        chunk = getattr(config, "attention_chunk_size", None)
        return f"attention_chunk_size={chunk} in the model's config", "attention in chunks is not supported"
    if masking_utils.bidirectional_mask_function.__name__ in made_by:
        return "is_causal=False in the model's config", "attention must be causal"
    return (
        f"mask_function={getattr(mask_function, '__qualname__', mask_function)}",
        "must be causal_mask_function: no bidirectional part; a compiled model must be compiled layer by layer",
    )


def _parts(mask_function: Callable[..., Any]) -> Iterator[Any]:
    """The function and all that it is made of."""
    if not hasattr(mask_function, "__qualname__"):
        return
    yield mask_function
    for cell in getattr(mask_function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple | list) else (held,):
            if callable(part):
                yield from _parts(part)
