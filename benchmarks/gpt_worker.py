"""One process of `gpt.py`: one kind of attention in the model of examples/gpt_torch.py.

The job is a JSON object in the first argument. Answers are lines of JSON on stdout, beginning with "@". Nothing that
Inductor compiled for another attention may be found: its caches do not ask which one it was, so gpt.py turns them off.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import gpt_data  # noqa: E402
import gpt_torch  # noqa: E402

OURS = {  # the names of all kernels
    name
    for path in (ROOT / "cuda_src").rglob("*.cu")
    for name in re.findall(r'extern "C" __global__ .*?(\w+)\(const', path.read_text(encoding="utf-8"), re.DOTALL)
}
Tensor = torch.Tensor


def tell(**what: Any) -> None:
    print("@" + json.dumps(what), flush=True)


def owner(kernel: str) -> str:
    """Whose attention a kernel's name is of; empty for all that is none."""
    if kernel in OURS:
        return "fa2cupy"
    if kernel.startswith("triton_"):  # Inductor's, named after the operators around them
        return ""
    name = kernel.lower()
    if "cudnn" in name:
        return "cudnn"
    if "pytorch_flash" in name or "flash_fwd" in name or "flash_bwd" in name:
        return "fa2"
    return "another" if "fmha" in name or "efficient_attention" in name else ""


