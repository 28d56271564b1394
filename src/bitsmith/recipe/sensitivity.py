"""`bitsmith sensitivity`: what each width of each site costs in loss, the plan of a budget, and its prices.

Three answers about one float model. *Scores*: the Fisher-weighted output error of every site and width, all
from one backward per batch (quantization.sensitivity). *Measured*: for the pairs with the highest scores, the
loss with that one site at that width and all else in float, as a check on the scores. *Plan*: what `allocate`
chooses within a budget by the scores, made fit for training, and what raising each site to its next width
would cost.
Nothing is trained but the float model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import Interrupted, RecipeError
from bitsmith.files import write_json
from bitsmith.quantization import FixedBits, Plan, calibrate, measure, plan_of, set_bits, sites
from bitsmith.quantization.allocate import allocate
from bitsmith.quantization.bits import in_words
from bitsmith.quantization.budget import Budget, BudgetCost
from bitsmith.quantization.candidates import free_sites, site_candidates
from bitsmith.quantization.knapsack import classes_of
from bitsmith.quantization.layers import SWAPS_BY_QUANT
from bitsmith.quantization.sensitivity import after_training, sensitivity, without_quantizers
from bitsmith.recipe import outliers
from bitsmith.recipe.baseline import float_model, open_baseline
from bitsmith.recipe.job import prepare_sites, read_inputs
from bitsmith.recipe.limits import CANDIDATES, budget_of, search_options, without_search
from bitsmith.recipe.progress import Event, Progress, silent
from bitsmith.recipe.schema import Recipe
from bitsmith.tasks import Examples
from bitsmith.train.distillation import cross_entropy

SCORED = 512  # training rows that the scores are taken from
MEASURED = 512  # validation rows that losses are measured on
BATCH = 128
TOP = 10
FILE = "sensitivity.json"
STAGE = "score every width of every site"


def analyse(
    recipe: Recipe,
    out: str | Path,
    *,
    limits: Mapping[str, float] | None = None,
    top: int = TOP,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores, measured losses and the plan of a budget, as plain data (sensitivity.json in ``out``).

    limits: kind -> limit; without it the budget of the recipe's search, and without that the recipe's own
    widths take the plan's place, priced in shares of the float model's BOPs. top: pairs that are measured.
    Writes sensitivity.json, sensitivity.html and plan_by_sensitivity.json. Raises what the floors raise;
    BudgetError before the float model is trained.
    """
    if top < 0:
        raise RecipeError("this is no number of pairs", where="--top", got=top, expected="0 or more")
    tell = progress or silent
    budget = wanted_budget(recipe, limits)
    with open_baseline(Path(out), recipe) as directory:
        tell(Event("data", 0))
        data, model = read_inputs(recipe)
        tell(Event("data", note=f"{data.name}: {len(data.train_x)} training {data.unit}"))
        _plan(
            Sites(recipe, copy.deepcopy(model), data, budget), None
        )  # an impossible budget is found out now
        try:
            float_model(recipe, model, data, directory, tell)
        except Interrupted as error:
            raise Interrupted(error.what, where=error.where, remedy="Give the same command again") from None
        tell(Event(STAGE, 0, 2))
        found = Sites(recipe, model, data, budget)
        scores = found.scores()
        tell(Event(STAGE, 1, 2))
        result = {
            "version": 1,
            "model": recipe.model.name,
            "data": data.name,
            "target": recipe.target,
            "seed": recipe.train.seed,
            "plan_from": "recipe" if budget is None else "budget",
            **({"unit": data.unit} if data.unit != "images" else {}),
            **({"task": data.facts()["task"]} if "mean_iou" in data.figures else {}),
            "samples": {"scores": min(SCORED, len(data.train_x)), "measured": len(_validation(data)[0])},
            **_plan(found, scores),
            **found.measured(scores, top),
        }
        write_json(directory / FILE, result)
        found.plan(result).save(directory / "plan_by_sensitivity.json")
        from bitsmith.report.sensitivity import write_sensitivity

        write_sensitivity(directory)
        tell(Event(STAGE, 2, 2))
        return result


