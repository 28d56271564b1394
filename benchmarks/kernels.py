"""Integer products as a share of what the processor can do, beside torch's and ONNX Runtime's.

    python benchmarks/kernels.py                                   # all; a few minutes on a quiet machine
    python benchmarks/kernels.py --rows 512 --widths 8 4 --threads 1 --seconds 0.2
    python benchmarks/kernels.py --instruction-set avx2            # another of this processor's

The peaks are measured by peak.c on the same cores: products in registers alone, and a read of memory. A product of
M rows is compared with the first from M = 32 on (`share`), and with the second at M = 1, where all weights come from
memory: the weights of one row are cycled through more than 200 MB. Everything takes turns in rounds and the minimum
counts, as other jobs only ever add time. Ours starts from float activations (`dynamic`: their quantization is in it)
or from codes (`codes`), and ends in float32; so do torch's int8 products (`codes`: int32) and the weight-only ones.
To compare with torch on AVX2 alone, set MKL_ENABLE_INSTRUCTIONS=AVX2 as well.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _results
import torch
from torch import Tensor

from bitsmith.kernels.build import built
from bitsmith.kernels.choose import best, native
from bitsmith.kernels.native import Native
from bitsmith.kernels.processor import INSTRUCTION_SETS

CYCLED = 200 << 20  # bytes of weights that one row goes through
READ = 256 << 20
ROWS, WIDTHS, THREADS = (1, 8, 32, 512), (8, 4, 3, 2, 1), (1, 2)

Run = Callable[[], object]


def least(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Seconds of the fastest round of each; the rounds take turns for ``seconds`` a run."""
    found = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds * len(runs)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - start)
        rounds += 1
    return found


class Peaks:
    """peak.c on several cores at once."""

    def __init__(self, library: Native, threads: int) -> None:
        self.c = ctypes.CDLL(
            str(built(library.name, sources=[Path(__file__).with_name("peak.c")]))  # type: ignore[arg-type]
        )
        self.c.bitsmith_peak.restype = ctypes.c_int64
        self.c.bitsmith_peak.argtypes = [ctypes.c_int64] * 2
        self.c.bitsmith_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.memory = torch.ones(READ, dtype=torch.uint8)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def _together(self, work: Callable[[int], object]) -> None:
        list(self.pool.map(work, range(self.threads)))

    def products(self, bits: int, seconds: float) -> float:
        """GOP/s: a product and a sum are two operations."""
        rounds = 20_000
        done = self.c.bitsmith_peak(1, bits) * rounds * self.threads
        run = {"": lambda: self._together(lambda _: self.c.bitsmith_peak(rounds, bits))}
        return done / least(run, seconds)[""] / 1e9

    def read(self, seconds: float) -> float:
        """GB/s."""
        part = READ // self.threads
        start = self.memory.data_ptr()
        run = {"": lambda: self._together(lambda i: self.c.bitsmith_read(start + i * part, part))}
        return READ / least(run, seconds)[""] / 1e9


def cycling(runs: list[Run]) -> Run:
    """One of them at a time, all in turn."""
    endless = itertools.cycle(runs)
    return lambda: next(endless)()


