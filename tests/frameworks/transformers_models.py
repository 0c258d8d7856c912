"""Tiny models of transformers' with random weights, for the tests on the CPU and on the GPU."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers as t

LAYERS, VOCABULARY, WINDOW = 2, 64, 5
DECODERS = ["llama", "mistral", "gemma3", "qwen3", "gpt2"]
SCORED = ["gemma2", "gpt-oss"]  # decoders too: softcaps, and sinks
ENCODERS = ["bert", "modernbert"]
# Beside these: whisper, bart, and phimoe, which has a window that it does not tell its layers.


@functools.cache
def config(name: str, head_dim: int) -> Any:
    """4 heads, of keys 2 where the architecture can; without dropout."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    width = 4 * head_dim
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "max_position_embeddings": 512, **special,
    }  # fmt: skip
    grouped = {**sizes, "num_key_value_heads": 2, "head_dim": head_dim}
    windowed = {**grouped, "sliding_window": WINDOW}
    gemma = {**windowed, "query_pre_attn_scalar": head_dim, "layer_types": ["sliding_attention", "full_attention"]}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, grouped),
        "mistral": (t.MistralConfig, windowed),
        "gemma3": (t.Gemma3TextConfig, gemma),
        "qwen3": (t.Qwen3Config, {**windowed, "use_sliding_window": True, "max_window_layers": 1}),
        "gpt2": (
            t.GPT2Config,
            {
                "vocab_size": VOCABULARY, "n_embd": width, "n_layer": LAYERS, "n_head": 4, "n_positions": 512,
                "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **special,
            },
        ),
        "phimoe": (t.PhimoeConfig, {**windowed, **experts}),
        "bert": (t.BertConfig, {**sizes, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}),
        "modernbert": (
            t.ModernBertConfig,
            {**sizes, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        ),
        "whisper": (
            t.WhisperConfig,
            {
                "vocab_size": VOCABULARY, "d_model": width, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": width,
                "decoder_ffn_dim": width, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 40,
                "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None, **special,
            },
        ),
        "bart": (
            t.BartConfig,
            {
                "vocab_size": VOCABULARY, "d_model": width, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": width,
                "decoder_ffn_dim": width, "max_position_embeddings": 512, "decoder_start_token_id": 2, **special,
                "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "forced_eos_token_id": None,
            },
        ),
        "gemma2": (t.Gemma2Config, {**gemma, "attn_logit_softcapping": 0.1}),  # of scores that are small here
        "gpt-oss": (
            t.GptOssConfig,
            # All experts: nobody is routed another way by a rounding.
            {
                **windowed, **experts, "num_experts_per_tok": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    }  # fmt: skip
    make, keywords = makers[name]
    return make(**keywords)


def made(name: str, implementation: str, head_dim: int = 8) -> Any:
    """The same weights every time, in float32."""
    own = copy.deepcopy(config(name, head_dim))
    torch.manual_seed(0)
    if name == "whisper":
        model = t.WhisperForConditionalGeneration._from_config(own, attn_implementation=implementation)
    elif name == "bart":
        model = t.BartForConditionalGeneration._from_config(own, attn_implementation=implementation)
    else:
        make = t.AutoModel if name in ENCODERS else t.AutoModelForCausalLM
        model = make.from_config(own, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    return model.eval()


def result_of(model: Any, **inputs: Any) -> torch.Tensor:
    """Its logits, or of an encoder the last hidden state."""
    result = model(**inputs)
    found: torch.Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found
