"""`run`: the whole job of a recipe, from a float model to a verified and explained low-bit one.

The order is here, the work is on the floors below. Each of the trainings is a stage: once finished it is
in `checkpoints/` and a resumed run does not do it again; what follows is quick and simply repeated. A search
makes a third one, its uniform competitor. Nothing here prints: whoever watches hands in a callback.
"""

from __future__ import annotations

import copy
import glob
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import BudgetError, SiteError, TargetError, TrainingDiverged
from bitsmith.files import read_json, write_json
from bitsmith.methods import Method
from bitsmith.quantization import (
    Coverage,
    Plan,
    calibrate,
    collapse,
    commit,
    plan_of,
    prepare,
    reestimate_batchnorm,
)
from bitsmith.recipe import competition, modes, outliers, rounding
from bitsmith.recipe.deliver import Coded, deliver
from bitsmith.recipe.directory import load_stage, open_run, save_stage, stage_path
from bitsmith.recipe.limits import search_options
from bitsmith.recipe.methods import build_methods
from bitsmith.recipe.progress import Event, Progress, silent
from bitsmith.recipe.schema import Recipe, relocated
from bitsmith.recipe.threads import enough_threads
from bitsmith.tasks import Examples, build, load
from bitsmith.tasks.hub import swaps_of
from bitsmith.tasks.resnet import load_weights
from bitsmith.tasks.suites import chosen
from bitsmith.train import Progress as TrainProgress
from bitsmith.train import TrainConfig, train
from bitsmith.train.modes import make_optimizer

CHECK_SAMPLES = 64
History = dict[str, list[dict[str, Any]]]
REESTIMATION_SAMPLES = 4096  # a few hundred are enough for BatchNorm; more than this only costs time


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    start_values: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Do the job in the directory ``out`` and return its metrics (metrics.json).

    start_values: what a search starts from instead of sensitivities, see `BudgetSearch.start_at`.

    Raises RecipeError where ``out`` holds a run already (unless ``resume``), Interrupted on a signal,
    ExportMismatch where an exported file does not compute what was trained, and whatever the floors raise.
    """
    with open_run(Path(out), recipe, resume) as directory:
        if (directory / "report.html").exists():  # the last file that is written: nothing is left to do
            return read_json(directory / "metrics.json", "metrics file")
        tell = progress or silent
        tell(Event("data", 0))
        data, model = read_inputs(recipe)
        tell(
            Event(
                "data",
                note=f"{data.name}: {len(data.train_x)} training and {len(data.test_x)} test {data.unit}",
            )
        )
        # The floors draw from generators of their own; what PyTorch draws by itself (the weights of a model
        # that is only built to be loaded into) must not move the caller's.
        with (
            torch.random.fork_rng(devices=[]),
            enough_threads(model, data.example(), recipe.train.batch_size),
        ):
            return _run(recipe, directory, data, model, tell, start_values)


def _run(
    recipe: Recipe,
    out: Path,
    data: Examples,
    model: nn.Module,
    tell: Progress,
    start_values: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    # A wrong glob or an idle layer is found out now, and not when the float model is trained.
    outliers.check(recipe, model)
    trial = copy.deepcopy(model)
    quantize(recipe, trial, data.limited(CHECK_SAMPLES))
    rounding.check(recipe, trial, model, data)
    if modes.trains_codes(recipe):
        modes.codes_of(recipe, trial, data.example())

    history: History = {}
    seconds: dict[str, float] = {}
    history["float"], seconds["float"] = train_float(recipe, model, data, out, tell)
    outliers.split(recipe, model, data, out)
    float_model = copy.deepcopy(model).eval()

    tell(Event("post_training", 0))
    started = time.perf_counter()
    coverage, methods = quantize(recipe, model, data)
    write_json(out / "coverage.json", coverage.to_dict())
    rounding.round_weights(recipe, model, float_model, data, out, tell)
    search = competition.searcher(methods)
    if search is not None and start_values is not None:
        search.start_at(start_values)
    elif search is not None:
        competition.start(search, model, data, recipe.train.seed)
    rounded = model if search is None else competition.nearest_rounding(search, model)
    post_training = data.evaluate(rounded, data.test_x, data.test_y)
    seconds["post_training"] = time.perf_counter() - started
    shown = data.figures[0]
    tell(Event("post_training", values={f"test {shown.replace('_', ' ')}": post_training[shown]}))

    student, start = model, {}
    if modes.trains_codes(recipe):
        save_stage(out, modes.START, model.state_dict(), {})
        student = modes.codes_of(recipe, model, data.example())
        start = modes.weight_codes(student)
    facts = train_quantized("qat", recipe, student, methods, float_model, data, out, tell)
    history["qat"], seconds["qat"] = facts["history"], facts["seconds"]
    history["traces"] = facts.get("traces", [])  # not in stages of before they were kept
    learned = {"learned_bits": facts["learned_bits"]} if facts.get("learned_bits") else {}
    outcome = None
    if search is not None:
        model, outcome = compete(recipe, search, float_model, model, data, out, history, seconds, tell)
    write_json(out / "history.json", {"version": 1, **history, **learned})
    coded = None
    if modes.trains_codes(recipe):
        training = modes.told(recipe, student, start, facts["state_bytes_per_weight"])
        coded = Coded(modes.packed_of(student, model), training)
    return deliver(recipe, out, data, float_model, model, post_training, outcome, seconds, tell, coded)


def compete(
    recipe: Recipe,
    search: Any,
    float_model: nn.Module,
    searched: nn.Module,
    data: Examples,
    out: Path,
    history: History,
    seconds: dict[str, float],
    tell: Progress,
) -> tuple[nn.Module, competition.Outcome]:
    """Train the uniform competitor as long, and let the validation split decide. Returns the winner."""
    facts: dict[str, dict[str, Any]] = {"searched": {**competition.standing(searched, data)}}
    bits = plan_of(searched).bits
    winner, model = "searched", searched
    try:
        other, widths = competition.uniform_recipe(recipe, search)
    except BudgetError:  # no (b, b) plan fits: there is no competitor
        facts["uniform"] = {}
    else:
        uniform = copy.deepcopy(float_model)
        _, methods = quantize(other, uniform, data)
        trained = train_quantized("uniform", other, uniform, methods, float_model, data, out, tell)
        history["uniform"], seconds["uniform"] = trained["history"], trained["seconds"]
        facts["uniform"] = {
            "bits": competition.describe_uniform(widths, search),
            **competition.standing(uniform, data),
            "cost": search.cost.exact(widths),
            "sites": widths,
        }
        if competition.is_ahead(facts["uniform"], facts["searched"], search.cost, widths, bits, data.rank):
            winner, model, bits = "uniform", uniform, widths
    save_stage(out, "winner", model.state_dict(), {"winner": winner})
    budget = competition.budget_entries(search, bits)
    tables = tuple(search.cost.tables.values())
    return model, competition.Outcome(winner, facts["searched"], facts["uniform"] or None, budget, tables)


def read_inputs(recipe: Recipe) -> tuple[Examples, nn.Module]:
    """The recipe's data, and its float model as the job starts with it."""
    data = load(
        recipe.data.name,
        **{"seed": recipe.train.seed, "model": recipe.model.name, **recipe.data.arguments},
    )
    model = build(recipe.model.name, **{"seed": recipe.train.seed, **recipe.model.arguments})
    if recipe.pretrained is not None:
        load_weights(model, recipe.pretrained)
    data.check(model, recipe.quantize.calibration_samples)
    chosen(data, recipe.shift.suite, "shift.suite")  # a suite of other data is found out now
    return data, model