def wanted_budget(recipe: Recipe, limits: Mapping[str, float] | None = None) -> Budget | None:
    """The budget of ``limits``, else that of the recipe's search, else None. Raises BudgetError."""
    if limits:
        return Budget.from_dict(budget_of(limits))
    asked = (search_options(recipe) or {}).get("budget")
    return None if asked is None else Budget.from_dict(asked, "methods.budget_search.budget")


class Sites:
    """A float model with every site at every candidate width, calibrated: what scores are taken from.

    free: the sites that a search of this recipe may change, or all where none was asked for by name.
    candidates: site -> its widths, ascending; own: site -> the width that the recipe gives it.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, data: Examples, budget: Budget | None) -> None:
        options = search_options(recipe) or {}
        plan = Plan.load(recipe.plan) if recipe.plan is not None else None
        outliers.split(recipe, model, data)
        # With a budget these widths are only where the plan starts from.
        prepare_sites(without_search(recipe), model, plan, data.example(), check_pairs=budget is None)
        quantizers = sites(model)
        self.recipe, self.model, self.data = recipe, model, data
        for name, q in quantizers.items():
            if q.bits.per_channel:
                raise RecipeError(
                    "sites are scored at one width for all channels",
                    where=f"{recipe.plan or 'quantize.overrides'}: {name}",
                    got=f"{in_words(q.bits.whole())} bits",
                    remedy="Give the site one width, or leave the plan out",
                )
        self.own = {name: int(q.bits.expected()) for name, q in quantizers.items()}
        widths = list(options.get("candidates", CANDIDATES))
        pinned = {name for name, q in quantizers.items() if q.pinned}
        self.free = (
            free_sites(model, options.get("sites"), "budget_search")
            if len(pinned) < len(quantizers)
            else list(quantizers)
        )
        found = site_candidates(model, self.free, widths)
        for name, own in self.own.items():
            if name not in self.free or budget is None:
                found[name] = sorted({own, *site_candidates(model, [name], [*widths, own])[name]})
        self.candidates = {name: found[name] for name in quantizers}
        # At the narrowest: costs are counted of quantized sites, where folding a BatchNorm may ask for more.
        set_bits(model, {name: FixedBits(c[0], c) for name, c in self.candidates.items()})
        self.budget = budget
        fixed = {name: [b] for name, b in self.own.items()}
        free = {name: self.candidates[name] for name in self.free}
        # Prices without a budget are shares of the float model's BOPs.
        self.cost = BudgetCost(measure(model, data.example()), budget or Budget(bops=1.0), fixed | free)

    def scores(self) -> dict[str, Tensor]:
        """Site -> score of each candidate (K,)."""
        samples, seed = self.recipe.quantize.calibration_samples, self.recipe.train.seed
        calibrate(self.model, [x for x, _ in self.data.drawn(samples, seed)])
        batches = self.data.drawn(min(samples, SCORED), seed, BATCH)
        found = sensitivity(self.model, batches, cross_entropy)
        return {name: found[name] for name in self.candidates}

    def measured(self, scores: Mapping[str, Tensor], top: int) -> dict[str, Any]:
        """The float model's loss on the validation batch, and that of the ``top`` pairs by score."""
        x, y = _validation(self.data)
        quantizers = sites(self.model)
        layers = [m for m in self.model.modules() if type(m) in SWAPS_BY_QUANT]
        pairs = [
            (float(score), name, bits)
            for name, row in scores.items()
            for bits, score in zip(self.candidates[name], row, strict=True)
        ]
        users = {name: _users(layers, quantizers[name]) for _, name, _ in pairs}
        entries = []
        with without_quantizers(layers):
            before = self.data.evaluate(self.model, x, y)
            for score, name, bits in sorted(pairs, reverse=True)[:top]:
                quantizers[name].commit(bits)
                for layer, attribute in users[name]:
                    setattr(layer, attribute, quantizers[name])
                after = self.data.evaluate(self.model, x, y)
                for layer, attribute in users[name]:
                    setattr(layer, attribute, None)
                increase = after["loss"] - before["loss"]
                entries.append({"site": name, "bits": bits, "score": score, **after, "increase": increase})
        return {"float": before, "measured": entries}

    def plan(self, result: Mapping[str, Any]) -> Plan:
        """The plan of a result as a file that a recipe can name."""
        chosen = plan_of(self.model, bits={site["name"]: site["bits"] for site in result["sites"]})
        return replace(chosen, budget={entry["kind"]: entry for entry in result["budget"]})


