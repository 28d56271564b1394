"""`bitsmith bench run`: how fast a model is in each of its forms here, and what memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitsmith.cli.options import Json, OtherData, OwnModel
from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith bench run runs/digits", "float32, the native model and ONNX Runtime, side by side"),
    ("bitsmith bench run runs/digits --batch-size 256 --rounds 50", "a larger batch, more rounds"),
    ("bitsmith bench run my_model --data digits --json", "an exported native model alone"),
)


def command(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A run directory or an exported native model.", show_default=False
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Inputs of a batch.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rounds in which all take turns: five inputs and a batch.")
    ] = 20,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process for each form.")] = True,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that a language model writes in a round.")
    ] = 32,
    data: OtherData = None,
    model: OwnModel = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Also write the figures.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Measure speed and memory on test inputs: latency of one, throughput of a batch, peak memory.

    The float32 model that the run kept, the native model by products of integers and by floats, and the ONNX
    file in ONNX Runtime, where they are there. Of language models also how fast they read a prompt and write.
    """
    import sys

    from bitsmith.bench.speed import bench_run
    from bitsmith.files import write_json

    found = bench_run(
        directory,
        batch_size=batch_size,
        rounds=rounds,
        data=data,
        factory=model,
        memory=memory,
        tokens=tokens,
        tell=lambda line: None if json else print(line, file=sys.stderr),
    )
    if out is not None:
        write_json(out, found)
    print_json(found) if json else _show(found)


def _show(found: dict[str, Any]) -> None:
    from bitsmith.report.words import size

    unit, models = found["unit"], found["models"]
    columns = ["", "p50", "p95", "p99 ms", f"{unit}/s", "latency", "throughput"]
    rows = []
    for name, one in models.items():
        cells = [name, *(f"{one['latency_ms'][p]:.3g}" for p in ("p50", "p95", "p99"))]
        cells.append(f"{one['throughput']:,.0f}" if one["throughput"] >= 10 else f"{one['throughput']:.2g}")
        cells += [_times(one.get(key)) for key in ("latency_speedup", "throughput_speedup")]
        if "memory" in one:
            cells.append(size(one["memory"]["model_bytes"]))
        rows.append(cells)
    if any("memory" in one for one in models.values()):
        columns.append("memory")
    title = f"{found['path']} on {found['data']}: one input, and batches of {found['batch_size']}"
    threads = found["environment"]["threads"]
    notes = f"×: speed against float32; memory: beyond the libraries'; {threads} thread(s)"
    console = output()
    console.print(table(title, columns, rows, caption=notes))
    if "generation" in found:
        console.print(_writing(found["generation"]))
    for name, why in found["not_measured"].items():
        console.print(f"{name} is not measured: {why}")


def _writing(found: dict[str, Any]) -> Any:
    rows = [
        (
            name + ("" if one["cache"] else " (no cache)"),
            f"{one['prefill_per_s']:,.0f}",
            f"{one['decode_per_s']:,.0f}",
            *(f"{one['step_ms'][p]:.3g}" for p in ("p50", "p95", "p99")),
            _times(one.get("prefill_speedup")),
            _times(one.get("decode_speedup")),
        )
        for name, one in found["models"].items()
    ]
    title = f"{found['written']} tokens written after {found['prompt']}, one row"
    columns = ("", "prefill tokens/s", "decode tokens/s", "p50", "p95", "p99 ms", "prefill", "decode")
    return table(title, columns, rows, caption="p50, p95, p99: a step of decode")


def _times(speedup: float | None) -> str:
    from bitsmith.report.words import DASH

    return DASH if speedup is None else f"{speedup:.2f}×"