def train_float(
    recipe: Recipe, model: nn.Module, data: Examples, out: Path, tell: Progress
) -> tuple[list[dict[str, Any]], float]:
    """Stage "float": the baseline, trained in place. Returns its history and seconds."""
    if recipe.float_train is None:
        return [], 0.0
    facts = _finished("float", model, out)
    if facts is None:
        facts = _train("float", model, data, recipe.float_train, out, tell)
        save_stage(out, "float", model.state_dict(), facts)
        stage_path(out, "float_training").unlink(missing_ok=True)
    tell(Event("float", values=_validated(facts)))
    return facts["history"], facts["seconds"]


def quantize(recipe: Recipe, model: nn.Module, data: Examples) -> tuple[Coverage, list[Method]]:
    """Prepare and calibrate ``model`` in place: what a post-training quantization would ship.

    Returns what became of each parameter, and the recipe's methods, attached.
    """
    plan = Plan.load(recipe.plan) if recipe.plan is not None else None
    coverage, methods = prepare_sites(recipe, model, plan, data.example())
    calibrate(model, [x for x, _ in data.drawn(recipe.quantize.calibration_samples, recipe.train.seed)])
    if plan is not None:
        commit(model, plan)  # the widths are set already: this checks that plan and model have the same sites
    return coverage, methods


def prepare_sites(
    recipe: Recipe, model: nn.Module, plan: Plan | None, example: Tensor, *, check_pairs: bool = True
) -> tuple[Coverage, list[Method]]:
    """Make the sites of ``recipe``, with a plan's widths where there is one, and attach its methods.

    check_pairs: whether these widths are final; never where a search of the recipe's decides them.
    """
    spec = recipe.quantize
    try:
        coverage = prepare(
            model,
            spec.weights,
            spec.activations,
            overrides=spec.overrides
            | outliers.overrides(recipe, model)
            | (_planned(plan) if plan is not None else {}),
            target=recipe.target,
            first_last_bits=spec.first_last_bits,
            check_pairs=check_pairs and search_options(recipe) is None,
            swaps=swaps_of(model),
        )
    except TargetError as error:
        if plan is not None:
            raise relocated(error, f"{recipe.plan}: {error.where}") from None
        raise
    except SiteError as error:
        site = error.where.removeprefix("overrides.")
        if plan is not None and site in plan.sites:
            raise relocated(error, f"{recipe.plan}: sites.{site}") from None
        if error.where.startswith("overrides."):
            every = " (all of them: --set quantize.overrides={})"
            raise relocated(error, f"quantize.{error.where}", every) from None
        raise
    methods = build_methods(recipe.methods, example)
    for method in methods:
        method.attach(model)
    return coverage, methods


