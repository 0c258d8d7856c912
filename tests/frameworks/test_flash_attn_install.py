"""Programs that know nothing of fa2cupy, run with it in flash_attn's place: torchrun, accelerate, transformers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

WORKER = """
import os, sys, torch
from flash_attn import flash_attn_func
import flash_attn
q = torch.ones(1, 3, 2, 8)
result = float(flash_attn_func(q, q, q).sum())
print(sys.argv[1:], os.environ.get("LOCAL_RANK", "alone"), flash_attn.__version__, result, flush=True)
"""


def _run(*arguments: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "fa2cupy", "run", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(WORKER)
    said = _run("torchrun", "--standalone", "--nproc-per-node", "2", script, "--lr", "1")
    assert sorted(said.splitlines()) == [f"['--lr', '1'] {rank} 2.8.3+fa2cupy 48.0" for rank in "01"]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(WORKER)
    said = _run("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script)
    assert said.splitlines() == ["[] alone 2.8.3+fa2cupy 48.0"]


# transformers wants a GPU for flash_attention_2: one is pretended, and the CPU declared to be good enough.
MODEL = """
import copy, torch
import transformers.utils.import_utils as utils
assert utils.is_flash_attn_greater_or_equal("2.3.3")
assert not utils.is_flash_attn_2_available()  # for want of a GPU
utils.is_flash_attn_2_available.cache_clear()
utils.is_torch_cuda_available = lambda: True
assert utils.is_flash_attn_2_available()
assert not utils.is_flash_attn_3_available()
assert not utils.is_flash_attn_4_available()
import transformers.modeling_flash_attention_utils as attention
attention.is_flash_attn_2_available = utils.is_flash_attn_2_available
attention.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["supported_devices"] = ((lambda: True, "cpu"),)
from transformers import AutoModelForCausalLM, LlamaConfig
import flash_attn
calls = []
real = flash_attn.flash_attn_func
def counted(*arguments, **keywords):
    calls.append(keywords)
    return real(*arguments, **keywords)
counted.__signature__ = __import__("inspect").signature(real)
flash_attn.flash_attn_func = counted
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)
torch.manual_seed(0)
eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
flash = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="flash_attention_2")
flash.load_state_dict(eager.state_dict())
tokens = torch.randint(3, 64, (2, 19))
outputs = [model(tokens, labels=tokens) for model in (eager, flash)]
for output in outputs:
    output.loss.backward()
gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (eager, flash)]
print(len(calls), float((outputs[0].logits - outputs[1].logits).abs().max()) < 1e-5,
      float((gradients[0] - gradients[1]).abs().max()) < 1e-5)
"""


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers(tmp_path: Path) -> None:
    """A model of two layers with attn_implementation="flash_attention_2": logits and gradients as eager ones."""
    script = tmp_path / "model.py"
    script.write_text(MODEL)
    assert _run(script) == "2 True True\n"