def ours(library: Native, x: Tensor, k: int, n: int, bits: int, group: int | None) -> dict[str, Run]:
    """Our product from codes and from floats."""
    m = len(x)
    count = max(1, CYCLED * 8 // (n * k * bits)) if m == 1 else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, -(-k // (group or k)))
    weights = [
        library.pack(codes, bits, group_size=group, offset=-(2 ** (bits - 1)), scale=scale)
        for _ in range(count)
    ]
    a = library.quantize(x, -128, 127)
    name = f"w{bits}" + (f" g{group}" if group else "")
    return {
        f"{name} codes": cycling([lambda w=w: library.values(a, w) for w in weights]),  # type: ignore[misc]
        f"{name} dynamic": cycling(
            [lambda w=w: library.values(library.quantize(x, -128, 127), w) for w in weights]  # type: ignore[misc]
        ),
    }


def torchs(x: Tensor, k: int, n: int) -> dict[str, Run]:
    """torch's own: float32, and what it has for 8 and 4 bits; what is missing here is left out."""
    m = len(x)
    bfloat = x.bfloat16()
    copies = max(1, CYCLED // (n * k)) if m == 1 else 1
    floats = [torch.randn(n, k) for _ in range(max(1, copies // 4))]
    bytes_ = [torch.randint(-128, 128, (n, k), dtype=torch.int8) for _ in range(copies)]
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    scale = torch.rand(n).bfloat16()
    found: dict[str, list[Run]] = {
        "torch float32": [lambda w=w: torch.nn.functional.linear(x, w) for w in floats],  # type: ignore[misc]
        "torch _int_mm": [lambda w=w: torch._int_mm(codes, w.t()) for w in bytes_],  # type: ignore[misc]
        "torch int8pack": [
            lambda w=w: torch._weight_int8pack_mm(bfloat, w, scale)  # type: ignore[misc]
            for w in bytes_
        ],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            nibbles = torch.randint(0, 16, (n, k), dtype=torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
            parameters = torch.rand(k // 128, n, 2).bfloat16()
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
            fours = [packed.clone() for _ in range(2 * copies)] if m == 1 else [packed]
            found["torch int4pack g128"] = [
                lambda w=w: product(bfloat, w, 128, parameters)  # type: ignore[misc]
                for w in fours
            ]
        except (RuntimeError, AttributeError):
            pass
    kept = {}
    for name, runs in found.items():
        try:
            runs[0]()
        except RuntimeError:
            continue
        kept[name] = cycling(runs)
    return kept


def onnxruntimes(x: Tensor, k: int, n: int, bits: int, threads: int) -> dict[str, Run]:
    """MatMulNBits with int8 activations (accuracy_level 4), where ONNX Runtime is installed and has the width."""
    try:
        import numpy as np
        import onnx
        import onnxruntime as ort
    except ImportError:
        return {}
    blocks = k // 128
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 256, (n, blocks, 128 * bits // 8), dtype=np.uint8)
    scale = rng.random(n * blocks, dtype=np.float32)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=128,
        accuracy_level=4,
    )
    values = [onnx.numpy_helper.from_array(v, name) for v, name in ((weight, "w"), (scale, "s"))]
    kind = onnx.TensorProto.FLOAT
    ends = [
        onnx.helper.make_tensor_value_info(name, kind, [len(x), size]) for name, size in (("x", k), ("y", n))
    ]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], values)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    count = max(1, CYCLED * 8 // (n * k * bits)) if len(x) == 1 else 1
    try:
        sessions = [ort.InferenceSession(model, options, ["CPUExecutionProvider"]) for _ in range(count)]
        feed = {"x": x.numpy()}
        runs: list[Run] = [lambda s=s: s.run(None, feed) for s in sessions]  # type: ignore[misc]
        runs[0]()
    except Exception:  # a width or a size that this version does not have: its own classes, several
        return {}
    return {f"onnxruntime w{bits} g128": cycling(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 2048), metavar=("K", "N"))
    parser.add_argument("--group", type=int, default=128, help="group size, measured at 4 bits (0: not)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product measured")
    parser.add_argument("--instruction-set", choices=INSTRUCTION_SETS)
    parser.add_argument("--no-peers", action="store_true", help="ours and torch's alone")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    library = native(chosen.instruction_set) if chosen.instruction_set else best()
    if not isinstance(library, Native):
        raise SystemExit("no library could be built here: bitsmith inspect --system says why")
    k, n = chosen.size
    print(f"instruction set: {library.name}; {k} inputs, {n} outputs")
    rows: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        measured = Peaks(library, threads)
        read = measured.read(chosen.seconds)
        most = {bits: measured.products(bits, chosen.seconds) for bits in {8, *chosen.widths}}
        peaks.append({"threads": threads, "read_gb_per_s": read, "products_gop_per_s": most})
        print(f"\n{threads} thread(s): peak {most[8]:.0f} GOP/s at 8 bits, reads {read:.1f} GB/s")
        for m in chosen.rows:
            x = torch.randn(m, k)
            runs = torchs(x, k, n)
            for bits in chosen.widths:
                runs |= ours(library, x, k, n, bits, None)
                if bits == 4 and chosen.group:
                    runs |= ours(library, x, k, n, bits, chosen.group)
                if not chosen.no_peers:
                    runs |= onnxruntimes(x, k, n, bits, threads)
            taken = least(runs, chosen.seconds)
            for name, seconds in taken.items():
                bits = int(name[1]) if name[0] == "w" else 0
                share = None
                if bits and m == 1:
                    share = n * k * bits / 8 / seconds / 1e9 / read
                elif bits and m >= 32:
                    share = 2 * m * k * n / seconds / 1e9 / most[bits]
                row = {
                    "threads": threads,
                    "rows": m,
                    "product": name,
                    "ms": seconds * 1e3,
                    "gop_per_s": 2 * m * k * n / seconds / 1e9,
                    "times_float32": taken["torch float32"] / seconds,
                    "share": share,
                }
                rows.append(row)
                print(
                    f"M {m:4d}  {name:24s} {row['ms']:9.3f} ms {row['gop_per_s']:8.0f} GOP/s "
                    f"{row['times_float32']:7.2f} x float32  " + (f"{share:6.1%}" if share else "")
                )
    path = _results.save(
        "kernels",
        {"instruction_set": library.name, "inputs": k, "outputs": n, "peaks": peaks, "rows": rows},
        chosen.out,
    )
    print(f"\n{path}")


if __name__ == "__main__":
    main()
