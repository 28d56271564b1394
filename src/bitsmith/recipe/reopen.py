"""What can be done with a finished run: look at it, measure it again, export it again.

A run directory may come from anywhere, so nothing that it names is imported: a model or data set that is
code (``module:factory``) must be named by the user, on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bitsmith.errors import FormatError, RecipeError, listing, nearest
from bitsmith.export import load as load_model
from bitsmith.export import verify
from bitsmith.files import read_json, write_json
from bitsmith.quantization import Plan
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import PackedWeight, packed_sites
from bitsmith.recipe.deliver import write_exports
from bitsmith.recipe.directory import load_stage, stage_path
from bitsmith.recipe.job import prepare_sites
from bitsmith.recipe.load import load_recipe
from bitsmith.recipe.schema import EXPORTS, NO_RUNTIME, Recipe
from bitsmith.tasks import Examples, TextData, build
from bitsmith.tasks import load as load_data
from bitsmith.tasks.data import LOADERS
from bitsmith.tasks.models import HUB, MODELS, NOT_STRUCTURE
from bitsmith.tasks.questions import Question, read_questions
from bitsmith.tasks.scoring import MOST_TOKENS, score
from bitsmith.tasks.shifts import SHIFTS


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
    path: Path, *, data: str | None = None, shift: str | None = None, factory: str | None = None
) -> dict[str, Any]:
    """The metrics of a run's packed model on its test split, or on that of ``data``.

    ``shift``: the name of a shift, or "all". Raises RecipeError, FormatError, DataError.
    """
    if shift not in (None, "all", *SHIFTS):
        near = nearest(str(shift), SHIFTS, 1)
        raise RecipeError(
            "there is no such shift",
            where="--shift",
            got=shift,
            expected=f"all, {listing(SHIFTS)}",
            remedy=f"Did you mean {near[0]}?" if near else "",
        )
    model, examples = reopen(path, data, factory)
    shifts: dict[str, float] = {}
    if shift is not None:
        found = examples.shifts(model)
        if not found:
            raise RecipeError(
                "no shift is known of these data",
                where="--shift",
                got=examples.name,
                expected="images",
                remedy="Leave --shift out",
            )
        if shift != "all" and shift not in found:
            raise RecipeError(
                "this shift is not for these data",
                where="--shift",
                got=f"{shift} for {examples.name}",
                expected=f"all, {listing(name for name in found if name != 'mean')}",
            )
        shifts = found if shift == "all" else {shift: found[shift]}
    return {
        "run": str(path),
        "data": examples.name,
        examples.unit: len(examples.test_x),
        **examples.evaluate(model, examples.test_x, examples.test_y),
        "shift": shifts,
    }


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
    untouched = recipe.model.name.startswith(HUB) and not (recipe.float_train or recipe.pretrained or factory)
    if stage is None and not untouched:
        return None
    model = _float_model(path, recipe, factory)
    if stage is not None:
        model.load_state_dict(stage[0])
    return model


def reopen(path: Path, data: str | None, factory: str | None) -> tuple[nn.Module, Examples]:
    """The packed model of a run, and data for it. Raises RecipeError where code would have to be named."""
    recipe = _recipe(path)
    examples = _data(path, recipe, data)
    return _packed(path, recipe, factory), examples


def _packed(path: Path, recipe: Recipe, factory: str | None) -> nn.Module:
    if recipe.model.name in MODELS and factory is None:
        return load_model(path / "model")
    return load_model(path / "model", into=_float_model(path, recipe, factory))


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
        known = name in MODELS or name.startswith(HUB)
        if not known if kind == "model" else name.partition(":")[0] not in LOADERS:
            raise RecipeError(
                f"this run's {kind} is made by code, which is not taken from a run directory",
                where=str(path),
                got=name,
                remedy=f"Name it yourself: {cure or f'--{kind} {name}'}",
            )


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
    model = _float_model(path, recipe, factory)
    searched = load_stage(path, "winner")
    plan = Plan.load(path / "plan.json") if recipe.plan is not None or searched is not None else None
    prepare_sites(recipe.model_copy(update={"methods": []}), model, plan, examples.example())
    stage = searched or load_stage(path, "qat")
    if stage is None:
        raise FormatError(
            "there is no such checkpoint",
            where=str(stage_path(path, "qat")),
            expected="what a finished `bitsmith run` leaves behind",
            remedy="Finish the run with --resume",
        )
    model.load_state_dict(stage[0])
    packed = finalize(model.eval(), examples.example())
    paths = write_exports(packed, formats, path, examples.example())
    certificate = verify(model, packed, paths, *examples.verified(), score=examples.score)
    if (path / "certificate.json").exists():  # the files of other formats are still there
        before = read_json(path / "certificate.json", "certificate")
        certificate["exports"] = {**before.get("exports", {}), **certificate["exports"]}
    write_json(path / "certificate.json", certificate)
    return certificate, paths
