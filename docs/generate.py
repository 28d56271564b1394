"""Writes docs/recipe.md and docs/targets.md from the code: `make docs`.

Names, defaults, choices and ranges come from the code; only the meaning of a key is written here, and a key
without one stops the generator. tests/docs/test_documents.py fails while a page is not what this writes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitsmith.post_training.rounding import ROUNDINGS
from bitsmith.quantization.scheme import CHOICES as SCHEME_CHOICES
from bitsmith.quantization.scheme import Scheme
from bitsmith.quantization.target import TARGETS, Target
from bitsmith.recipe.load import DEFAULT
from bitsmith.recipe.methods import METHODS, method_class
from bitsmith.recipe.schema import EXPORTS, PostTraining, Quantize, Recipe
from bitsmith.tasks.suites import SUITES, WHOLE
from bitsmith.train.config import CHOICES as TRAIN_CHOICES
from bitsmith.train.config import RANGES, TrainConfig

FOLDER = Path(__file__).parent

INTRODUCTION = """\
# Recipe

A recipe is one YAML file that says what `bitsmith run` does. Every key has a default; a key that is not below is
refused with the nearest known name. `--set` changes one value: `bitsmith run my.yaml --set train.epochs=40
--set 'quantize.overrides."fc.weight".bits=8'`; `--set quantize.overrides={{}}` removes all overrides, which another model
may need. The resolved recipe is saved in the run directory as `recipe.yaml`, and running that file again gives the
same result.

Relative paths in a recipe's file (`npz:`, `folder:`, `domains:`, `masks:` and `text:` data, `hf:` folders, `pretrained`, `plan`, a target's or a table's `.json`) are
meant from that file's folder, so that a recipe and its files can be moved together; paths given by `--set` are meant
from the current directory.

This page is generated from the schema (`make docs`).

## The default

`bitsmith run` without a recipe does this:

```yaml
{default}```
"""

MEANING = {
    "model": "what to train: a built-in name (digits_cnn, digits_vit, unet, resnet20, resnet32, resnet56, mlp, byte_llama), "
    "`hf:PATH` of a causal language model of transformers ([language modelling](language.md)) or "
    "`package.module:factory`; a mapping `{name: ..., arguments: {...}}` passes arguments",
    "data": "`digits` (scikit-learn's), `npz:FILE`, `folder:DIR`, `domains:PATH`, `digit_scenes`, `masks:DIR` ([segmentation](segmentation.md)), `breast_cancer`, `pydoc`, `text:PATH`, `arithmetic` or `package.module:factory`; "
    "with arguments as for `model`",
    "pretrained": "a safetensors file with the float weights, such as `checkpoints/float.safetensors` of an earlier run; "
    "without it the float model is trained first",
    "target": "where the model will run; it owns the grid, so it is chosen before training",
    "quantize": "what is quantized, and how: see below",
    "post_training": "how weights are rounded before training, see below; without it each to nearest. "
    "`train.epochs: 0` delivers what it gives; not with a method that decides widths",
    "plan": "a `plan.json` whose bit-widths are taken over",
    "methods": "a list of methods with their options",
    "train": "the quantization-aware training: see below",
    "float": "the training of the float baseline: the keys of `train`; what it does not say is taken from there",
    "shift": "the [suite of shifts](shifts.md) that the float and the delivered model are measured under at the end, "
    "or `{suite: ..., severities: [1, 3, 5]}`; a shift's figure is the mean over its severities",
    "flatness": "whether to measure at the end [how flat](methods/flatness.md#measuring-flatness) the float and the "
    "quantized model lie, with pictures in the report: `true`, or `{rows: 512, radius: 0.005, points: 11}` with what "
    "differs of these defaults (training rows, how far sharpness looks, points along each axis of a picture). It takes "
    "about points² passes through the rows for each model",
    "export": "the files to write, each compared with the trained model; `target: research` has no ONNX file",
    "quantize.weights": "a scheme, see below; weights are per channel unless it says otherwise",
    "quantize.activations": "a scheme for the inputs of all multiplying layers; null leaves them in float",
    "quantize.overrides": "glob on site names → changed fields of the scheme; the last match wins, and a glob that "
    "matches nothing is an error",
    "quantize.first_last_bits": "bit-width of the first and the last layer, unless overridden; null: like all others",
    "quantize.calibration_samples": "training samples that ranges are calibrated on",
    "quantize.outliers": "input channels of Linear layers whose values dwarf the others (largest value over the calibration samples more than `above` times the median channel's; at most a `share` of a layer's, at least one) become [a layer of their own](methods/output_approximation.md), with `bits` for its weight and its input: `{share: 0.01, above: 4, bits: 8, layers: null}` with what differs of these (`layers`: globs). `fc` is then `fc.rest` and `fc.outliers` in overrides, plan and file",
    "post_training.rounding": "what puts weights on their grids, layer by layer",
    "post_training.matching": "move each weight first to where it gives the float model's outputs: "
    "[output matching](methods/output_matching.md)",
    "post_training.alpha": "how much of the inputs' error is made up for; null: found on held-out samples",
    "post_training.beta": "how much of the residual stream's; null: found on held-out samples",
    "post_training.norm": "count tokens as the norm behind an addition does",
    "post_training.damping": "share of the mean of the Hessian's diagonal that is added to it",
    "post_training.order": "columns of strong inputs first",
    "post_training.refit": "calibrate each range anew on the weight that is to be rounded",
    "post_training.correction": "of `gptaq`: the share of its correction that is taken; its authors' code takes 0.25",
    "post_training.samples": "training samples that it looks at",
    "scheme.bits": "1 to 8; 32 leaves the site in float; of a weight per channel also a list, one width for each output "
    "channel",
    "scheme.granularity": "what shares a scale; `token` is for activations with `range: dynamic`",
    "scheme.group_size": "values per group, with `granularity: group`; the last of a row may be ragged where the target "
    "holds that",
    "scheme.grid": "which values a code stands for; `auto`: by bit-width and by what calibration sees, never asymmetric "
    "where the range is dynamic; `powers_of_two` and `levels` are for weights of 2 to 4 bits: "
    "[non-uniform grids](non_uniform.md)",
    "scheme.range": "where the scale comes from: learned (`lsq`, `lsq+`, `pact`), from the weights (`dorefa`), as "
    "calibrated (`static`), or from each tensor as it comes (`dynamic`)",
    "scheme.calibration": "where the scale starts",
    "scheme.estimator": "what stands in for the derivative of rounding",
    "train.epochs": "passes over the training part",
    "train.batch_size": "samples that one optimizer step sees",
    "train.optimizer": "AdamW, or SGD with momentum",
    "train.learning_rate": "the peak rate",
    "train.weight_decay": "on weights; never on biases, norms and ranges",
    "train.range_learning_rate_factor": "learned ranges and levels train at `learning_rate` times this",
    "train.schedule": "of the learning rate; `wsd` is warm-up, stable, decay",
    "train.warmup": "share of the steps in which the rate rises",
    "train.cooldown": "share of the steps in which `wsd` decays",
    "train.gradient_clip": "largest gradient norm; 0: no clipping",
    "train.accumulation": "micro-batches that a batch is split into, to save memory",
    "train.precision": "of the forward; `auto` takes bfloat16 where a measurement shows that it is faster here",
    "train.distillation": "share of the loss that comes from the float model",
    "train.temperature": "of the distillation",
    "train.label_smoothing": "of the cross entropy",
    "train.ema": "decay of the average of the weights; 0: none",
    "train.seed": "decides everything random; one seed makes a CPU run bit-exact",
    "train.device": "`auto` is the GPU where PyTorch sees one",
}


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")


def pages() -> dict[str, str]:
    """Name -> the whole page, as it should stand in docs/."""
    return {"recipe.md": recipe(), "targets.md": targets()}


def recipe() -> str:
    """The reference of the recipe."""
    missing = sorted(set(keys()) ^ set(MEANING))
    if missing:
        raise SystemExit(f"docs/generate.py: MEANING and the schema differ in {', '.join(missing)}")
    sections = [
        INTRODUCTION.format(default=DEFAULT.read_text(encoding="utf-8")),
        table("Keys", "", recipe_rows()),
        table("`quantize`", "quantize.", quantize_rows()),
        table(
            "A scheme: `quantize.weights`, `quantize.activations`, and each override",
            "scheme.",
            scheme_rows(),
        ),
        table("`post_training`", "post_training.", post_training_rows()),
        table("`train` and `float`", "train.", train_rows()),
        methods(),
    ]
    return "\n".join(sections)


def keys() -> list[str]:
    """Every key of the schema, with its section."""
    sections = {
        "": recipe_rows(),
        "quantize.": quantize_rows(),
        "scheme.": scheme_rows(),
        "post_training.": post_training_rows(),
        "train.": train_rows(),
    }
    return [prefix + name for prefix, rows in sections.items() for name, *_ in rows]


TARGETS_INTRODUCTION = """\
# Targets

A target is where the model will run, and so what can be stored there exactly. It is chosen before training, because
it owns the grid: what it does not hold is refused by `prepare` (`bitsmith run --dry-run` shows it before anything is
trained), and the codes that are trained are the codes that are exported.