def attention_kernels(function: Callable[[], Any]) -> dict[str, dict[str, int]]:
    """owner -> kernel -> launches, of the attention that the function runs on the GPU, as torch's profiler has it."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    found: dict[str, Counter[str]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and (whose := owner(event.name)):
            found.setdefault(whose, Counter())[event.name[:120]] += 1
    return {whose: dict(counts) for whose, counts in found.items()}


class Job:
    def __init__(self, job: dict[str, Any]) -> None:
        self.kind, self.device, self.compiler = job["attention"], job["device"], job["compile"]
        self.sizes: dict[str, Sequence[int]] = job["shapes"]
        self.vocabulary, self.seed, self.steps = job["vocabulary"], job["seed"], job["steps"]
        self.data = gpt_data.tokens()
        self.context = gpt_torch.choice(self.kind_here(self.kind), self.device)

    def kind_here(self, kind: str) -> str:
        """Without a GPU there is no cuDNN: a rehearsal takes what there is."""
        return "sdpa-math" if self.device == "cpu" and kind == "sdpa-cudnn" else kind

    def model(self, shape: str, kind: str, dtype: torch.dtype = torch.bfloat16, compiled: bool = True) -> Any:
        layers, width, heads, length, _ = self.sizes[shape]
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = gpt_torch.GPT(layers, width, heads, length, self.kind_here(kind), dtype, self.vocabulary)
        if compiled and self.compiler != "none":
            model.compile_parts(backend=self.compiler)
        return model

    def batches(self, shape: str, seed: int, batch: int | None = None) -> Iterator[Tensor]:
        *_, length, usual = self.sizes[shape]
        for numbers in gpt_data.batches(self.data, seed, batch or usual, length):
            yield torch.from_numpy(numbers).to(self.device, non_blocking=True)

    def kernels(self, function: Callable[[], Any]) -> Any:
        if self.device == "cpu":
            function()
            return None
        return attention_kernels(function)

    # ------------------------------------------------------------------------------------------------------------------

    def times(self) -> None:
        """Compile every shape, say so, and then do what each line of stdin asks for: {"shape", "steps"} is a turn."""
        longest = max(self.sizes, key=lambda shape: self.sizes[shape][3])
        model = self.model(longest, self.kind)
        sources = {shape: self.batches(shape, self.seed) for shape in self.sizes}
        for shape, (_, width, _, length, batch) in self.sizes.items():  # small memory: everybody compiles at once
            x = torch.randn(batch, length, width, device=self.device, requires_grad=True)
            model.blocks[0](x).square().mean().backward()
            model.head(x, model.tokens, next(sources[shape])[:, 1:]).backward()
            model.zero_grad(set_to_none=True)
        del x
        self.free()
        tell(ready=True)
        trainer = gpt_torch.Trainer(model, rate=1e-4)
        for line in sys.stdin:
            turn = json.loads(line)
            shape = turn["shape"]
            for _ in range(2):  # torch finds its memory again
                trainer.step(next(sources[shape]))
            if turn.get("profile"):
                tell(kernels=self.kernels(lambda shape=shape: trainer.step(next(sources[shape]))))
            else:
                tell(ms=self.milliseconds(trainer, sources[shape], turn["steps"]), peak_gb=self.peak())
            self.free()

    def milliseconds(self, trainer: Any, source: Iterator[Tensor], steps: int) -> float:
        """Of a step, on average, from the start of the first to the end of the last."""
        batches = [next(source) for _ in range(steps)]
        if self.device == "cpu":
            from time import perf_counter

            begin = perf_counter()
            for batch in batches:
                trainer.step(batch)
            return 1e3 * (perf_counter() - begin) / steps
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for batch in batches:
            trainer.step(batch)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / steps

    def free(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.device == "cuda" else None

    # ------------------------------------------------------------------------------------------------------------------

    def curve(self) -> None:
        """Loss and norm of the gradients of every step."""
        (shape,) = self.sizes
        trainer, source = gpt_torch.Trainer(self.model(shape, self.kind)), self.batches(shape, self.seed)
        results = [trainer.step(next(source)) for _ in range(self.steps)]
        losses, norms = ([round(float(x), 6) for x in values] for values in zip(*results, strict=True))
        tell(losses=losses, norms=norms, kernels=self.kernels(lambda: trainer.step(next(source))))

    # ------------------------------------------------------------------------------------------------------------------

    def gradients(self, kinds: Sequence[str], checkpoints: int, batch: int = 2) -> None:
        """Train with the job's attention; at every checkpoint the error of the gradients of each kind at its weights.

        "model": bfloat16 throughout, against float32 throughout. "attention": float32 but for q, k and v, which every
        kind, SDPA's float32 math too, is given rounded to bfloat16: what attention alone adds. Nothing is compiled, so
        that each call asks which attention it is to be.
        """
        (shape,) = self.sizes
        trained, source = self.model(shape, self.kind), self.batches(shape, self.seed)
        trainer, asked = gpt_torch.Trainer(trained), self.batches(shape, self.seed + 1000, batch)
        for step in range(1, self.steps + 1):
            trainer.step(next(source))
            if step % max(1, self.steps // checkpoints):
                continue
            question = next(asked)
            for what, dtype in (("model", torch.bfloat16), ("attention", torch.float32)):
                with rounded_attention(what == "attention"):
                    right = self.gradient(shape, trained, "sdpa-math", torch.float32, question)
                    for kind in kinds:
                        got = self.gradient(shape, trained, kind, dtype, question)
                        tell(what=what, step=step, kind=kind, error=relative(got, right))
        kernels = {
            kind: self.kernels(lambda kind=kind: self.gradient(shape, trained, kind, torch.bfloat16, question))
            for kind in kinds
        }
        tell(kernels=kernels)

    def gradient(self, shape: str, trained: Any, kind: str, dtype: torch.dtype, batch: Tensor) -> list[Tensor]:
        with torch.device("meta"):
            layers, width, heads, length, _ = self.sizes[shape]
            model = gpt_torch.GPT(layers, width, heads, length, self.kind_here(kind), dtype, self.vocabulary)
        model.load_state_dict(trained.state_dict(), assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_()
        with gpt_torch.choice(self.kind_here(kind), self.device):
            return list(torch.autograd.grad(model(batch), list(model.parameters())))


def relative(got: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Root-mean-square of the difference of all gradients together, over that of the right ones."""
    error = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(got, right, strict=True))
    return (error / sum(float(y.double().square().sum()) for y in right)) ** 0.5


@contextmanager
def rounded_attention(rounds: bool) -> Iterator[None]:
    """Whether q, k and v are rounded to bfloat16 on their way to an attention that is computed in it, and to math."""
    plain = gpt_torch.attend

    def attend(kind: str, qkv: Tensor) -> Tensor:
        rounded = qkv.to(torch.bfloat16)
        return plain(kind, rounded.float() if kind == "sdpa-math" else rounded).to(qkv.dtype)

    if rounds:
        gpt_torch.attend = attend
    try:
        yield
    finally:
        gpt_torch.attend = plain


def main() -> None:
    description = json.loads(sys.argv[1])
    job = Job(description)
    if job.device == "cuda":
        torch.cuda.init()
    else:
        torch.set_num_threads(1)
    with job.context:
        if description["what"] == "gradients":
            job.gradients(description["kinds"], description["checkpoints"])
        else:
            {"times": job.times, "curve": job.curve}[description["what"]]()


if __name__ == "__main__":
    main()
