"""What code imports from flash_attn, one test for each place where it does, and the signatures that it relies on."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import fa2cupy

PUBLIC = (
    "flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func flash_attn_varlen_func "
    "flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func flash_attn_with_kvcache"
)
# module -> names that others import from it
SERVED = {
    "flash_attn": f"{PUBLIC} __version__ flash_attn_interface",
    "flash_attn.flash_attn_interface": f"""{PUBLIC} flash_attn_gpu
        _flash_attn_forward _flash_attn_backward _flash_attn_varlen_forward _flash_attn_varlen_backward
        _wrapped_flash_attn_forward _wrapped_flash_attn_backward
        _wrapped_flash_attn_varlen_forward _wrapped_flash_attn_varlen_backward
        FlashAttnFunc FlashAttnKVPackedFunc FlashAttnQKVPackedFunc
        FlashAttnVarlenFunc FlashAttnVarlenKVPackedFunc FlashAttnVarlenQKVPackedFunc
        _get_block_size_n maybe_contiguous round_multiple USE_TRITON_ROCM""",
    "flash_attn.bert_padding": """unpad_input pad_input index_first_axis index_put_first_axis index_first_axis_residual
        unpad_input_for_concatenated_sequences""",
    "flash_attn.layers.rotary": """apply_rotary_emb apply_rotary_emb_func apply_rotary_emb_torch apply_rotary_emb_qkv_
        apply_rotary_emb_kv_ RotaryEmbedding rotate_half""",
    "flash_attn.ops.triton.rotary": "apply_rotary",
    "flash_attn_2_cuda": "fwd bwd varlen_fwd varlen_bwd fwd_kvcache",
    "flash_attn_interface": """flash_attn_func flash_attn_qkvpacked_func flash_attn_varlen_func
        flash_attn_with_kvcache flash_attn_gpu""",
}
ABSENT = (
    "flash_attn.modules.mha",
    "flash_attn.modules.mlp",
    "flash_attn.losses.cross_entropy",
    "flash_attn.ops.triton.cross_entropy",
    "flash_attn.ops.triton.layer_norm",
    "flash_attn.ops.rms_norm",
    "flash_attn.ops.layer_norm",
    "flash_attn.ops.fused_dense",
    "flash_attn.ops.activations",
    "flash_attn.models.gpt",
    "flash_attn.utils.distributed",
    "flash_attn.flash_attn_triton",
)


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("a real flash-attn is installed")
    fa2cupy.install_as_flash_attn()
    yield
    fa2cupy.uninstall_flash_attn()


@pytest.mark.parametrize("module", SERVED)
def test_names(module: str) -> None:
    imported = importlib.import_module(module)
    assert imported.__name__.startswith("fa2cupy.flash_attn")
    assert imported is sys.modules[imported.__name__]  # no second copy
    for name in SERVED[module].split():
        assert getattr(imported, name) is not None


def test_einops_names_of_bert_padding() -> None:
    pytest.importorskip("einops")
    from flash_attn.bert_padding import rearrange, repeat

    assert rearrange(torch.zeros(2, 3), "a b -> b a").shape == (3, 2)
    assert repeat(torch.zeros(2), "a -> a b", b=3).shape == (2, 3)
    with pytest.raises(ImportError, match="cannot import name 'reduce'"):
        exec("from flash_attn.bert_padding import reduce")


@pytest.mark.parametrize("module", ABSENT)
def test_what_is_not_there_says_whose_it_is(module: str) -> None:
    with pytest.raises(ImportError, match=r"flash_attn is fa2cupy's here .*, which has flash_attn.bert_padding, "):
        importlib.import_module(module)


def test_looking_for_what_is_not_there_finds_nothing() -> None:
    assert importlib.util.find_spec("flash_attn.losses") is None
    assert importlib.util.find_spec("flash_attn.ops.rms_norm") is None
    assert importlib.util.find_spec("flash_attn.ops.triton.rotary") is not None


def test_who_it_says_it_is() -> None:
    import flash_attn

    assert flash_attn.__version__ == "2.8.3+fa2cupy" == importlib.metadata.version("flash-attn")
    assert flash_attn.__fa2cupy__ == fa2cupy.__version__
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]


def test_the_module_stays_fa2cupy_s() -> None:
    import flash_attn

    assert flash_attn is fa2cupy.flash_attn
    assert flash_attn.__spec__.name == flash_attn.__name__ == "fa2cupy.flash_attn"  # importlib.reload needs it
    assert importlib.reload(flash_attn) is fa2cupy.flash_attn


def test_without_installing() -> None:
    code = """
import sys
from fa2cupy.flash_attn import flash_attn_func
from fa2cupy.flash_attn.bert_padding import unpad_input
assert "flash_attn" not in sys.modules
try:
    import flash_attn