def _planned(plan: Plan) -> dict[str, dict[str, Any]]:
    """A plan's decisions as overrides, one exact name each."""
    fields = ("bits", "grid", "granularity", "group_size")
    return {
        glob.escape(name): {field: getattr(site, field) for field in fields}
        for name, site in plan.sites.items()
    }


def train_quantized(
    stage: str,
    recipe: Recipe,
    model: nn.Module,
    methods: list[Method],
    teacher: nn.Module,
    data: Examples,
    out: Path,
    tell: Progress,
) -> dict[str, Any]:
    """A stage of quantization-aware training with BatchNorm re-estimation, in place. Where a method decided
    the widths, the model is left as its plan would have prepared it. Returns plain facts, with its history
    and seconds."""
    found = load_stage(out, stage)
    facts = found[1] if found else None
    if facts is None:
        facts = _train(stage, model, data, recipe.train, out, tell, methods=methods, teacher=teacher)
        plans = [plan for method in methods if (plan := method.plan()) is not None]
        facts["bits"] = plans[0].bits if plans else None
        facts["learned_bits"] = {site: b for m in methods for site, b in m.learned_bits().items()}
    if facts["bits"] is not None:
        commit(model, facts["bits"])
        collapse(model)
    if found:
        model.load_state_dict(found[0])
    else:
        if recipe.train.epochs and not modes.trains_codes(recipe):  # else it is delivered as it is
            reestimate_batchnorm(model, data.as_trained(REESTIMATION_SAMPLES, recipe.train.seed))
        facts |= _validation(model, data)
        save_stage(out, stage, model.state_dict(), facts)
        stage_path(out, f"{stage}_training").unlink(missing_ok=True)
    tell(Event(stage, values=_validated(facts)))
    return facts


def _finished(stage: str, model: nn.Module, out: Path) -> dict[str, Any] | None:
    """Load a finished stage into ``model``; None where it is not finished."""
    found = load_stage(out, stage)
    if found is None:
        return None
    tensors, facts = found
    model.load_state_dict(tensors)
    return facts


def _train(
    stage: str,
    model: nn.Module,
    data: Examples,
    config: TrainConfig,
    out: Path,
    tell: Progress,
    methods: Sequence[Method] = (),
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place, resuming where a checkpoint of this stage lies. Returns plain facts."""

    def show(now: TrainProgress) -> None:
        values = {"loss": now.loss, **_validated(now.record or {})}
        if now.record or now.step % 20 == 0:
            # one unit is kept back for what follows training, so that the stage is not shown as finished
            tell(Event(stage, now.step, now.steps + 1, values))

    optimizer = None if config.mode == "float" else make_optimizer(model, config)
    try:
        result = train(
            model,
            data.train_x,
            data.train_y,
            config,
            methods=methods,
            teacher=teacher,
            augment=data.augment,
            augment_both=data.augment_both,
            validate=(lambda: data.validate(model)) if len(data.val_x) else None,
            progress=show,
            checkpoint=stage_path(out, f"{stage}_training"),
            resume=True,
            events=out / "events" / stage,
            optimizer=optimizer,
        )
    except TrainingDiverged as error:
        if optimizer is None:
            raise
        raise TrainingDiverged(error.what, where=error.where, remedy="Lower train.learning_rate") from None
    for note in result.notes:
        tell(Event(stage, 0, 1, note=note))
    model.cpu()  # all that follows is quick; only training is worth a GPU
    state = {} if optimizer is None else {"state_bytes_per_weight": modes.state_per_weight(model, optimizer)}
    return state | {
        "history": result.history,
        "traces": result.traces,
        "seconds": result.seconds,
        "precision": result.precision,
        "device": result.device,
        **_validation(model, data),
    }


def _validation(model: nn.Module, data: Examples) -> dict[str, float]:
    """What is watched while training, under the names of the history."""
    return {f"validation_{name}": value for name, value in data.validate(model).items()}


def _validated(facts: Mapping[str, Any]) -> dict[str, float]:
    """The validation figures among the facts of a stage or an epoch, as they are told."""
    return {name.replace("_", " "): value for name, value in facts.items() if name.startswith("validation_")}
