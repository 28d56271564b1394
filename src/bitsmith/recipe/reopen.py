"""What can be done with a finished run: look at it, measure it again, export it again.

A run directory may come from anywhere, so nothing that it names is imported: a model or data set that is
code (``module:factory``) must be named by the user, on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitsmith.errors import BitsmithError, FormatError, RecipeError, listing, nearest
from bitsmith.export import load as load_model
from bitsmith.export import verify
from bitsmith.files import read_json, write_json
from bitsmith.quantization import Plan
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import PackedWeight, packed_sites
from bitsmith.recipe import flatness, shifts
from bitsmith.recipe.competition import at_widths
from bitsmith.recipe.composition import deciders
from bitsmith.recipe.deliver import write_exports
from bitsmith.recipe.directory import load_stage, stage_path
from bitsmith.recipe.job import prepare_sites
from bitsmith.recipe.load import load_recipe
from bitsmith.recipe.outliers import split_again
from bitsmith.recipe.schema import EXPORTS, NO_RUNTIME, Flatness, Recipe
from bitsmith.report import write_flatness_page, write_shift_page
from bitsmith.tasks import Data, Examples, TextData, build
from bitsmith.tasks import load as load_data
from bitsmith.tasks.convert import like
from bitsmith.tasks.data import LOADERS
from bitsmith.tasks.models import HUB, MODELS, NOT_STRUCTURE
from bitsmith.tasks.questions import Question, read_questions
from bitsmith.tasks.resnet import load_weights
from bitsmith.tasks.scoring import MOST_TOKENS, score
from bitsmith.tasks.shifts import SEVERITIES, check_severities
from bitsmith.tasks.suites import chosen


def inspect_path(path: Path) -> dict[str, Any]:
    """Sites, layers, leftovers and totals of a run directory, or the sites of a native model directory."""
    if (path / "metrics.json").exists():
        return _inspect_run(path)
    if (path / "config.json").exists():
        return {"sites": _packed_sites(load_model(path))}
    kind = "has neither metrics.json nor config.json" if path.is_dir() else "is not a directory"
    raise FormatError(
        f"this is no run and no model: it {kind}" if path.exists() else "there is no such directory",
        where=str(path),
        expected="a run directory, or the model/ in it",
        remedy="Give the --out of a finished `bitsmith run`",
    )


def _inspect_run(path: Path) -> dict[str, Any]:
    metrics = read_json(path / "metrics.json", "metrics file")
    plan = read_json(path / "plan.json", "plan")
    coverage = read_json(path / "coverage.json", "coverage report")
    cost: Mapping[str, Any] = metrics["cost"]
    return {
        "run": str(path),
        "target": plan["target"],
        "sites": [{"name": name, **site} for name, site in plan["sites"].items()],
        "layers": plan["cost"]["layers"],
        "leftovers": coverage["leftovers"],
        "totals": {
            "parameters": coverage["parameters"],
            "quantized share": coverage["quantized_share"],
            **{
                name.replace("_", " "): value
                for name, value in cost.items()
                if isinstance(value, int | float)
            },
        },
    }


def _packed_sites(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "kind": "weight" if isinstance(site, PackedWeight) else "activation",
            "bits": site.form.bits,
            "grid": site.form.grid,
            "granularity": site.form.granularity,
            "group_size": site.form.group_size,
        }
        for name, site in packed_sites(model).items()
    ]


def evaluate_run(
    path: Path,
    *,
    data: str | None = None,
    shift: str | None = None,
    severities: Sequence[int] | None = None,
    page: Path | None = None,
    factory: str | None = None,
) -> dict[str, Any]:
    """The metrics of a run's packed model on its test split, or on that of ``data``.

    ``shift``: a suite (tasks.suites); then its float model is measured as well, where the run kept it. At
    ``severities``, or else at all of them, while figures are the means of those that the recipe names.
    ``page``: the file that is written to show all of it. Raises RecipeError, FormatError, DataError.
    """
    recipe = _recipe(path)
    examples, converted = _fitting(path, recipe, data)
    model = _packed(path, recipe, factory)
    result = {
        "run": str(path),
        "data": examples.name,
        **({"converted": converted} if converted else {}),
        examples.unit: len(examples.test_x),
        **examples.evaluate(model, examples.test_x, examples.test_y),
        "shift": {},
    }
    if shift is None:
        return result
    suite = recipe.shift.suite if shift == "default" else shift  # what the run itself measured
    if severities is not None:
        check_severities(severities, "--severity")
    attacks = any(one.attacks for one in chosen(examples, suite, "--shift"))
    models = {"float": _kept_float(path, recipe, factory), "quantized": model}
    known = {name: one for name, one in models.items() if one is not None}
    trained = {"quantized": _trained(path, recipe, factory, examples.example())} if attacks else {}
    over = tuple(severities or recipe.shift.severities)
    found = shifts.measure(
        known,
        trained,
        examples,
        suite,
        sorted(set(severities or SEVERITIES)),
        over=over,
        where="--shift",
    )
    if page is not None:
        write_shift_page(found, shifts.drawn(found, known | trained, examples), page, str(path))
    return result | {"shift": shifts.accuracies(found), "shifts": found}


def flatness_of_run(
    path: Path,
    *,
    radius: float | None = None,
    rows: int | None = None,
    data: str | None = None,
    page: Path | None = None,
    factory: str | None = None,
) -> dict[str, Any]:
    """How flat a run's models lie, as flatness.json has it: the float model where the run kept it, the one
    that was delivered as it was trained, and the uniform competitor of a search that won.

    ``radius``, ``rows``: instead of those of the recipe, or of the defaults. On training rows of the run's
    data, or of ``data``. ``page``: the file that is written to picture it. Raises RecipeError, FormatError,
    DataError, SchemeError.
    """
    recipe = _recipe(path)
    examples, _ = _fitting(path, recipe, data)
    models = {
        "float": _kept_float(path, recipe, factory),
        "quantized": _trained(path, recipe, factory, examples.example()),
        "uniform": _competitor(path, recipe, factory, examples.example()),
    }
    known = {name: model for name, model in models.items() if model is not None}
    asked = {"radius": radius, "rows": rows}
    spec = (recipe.flatness or Flatness()).model_copy(
        update={key: value for key, value in asked.items() if value is not None}
    )
    found = flatness.measure(known, examples, spec, recipe.train.seed, surfaces=page is not None)
    if page is not None:
        write_flatness_page(found, page, str(path))
    return {"run": str(path), **found}


def data_of_run(path: Path, data: str | None = None) -> Examples:
    """What a run was measured on, or ``data`` as its model takes them. Raises RecipeError, DataError."""
    return _fitting(path, _recipe(path), data)[0]


def model_of_run(path: Path, name: str, *, factory: str | None = None) -> nn.Module | None:
    """Of a run the model "float32" (None where it was not kept), "native", or "dequantized": the same by
    floats. Raises RecipeError, FormatError."""
    recipe = _recipe(path)
    if name == "float32":
        return _kept_float(path, recipe, factory)
    return _packed(path, recipe, factory, kernels=name == "native")


def _fitting(path: Path, recipe: Recipe, data: str | None) -> tuple[Examples, str]:
    """The data, images as large and coloured as the run's own; and how they were converted, in words."""
    examples = _data(path, recipe, data)
    if data is None or not isinstance(examples, Data) or not _is_known("data", recipe.data.name):
        return examples, ""
    try:
        own = _data(path, recipe, None)
    except BitsmithError:  # its files are elsewhere by now: the images are taken as they are
        return examples, ""
    if not isinstance(own, Data):
        return examples, ""
    sizes = ["x".join(str(length) for length in one.shape) for one in (examples, own)]
    return like(examples, own), " to ".join(sizes) if sizes[0] != sizes[1] else ""