except ImportError:
    print("no flash_attn")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "no flash_attn\n", result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Signatures: names, order and defaults of flash_attn 2.8

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SEQLENS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
BELOW = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes"
GRADIENTS = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
CACHE = (
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
    "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False, s_aux=None"
)
SIGNATURES = {
    # s_aux is fa2cupy's: transformers looks for a parameter of that name.
    "flash_attn_func": f"q, k, v, {TAIL}, s_aux=None",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {SEQLENS}, {TAIL}, block_table=None, s_aux=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {SEQLENS}, {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_with_kvcache": CACHE,
    "_flash_attn_forward": f"q, k, v, {BELOW}, return_softmax",
    "_flash_attn_varlen_forward": f"q, k, v, {SEQLENS}, dropout_p, softmax_scale, causal, window_size_left=-1, "
    "window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, "
    "seqused_k=None, zero_tensors=False, num_splits=0",
    "_flash_attn_backward": f"{GRADIENTS}, {BELOW}, deterministic, rng_state=None",
    "_flash_attn_varlen_backward": f"{GRADIENTS}, {SEQLENS}, {BELOW}, deterministic, rng_state=None, "
    "zero_tensors=False",
    "_get_block_size_n": "device, head_dim, is_dropout, is_causal",
    "layers.rotary.apply_rotary_emb": "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, "
    "cu_seqlens=None, max_seqlen=None",
    "layers.rotary.apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
    "layers.rotary.apply_rotary_emb_qkv_": "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, "
    "seqlen_offsets=0, num_heads_q=None",
    "layers.rotary.apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    "layers.rotary.RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    "layers.rotary.RotaryEmbedding.forward": "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None",
    "ops.triton.rotary.apply_rotary": "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, "
    "interleaved=False, inplace=False, conjugate=False",
    "bert_padding.unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "bert_padding.pad_input": "hidden_states, indices, batch, seqlen",
}


def _signature(function: object) -> str:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    module, _, rest = name.rpartition("rotary.")
    if module:
        where, path = f"flash_attn.{module}rotary", rest
    elif name.startswith("bert_padding."):
        where, path = "flash_attn.bert_padding", name.removeprefix("bert_padding.")
    else:
        where, path = "flash_attn.flash_attn_interface", name
    found = importlib.import_module(where)
    for part in path.split("."):
        found = getattr(found, part)
    assert _signature(found) == SIGNATURES[name]


def test_extension_takes_its_arguments_by_position() -> None:
    """flash_attn's own interface and TransformerEngine call these with so many arguments in this order."""
    import flash_attn_2_cuda

    window = "window_size_left, window_size_right, softcap"
    cu = "cu_seqlens_q, cu_seqlens_k"
    assert {name: _signature(getattr(flash_attn_2_cuda, name)) for name in flash_attn_2_cuda.__all__} == {
        "fwd": f"q, k, v, out, alibi_slopes, dropout_p, softmax_scale, causal, {window}, return_softmax, "
        "generator=None",
        "bwd": f"{GRADIENTS}, alibi_slopes, dropout_p, softmax_scale, causal, {window}, deterministic, generator=None, "
        "rng_state=None",
        "varlen_fwd": f"q, k, v, out, {cu}, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q, "
        f"max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, {window}, return_softmax, generator=None, "
        "num_splits=0",
        "varlen_bwd": f"{GRADIENTS}, {cu}, alibi_slopes, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, "
        f"zero_tensors, causal, {window}, deterministic, generator=None, rng_state=None",
        "fwd_kvcache": "q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, "
        f"block_table, alibi_slopes, out, softmax_scale, causal, {window}, rotary_interleaved, num_splits",
    }


def test_autograd_functions_take_their_arguments_by_position() -> None:
    from flash_attn.flash_attn_interface import FlashAttnFunc

    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    tail = (0.0, None, True, (-1, -1), 0.0, None, False)
    out, lse, dmask = FlashAttnFunc.apply(q, q, q, *tail, True, True)
    assert out.requires_grad
    assert (lse.shape, dmask.numel()) == ((1, 2, 4), 0)
    assert not FlashAttnFunc.apply(q, q, q, *tail, False, False).requires_grad
    with pytest.raises(TypeError, match=r"FlashAttnFunc.apply\(\) takes 12 arguments, 11 were given"):
        FlashAttnFunc.apply(q, q, q, *tail, True)


FA3_TUNING = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, s_aux=None"
FA3_MIDDLE = (
    "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0"
)


def test_flash_attention_3_has_another_order() -> None:
    import flash_attn_interface

    assert _signature(flash_attn_interface.flash_attn_func) == f"q, k, v, {FA3_MIDDLE}, {FA3_TUNING}"
    assert (
        _signature(flash_attn_interface.flash_attn_varlen_func)
        == f"q, k, v, {SEQLENS}, seqused_q=None, seqused_k=None, {FA3_MIDDLE}, {FA3_TUNING}"
    )
