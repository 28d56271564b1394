"""`bitsmith adapt`: an exported model trains on, on its own integer codes; deltas; merged copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitsmith.cli.options import Json, OwnModel, directory
from bitsmith.cli.show import Display, facts, output, print_json, table

EXAMPLES = (
    ("bitsmith adapt runs/digits/model --data npz:mine.npz", "on your images, in place"),
    ("bitsmith adapt model --data text:notes.txt --memory-limit 200MB", "a batch that fits"),
    ("bitsmith adapt model --data npz:mine.npz --delta changes.safetensors", "and what changed, to send"),
    ("bitsmith adapt model --data npz:mine.npz --mode zeroth_order", "in the memory of inference"),
    ("bitsmith adapt model --resume --data npz:mine.npz", "go on where it was interrupted"),
    ("bitsmith adapt model --apply changes.safetensors --out adapted", "the same model elsewhere"),
    ("bitsmith adapt model --merge copy-a copy-b changes.safetensors --out merged", "one of three copies"),
)


def _given(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, show_default=False)


def command(
    exported: Annotated[
        Path,
        typer.Argument(
            metavar="EXPORTED", help="A model that was exported, as a run's model/.", show_default=False
        ),
    ],
    copies: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[COPY...]", help="With --merge: adapted models or deltas.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        _given(
            "DATA", "What to train on, named as in a recipe: npz:FILE, folder:DIR, text:PATH, masks:DIR, ..."
        ),
    ] = None,
    mode: Annotated[
        str | None,
        _given("integer|zeroth_order", "By gradients, or by forward passes alone. Default: integer."),
    ] = None,
    epochs: Annotated[int | None, _given("N", "How often all of it. Default: 5, or 30 forward-only.")] = None,
    steps: Annotated[int | None, _given("N", "So many batches instead.")] = None,
    lr: Annotated[float | None, _given("RATE", "The learning rate at its peak. Default: 0.01.")] = None,
    batch_size: Annotated[int | None, _given("ROWS", "Rows of a step. Default: 32.")] = None,
    seed: Annotated[int | None, _given("N", "Of order and rounding. Default: 0.")] = None,
    memory_limit: Annotated[
        str | None,
        _given("200MB", "Memory beside that of libraries: batches get smaller to keep it, or it is refused."),
    ] = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", help="Write what is worse on the validation split, too.")
    ] = False,
    out: Annotated[
        Path | None, directory("Where the new model goes. Default: in place of the old one.")
    ] = None,
    delta: Annotated[Path | None, _given("FILE", "Also write what changed, and nothing else.")] = None,
    apply: Annotated[
        Path | None, _given("FILE", "Train nothing: turn the model into that of a delta.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Train nothing: average the changes of the copies that follow.")
    ] = False,
    rounding: Annotated[
        str | None, _given("stochastic|nearest", "Of merged codes. Default: stochastic.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted adaptation; ends as if it had not been."),
    ] = False,
    model: OwnModel = None,
    json: Json = False,
) -> None:
    """Train an exported model on your data, on the integer codes that its file holds.

    With --mode zeroth_order codes stay, and scales, biases and norms learn by forward passes alone. No float
    weight is kept at any time, nothing is downloaded or sent, and whatever happens, the file is the old model
    or the new one. What memory it takes is said before it begins.
    """
    from bitsmith.errors import RecipeError

    training: dict[str, Any] = {
        "mode": mode,
        "epochs": epochs,
        "steps": steps,
        "learning_rate": lr,
        "batch_size": batch_size,
        "memory_limit": memory_limit,
        "even_if_worse": even_if_worse or None,
    }
    if apply is not None or merge or copies:
        others = {**training, "data": data, "delta": delta, "resume": resume or None, "model": model}
        _refuse_beside("--merge" if merge or copies else "--apply", others)
        if merge and apply is not None:
            raise RecipeError("only one of them at a time", where="--apply", got="--merge as well")
        if copies and not merge:
            raise RecipeError("what are these for", where=str(copies[0]), remedy="Give --merge before them")
        _from_files(exported, copies, apply, out, rounding, seed, json)
        return
    if rounding is not None:
        raise RecipeError("nothing is merged", where="--rounding", got=rounding, remedy="Give --merge")
    if data is None:
        raise RecipeError(
            "there are no data to train on", where="--data", remedy="Give --data, such as npz:FILE"
        )
    from bitsmith.recipe.adapt import AdaptSettings, adapt
    from bitsmith.recipe.adapt_memory import parse_bytes

    chosen: dict[str, Any] = {**training, "seed": seed}
    if memory_limit is not None:
        chosen["memory_limit"] = parse_bytes(memory_limit)
    settings = AdaptSettings(**{key: value for key, value in chosen.items() if value is not None})
    with Display(quiet=json) as display:
        record = adapt(
            exported, data, settings, out=out, delta=delta, resume=resume, factory=model, progress=display
        )
    print_json(record) if json else _show(record, out or exported, delta)


def _refuse_beside(option: str, others: dict[str, Any]) -> None:
    from bitsmith.errors import RecipeError

    for name, value in others.items():
        if value is not None:
            named = {"learning_rate": "lr"}.get(name, name.replace("_", "-"))
            raise RecipeError(f"nothing is trained with {option}", where=f"--{named}", remedy="Leave one out")


def _from_files(
    base: Path,
    copies: list[Path] | None,
    delta: Path | None,
    out: Path | None,
    rounding: str | None,
    seed: int | None,
    json: bool,
) -> None:
    from bitsmith.recipe.adapt_files import apply_to, merge_copies

    if delta is not None:
        record, what = apply_to(base, delta, out), f"{delta} applied"
    else:
        record = merge_copies(base, copies or [], out, rounding=rounding or "stochastic", seed=seed or 0)
        what = f"{len(copies or [])} copies merged"
    if json:
        print_json(record)
    else:
        output().print(f"{what}: {out or base}, {record['result'][:12]}")


def _show(record: dict[str, Any], place: Path, delta: Path | None) -> None:
    from bitsmith.report.words import percent, size

    def figure(name: str, value: float) -> str:
        return percent(value, 2) if "accuracy" in name or "iou" in name else f"{value:.4g}"

    before, after = record["before"], record["after"]
    rows = [(n.replace("_", " "), figure(n, before[n]), figure(n, after[n])) for n in after]
    output().print(table(f"{record['data']}: the test split", ("", "before", "after"), rows))
    layers = record["layers"]
    forward = record["settings"].get("mode") == "zeroth_order"
    on = "by forward passes, beside their codes" if forward else "on their codes"
    values = {
        "trained": f"{len(layers['trained'])} layers {on}, {record['steps']} steps of "
        f"{record['batch_size']} in {record['seconds']:.1f} s",
        "codes changed": percent(record["changed"], 1),
        "steps cut off at the ends of the grid": percent(record["saturated"], 2),
        "frozen": ", ".join(layers["frozen"]) or "nothing",
        "in float": ", ".join(record["float"]) or "scales alone",
        "memory": f"{size(record['memory']['total'])} beside the libraries, as it was said",
        "written to": str(place),
    }
    if delta is not None:
        values["delta"] = f"{delta}, {size(record['delta_bytes'])}"
    output().print(facts("", values))
