"""fa2cupy for transformers: `register()`, then `attn_implementation="fa2cupy"`.

docs/transformers.md says which masks the kernels compute and what goes to torch's SDPA.
"""

from __future__ import annotations

import inspect

from fa2cupy.errors import MissingDependency

__all__ = ["NAME", "register"]

NAME = "fa2cupy"  # no "flash" in it: transformers takes such names for flash_attn's, and compiles less of them


def register(*, wait: bool = True) -> None:
    """Make "fa2cupy" an attention implementation of transformers, in this process.

        fa2cupy.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fa2cupy")    # or set_attn_implementation

    Causal, bidirectional, windowed, padded and packed attention runs on our kernels: float16 and bfloat16 on a GPU, on
    the CPU also float32 and float64, with softcaps, sinks, dropout, gradients, static caches and torch.compile. Other
    masks, biases and float32 on a GPU go to torch's SDPA, counted by `fa2cupy.report()` and logged the first time;
    FA2CUPY_STRICT=1 makes it an error. Softcaps and sinks are errors there, since SDPA has none.

    No layer waits for the GPU. wait: a forward may wait once for each padding mask that it is given, to leave one
    without padding away and to find one with gaps, which is SDPA's. With False, under torch.compile and in a CUDA graph
    nothing ever waits: every padding mask is passed on as lengths, and one with gaps fails an assertion on the GPU.

    Registering twice is once, with the last `wait`. Raises MissingDependency without transformers 5.14 or newer, and
    for a version whose masks, tried once in small, are not those that are known.
    """
    try:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise MissingDependency(f"transformers 5.14 or newer, and torch, are needed: {error}") from error
    for function, needed in (
        (sdpa_mask, ("q_length", "q_offset", "kv_length", "kv_offset")),
        (sdpa_attention_forward, ("position_bias",)),
    ):
        missing = [name for name in needed if name not in inspect.signature(function).parameters]
        if missing:
            raise MissingDependency(
                f"transformers is too old: its {function.__name__} knows no {', '.join(missing)}, that of 5.14 does"
            )
    try:
        from fa2cupy.transformers import masks, probe
        from fa2cupy.transformers.layer import attention_layer
    except ImportError as error:
        raise MissingDependency(f"this version of transformers lacks what fa2cupy builds on: {error}") from error
    objection = probe.objection()
    if objection:
        raise MissingDependency(objection)
    masks.may_wait = bool(wait)
    AttentionMaskInterface.register(NAME, masks.mask)
    AttentionInterface.register(NAME, attention_layer)
