"""End to end: a small Llama at 4-bit weights and 8-bit activations per token, on the kernels, against float32.

Reading a prompt (prefill) and writing after it token by token (decode), one row, with a cache of keys and
values; all forms take turns in every round, and ratios are medians of the rounds' own. Peak memory is that of
a process of its own, which opens one form, reads the prompt and writes; less what libraries alone take.
float32 is built and its file is loaded into it, as usual; the lean one never holds its weights twice. Both
products of attention stay in float. Weights are drawn at random, as times do not depend on them.

    python benchmarks/kernels_end_to_end.py [--threads 1 2] [--prompts 64 256] [--rounds 10]

On a busy machine only the ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _results
import torch
from torch import Tensor, nn

from bitsmith.bench.memory import resident_peak
from bitsmith.bench.writing import describe_writing, measure_writing
from bitsmith.export import load, save
from bitsmith.files import load_tensors, save_tensors
from bitsmith.kernels.choose import describe
from bitsmith.quantization import Scheme, calibrate, prepare
from bitsmith.quantization.finalize import finalize
from bitsmith.recipe.environment import environment
from bitsmith.tasks import build
from bitsmith.tasks.hollow import build_hollow
from bitsmith.tasks.reading import reader

SIZE = {"width": 512, "depth": 6, "heads": 8, "context": 512}
FORMS = ("float32", "native", "dequantized")
LEAN = "float32, lean"  # loaded into a model without memory of its own
GOALS = {"prefill": 2.5, "decode": 2.5, "memory": 0.35}


def make(folder: Path, bits: int) -> None:
    """Both models as files."""
    model = build("byte_llama", seed=0, **SIZE).eval()
    save_tensors(folder / "float.safetensors", model.state_dict())
    example = prompt(32)
    attention = {f"*.{name}": {"bits": 32} for name in ("scores.*", "context.*")}
    activations = Scheme(bits=8, granularity="token", range="dynamic")
    prepare(model, Scheme(bits=bits, granularity="channel"), activations, overrides=attention)
    calibrate(model, [example])
    save(finalize(model, example), folder / "model")


def opened(folder: Path, form: str) -> nn.Module:
    """One of FORMS or LEAN, from its file."""
    if form in ("float32", LEAN):
        model = (build_hollow if form == LEAN else build)("byte_llama", **SIZE)
        tensors, _ = load_tensors(folder / "float.safetensors")
        model.load_state_dict(tensors, assign=form == LEAN)
        return model.eval()
    return load(folder / "model", kernels=form == "native")


def prompt(length: int) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def memory_here(folder: Path, form: str, length: int, steps: int) -> int:
    """Bytes beyond those of the libraries, in this process."""
    describe()  # the kernels are libraries as well
    before = resident_peak()
    read, tokens = reader(opened(folder, form), 1, length + steps), prompt(length)
    for _ in range(steps + 1):
        tokens = read(tokens).argmax(-1, keepdim=True)
    return resident_peak() - before


def memory(folder: Path, form: str, length: int, steps: int) -> int:
    command = [sys.executable, __file__, "--memory-of", form, str(folder), str(length), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=(64, 256))
    parser.add_argument("--tokens", type=int, default=32, help="written after each prompt")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=(1,))
    parser.add_argument("--memory-of", nargs=4, metavar=("FORM", "DIR", "PROMPT", "TOKENS"))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.memory_of:
        form, folder, length, steps = chosen.memory_of
        torch.set_num_threads(1)
        print(memory_here(Path(folder), form, int(length), int(steps)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, chosen.bits)
        held = {form: memory(folder, form, max(chosen.prompts), chosen.tokens) for form in (*FORMS, LEAN)}
        models = {form: opened(folder, form) for form in FORMS}
        print(f"kernels: {describe()['kernels']}; {chosen.bits}-bit weights, {SIZE}")
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            for length in chosen.prompts:
                tokens = prompt(length)
                timed = measure_writing(models, tokens, chosen.tokens, chosen.rounds)
                found = describe_writing(models, timed, tokens, chosen.tokens)
                rows.append({"threads": threads, **found})
                print(f"\n{threads} thread(s), prompt of {length}, {chosen.tokens} written")
                for form, one in found["models"].items():
                    print(
                        f"{form:12s} prefill {one['prefill_per_s']:9.0f} tokens/s {one['prefill_speedup']:5.2f} x"
                        f"   decode {one['decode_per_s']:7.0f} tokens/s {one['decode_speedup']:5.2f} x"
                        f"   step p50 {one['step_ms']['p50']:.2f} p99 {one['step_ms']['p99']:.2f} ms"
                    )
    shares = {form: taken / held["float32"] for form, taken in held.items()}
    print()
    for form in held:
        print(f"{form:14s} peak memory {held[form] / 2**20:7.1f} MB {shares[form]:5.2f} x")
    print(f"goals: prefill and decode >= {GOALS['prefill']} x, memory <= {GOALS['memory']} x")
    path = _results.save(
        "kernels_end_to_end",
        {
            "size": SIZE,
            "bits": chosen.bits,
            "rows": rows,
            "memory_bytes": held,
            "memory_share": shares,
            "goals": GOALS,
            "environment": environment() | {"kernels": describe()["kernels"]},
        },
        chosen.out,
    )
    print(path)


if __name__ == "__main__":
    main()