def _plan(found: Sites, scores: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Bits of every site, what they use of the budget, and what the next width of each would cost.

    Without ``scores`` only whether any plan fits. Raises BudgetError.
    """
    cost = found.cost
    if found.budget is None:
        bits: Mapping[str, Any] = found.own
    else:
        zero = {name: [0.0] * len(found.candidates[name]) for name in cost.sites}
        bits = allocate(cost, zero if scores is None else _values(found, scores)).bits
    if scores is None:
        return {}
    limits = dict(zip(cost.kinds, cost.limits.tolist(), strict=True))
    used = cost.exact(bits)
    budget = [{"kind": kind, "limit": limits[kind], "used": used[kind]} for kind in limits]
    classes = {site: members for members, _ in classes_of(cost, ()) for site in members}
    entries = []
    for name, row in scores.items():
        widths = found.candidates[name]
        at = widths.index(bits[name])
        entries.append(
            {
                "name": name,
                "kind": sites(found.model)[name].kind,
                "free": name in found.free,
                "candidates": widths,
                "scores": row.tolist(),
                "bits": bits[name],
                "score": float(row[at]),
                "next": _raised(cost, bits, name, classes[name], widths[at + 1 : at + 2], row[at + 1 :]),
            }
        )
    return {"budget": budget, "sites": entries}


def _raised(
    cost: BudgetCost,
    bits: Mapping[str, int],
    name: str,
    together: Iterable[str],
    wider: list[int],
    scores: Tensor,
) -> dict[str, Any] | None:
    """What the next width of site ``name`` costs: {bits, score, with, price: [{kind, cost, share}]}.

    None at the widest. with: the sites that must have the same width and are raised too. The share is of the
    budget; price is empty where the target cannot multiply the pair.
    """
    if not wider:
        return None
    names = [other for other in together if other != name]
    changed = {**bits, **dict.fromkeys([name, *names], wider[0])}
    target = cost.cost.target
    possible = all(
        layer.is_held_by(target, *(changed.get(site, 32) for site in layer.operands))
        for layer in cost.cost.layers
        if {name, *names} & set(layer.operands)
    )
    price = []
    if possible:
        before, after = cost.exact(bits), cost.exact(changed)
        for kind, limit in zip(cost.kinds, cost.limits.tolist(), strict=True):
            extra = after[kind] - before[kind]
            price.append({"kind": kind, "cost": extra, "share": extra / limit})
    return {"bits": wider[0], "score": float(scores[0]), "with": names, "price": price}


def _values(found: Sites, scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Of the plan, which is for training."""
    weights = [name for name, quantizer in sites(found.model).items() if quantizer.kind == "weight"]
    fit = after_training(scores, weights)
    return {name: (-fit[name]).tolist() for name in found.cost.sites}


def _users(layers: Iterable[Any], quantizer: nn.Module) -> list[tuple[Any, str]]:
    """(layer, attribute) of every place where a quantizer stands: several for a tied weight."""
    return [
        (layer, f"{operand}_quantizer")
        for layer in layers
        for operand in SWAPS_BY_QUANT[type(layer)]
        if getattr(layer, f"{operand}_quantizer") is quantizer
    ]


def _validation(data: Examples) -> tuple[Tensor, Tensor]:
    """Up to MEASURED validation rows, of the training part where there is no validation split."""
    x, y = data.validation()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:MEASURED]
    return x[rows], y[rows]