def ask_run(
    path: Path,
    questions: Path,
    *,
    limit: int | None = None,
    data: str | None = None,
    factory: str | None = None,
) -> dict[str, Any]:
    """The scores of a run's packed model on a file of questions, the first ``limit`` of them, and of its
    float model: that of its float stage, or of the folder that an ``hf:`` recipe began with; None where there
    is none. The tokenizer is that of the run's data, or of ``data``. Raises RecipeError, FormatError,
    DataError.
    """
    recipe = _recipe(path)
    asked = read_questions(questions, limit)
    examples = _data(path, recipe, data)
    if not isinstance(examples, TextData):
        raise RecipeError(
            "only language models answer questions",
            where="--questions",
            got=f"a run on {examples.unit} ({examples.name})",
            expected="a run on text",
            remedy="Leave --questions out",
        )
    found: dict[str, Any] = {"run": str(path), "file": str(questions), "questions": len(asked)}
    models = {"float": _kept_float(path, recipe, factory), "quantized": _packed(path, recipe, factory)}
    for name, model in models.items():
        found[name] = None if model is None else _scores(model, examples, asked)
    return found


def _scores(model: nn.Module, data: TextData, asked: Sequence[Question]) -> dict[str, float]:
    """Without their number, as many rows at once as their logits allow; one where a range is taken over all
    rows of a batch."""
    context = getattr(model, "context", None) or data.context
    longest = max(len(data.tokenizer.encode(question.prompt)) for question in asked) + MOST_TOKENS
    rows = max(1, data.batch_rows * data.context // min(context, longest))
    forms = [site.form for site in packed_sites(model).values()]
    if any(form.dynamic and form.granularity == "tensor" for form in forms):
        rows = 1
    found = score(model, data.tokenizer, asked, context=context, batch_size=rows).metrics()
    return {name: value for name, value in found.items() if name != "questions"}


def _kept_float(path: Path, recipe: Recipe, factory: str | None) -> nn.Module | None:
    """The float model that a run started from, where the run kept it or can name it without code."""
    stage = load_stage(path, "float")
    weights = recipe.pretrained or recipe.model.arguments.get("weights")
    given = weights is not None and Path(weights).exists() and not recipe.float_train
    untouched = recipe.model.name.startswith(HUB) and not (recipe.float_train or weights or factory)
    if stage is None and not untouched and not given:
        return None
    model = _float_model(path, recipe, factory)
    if stage is not None:
        model.load_state_dict(stage[0])
    elif given and weights is not None:
        load_weights(model, weights)
    return model.eval()


def _packed(path: Path, recipe: Recipe, factory: str | None, *, kernels: bool = False) -> nn.Module:
    """The packed model of a run; without ``kernels`` it repeats the run's own figures to the last bit."""
    if recipe.model.name in MODELS and factory is None:
        return load_model(path / "model", kernels=kernels)
    return load_model(path / "model", into=_float_model(path, recipe, factory), kernels=kernels)


def _recipe(path: Path) -> Recipe:
    if not (path / "recipe.yaml").exists():
        raise FormatError(
            "this is not a run directory: it has no recipe.yaml"
            if path.is_dir()
            else "there is no such run directory",
            where=str(path),
            remedy="Give the --out of a finished `bitsmith run`",
        )
    return load_recipe(path / "recipe.yaml")


def _float_model(path: Path, recipe: Recipe, factory: str | None) -> nn.Module:
    """The model as it was before quantization, with whatever weights: the file's own replace them."""
    name = factory or recipe.model.name
    if factory is None:
        refuse_code(path, recipe, "", "model")
    return build(name, **{k: v for k, v in recipe.model.arguments.items() if k not in NOT_STRUCTURE})


def _data(path: Path, recipe: Recipe, data: str | None) -> Examples:
    model = recipe.model.name
    if data is not None:
        return load_data(data, model=model)
    refuse_code(path, recipe, "", "data")
    return load_data(recipe.data.name, **{"seed": recipe.train.seed, "model": model, **recipe.data.arguments})


def refuse_code(path: Path, recipe: Recipe, cure: str = "", *kinds: str) -> None:
    """Raise RecipeError where a recipe read from the run directory ``path`` names ``module:factory``.

    kinds: "model", "data", or both where none is given. cure: the command line to use instead.
    """
    names = {"model": recipe.model.name, "data": recipe.data.name}
    for kind in kinds or names:
        name = names[kind]
        if not _is_known(kind, name):
            raise RecipeError(
                f"this run's {kind} is made by code, which is not taken from a run directory",
                where=str(path),
                got=name,
                remedy=f"Name it yourself: {cure or f'--{kind} {name}'}",
            )


def _is_known(kind: str, name: str) -> bool:
    """Whether a model or data set of this name is made without code of the user's."""
    if kind == "model":
        return name in MODELS or name.startswith(HUB)
    return name.partition(":")[0] in LOADERS


def check_exports(names: Sequence[str]) -> None:
    """Refuse a format that there is not, with the nearest name. Raises RecipeError."""
    for name in names:
        if name not in EXPORTS:
            near = nearest(name, EXPORTS, 1)
            raise RecipeError(
                "there is no such export format",
                where="--to",
                got=name,
                expected=listing(EXPORTS),
                remedy=f"Did you mean {near[0]}?" if near else "",
            )


def export_run(
    path: Path, formats: Sequence[str], *, data: str | None = None, factory: str | None = None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Export the trained model of a run again; returns (certificate, format -> path).

    The model comes from the run's checkpoint, not from an exported file: there is one origin of codes.
    """
    check_exports(formats)
    recipe = _recipe(path)
    if recipe.target == NO_RUNTIME and "onnx" in formats:
        raise RecipeError(
            f"this run was trained for target {NO_RUNTIME}, which has no runtime, so no ONNX file",
            where="--to",
            got=", ".join(formats),
            expected="native",
            remedy="Give --to native, or run the recipe again with target: onnxruntime",
        )
    examples = _data(path, recipe, data)
    model = _trained(path, recipe, factory, examples.example())
    packed = finalize(model, examples.example())
    paths = write_exports(packed, formats, path, examples.example())
    certificate = verify(model, packed, paths, *examples.verified(), score=examples.score)
    if (path / "certificate.json").exists():  # the files of other formats are still there
        before = read_json(path / "certificate.json", "certificate")
        certificate["exports"] = {**before.get("exports", {}), **certificate["exports"]}
    write_json(path / "certificate.json", certificate)
    return certificate, paths


def _trained(path: Path, recipe: Recipe, factory: str | None, example: Tensor) -> nn.Module:
    """The model that was delivered as it was trained: quantizers with their estimators, in eval mode."""
    model = split_again(recipe, _float_model(path, recipe, factory), path)
    searched = load_stage(path, "winner")
    learned = deciders({name: options for entry in recipe.methods for name, options in entry.items()})
    plan = Plan.load(path / "plan.json") if recipe.plan is not None or searched or learned else None
    prepare_sites(recipe.model_copy(update={"methods": []}), model, plan, example)
    stage = searched or load_stage(path, "qat")
    if stage is None:
        raise FormatError(
            "there is no such checkpoint",
            where=str(stage_path(path, "qat")),
            expected="what a finished `bitsmith run` leaves behind",
            remedy="Finish the run with --resume",
        )
    model.load_state_dict(stage[0])
    return model.eval()


def _competitor(path: Path, recipe: Recipe, factory: str | None, example: Tensor) -> nn.Module | None:
    """The uniform competitor as it was trained; None where there was none, or where it was delivered."""
    metrics = read_json(path / "metrics.json", "metrics file")
    stage = load_stage(path, "uniform")
    widths = (metrics.get("uniform") or {}).get("sites")
    if stage is None or widths is None or metrics.get("winner") != "searched":
        return None
    model = split_again(recipe, _float_model(path, recipe, factory), path)
    prepare_sites(at_widths(recipe, widths).model_copy(update={"methods": []}), model, None, example)
    model.load_state_dict(stage[0])
    return model.eval()