Bits in the file: a width that a format does not have is stored in the next wider container, exactly; the cost counts
the container. Activations may have any width from 1 to 8 with every target; they are never stored. Where the output
channels of a weight have widths of their own, a target stores each channel at its width, all in the container of the
widest, or refuses it.

Weights in groups have a scale for each group, also for a ragged last one (not in `onnxruntime`), and on an asymmetric
grid a zero point, stored at the width of the codes: see [layers and weight formats](layers.md).

These targets are built in. A device of your own is described in a JSON file, which is named wherever a target is: see
[Targets of your own](custom_targets.md).

This page is generated from `quantization/target.py` (`make docs`).
"""


CHANNEL_WIDTHS = {
    "own": "each channel is stored at its width",
    "widest": "all channels of a weight are stored in the container of the widest",
    "none": "refused",
}


def targets() -> str:
    """What each built-in target holds."""
    return "\n".join([TARGETS_INTRODUCTION, *(target(one) for one in TARGETS.values())])


def target(one: Target) -> str:
    """The section of one target."""
    containers = "".join(f" {width} |" for width in one.weight_containers)
    sizes = "".join(f" {size} |" for size in one.weight_containers.values())
    dynamic = "learned, static or dynamic" if one.dynamic_activations else "learned or static"
    return "\n".join(
        [
            f"## {one.name}",
            "",
            f"Runs in: {one.runs}.",
            "",
            f"| Bits of a weight |{containers}",
            f"| --- |{' --- |' * len(one.weight_containers)}",
            f"| Bits in the file |{sizes}",
            "",
            f"- Weights share a scale per {', '.join(one.weight_granularities)}; grids: {choices(one.weight_grids)}.",
            f"- Widths per channel: {CHANNEL_WIDTHS[one.channel_widths]}.",
            f"- Activations share a scale per {', '.join(one.activation_granularities)}; ranges: {dynamic}.",
            "",
        ]
    )


Row = tuple[str, str, str]  # key, default, values


def recipe_rows() -> Iterator[Row]:
    suites = f"{choices((*WHOLE, *SUITES))}, or names of shifts joined by commas"
    values = {
        "target": choices(TARGETS),
        "export": choices(EXPORTS),
        "shift": suites,
        "flatness": "`false`, `true`, or a mapping",
    }
    shown = {
        "model": "digits_cnn",
        "data": "digits",
        "export": f"[{', '.join(EXPORTS)}]",
        "methods": "[]",
        "target": "native",
        "shift": "default",
        "flatness": "false",
    }
    for name, field in Recipe.model_fields.items():
        key = field.alias or name
        yield key, shown.get(key, ""), values.get(key, "")


def quantize_rows() -> Iterator[Row]:
    for name, field in Quantize.model_fields.items():
        default = field.get_default(call_default_factory=True)
        yield name, scheme(default) if isinstance(default, Scheme) else text(default), ""


def post_training_rows() -> Iterator[Row]:
    ranges = {"alpha": "0 to 1", "beta": "0 to 1", "damping": "0 or more", "correction": "0 to 1"}
    values = {"rounding": choices(ROUNDINGS), **ranges}
    for name, field in PostTraining.model_fields.items():
        yield name, text(field.default), values.get(name, "")


def scheme_rows() -> Iterator[Row]:
    for field in dataclasses.fields(Scheme):
        yield field.name, text(field.default), choices(SCHEME_CHOICES.get(field.name, ()))


def train_rows() -> Iterator[Row]:
    for field in dataclasses.fields(TrainConfig):
        values = RANGES[field.name][2] if field.name in RANGES else choices(TRAIN_CHOICES.get(field.name, ()))
        yield field.name, text(field.default), values


def methods() -> str:
    rows = []
    for name in METHODS:
        kind = method_class(name)
        options = ", ".join(f"`{key}`" for key in inspect.signature(kind).parameters if key != "example")
        rows.append(f"| `{name}` | `{kind.__name__}` | {options} |")
    return "\n".join(["## Methods\n", "| Name | Class | Options |", "| --- | --- | --- |", *rows, ""])


def table(title: str, prefix: str, rows: Iterator[Row]) -> str:
    lines = [f"## {title}", "", "| Key | Default | Values | Meaning |", "| --- | --- | --- | --- |"]
    for name, default, values in rows:
        default = f"`{default}`" if default else ""
        lines.append(f"| `{name}` | {default} | {values} | {MEANING[prefix + name]} |")
    return "\n".join([*lines, ""])


def choices(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def scheme(value: Scheme) -> str:
    """Only what differs from Scheme(), as a recipe would write it."""
    changed = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.name == "bits" or getattr(value, field.name) != field.default
    }
    return "{" + ", ".join(f"{name}: {text(item)}" for name, item in changed.items()) + "}"


def text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
