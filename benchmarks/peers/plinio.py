"""Digits with PLiNIO's mixed-precision search (MPS), at the budgets and steps of benchmarks/budget_search.py.

    git clone https://github.com/eml-eda/plinio build/plinio-source      # no package; measured at 3d6b5e0
    python -m venv build/plinio
    build/plinio/bin/pip install -r benchmarks/peers/requirements-plinio.txt
    export PYTHONPATH=src:build/plinio-source
    build/plinio/bin/python benchmarks/peers/plinio.py                   # 5 seeds; resumes where it stopped
    build/plinio/bin/python benchmarks/peers/plinio.py --table           # what has been measured so far

Units, float start, batches, learning rate, number of steps and distillation are those of budget_search.py, and
the cost of a plan is ours (PLiNIO's `ops_bit` counts the same). MPS mixes all candidates of a tensor by the
softmax of logits, trained together with the weights; `export` keeps the most likely ones, which train on. As in
the authors' own scripts (github.com/eml-eda/mixprec-pruning) both halves are equally long, weights train with
Adam (weight decay 1e-4, none for ranges), logits with SGD (rate 0.01, momentum 0.9), and the softmax's
temperature falls by a constant factor every epoch. Rates follow our warm-up and cosine in each half.

    strength X  loss + X · cost, cost in units of the uniform 2-bit plan (`BaseRegularizer`): where it ends is
                not said beforehand, so that a budget is hit by trying strengths
    target B    `DUCCIO`: a penalty while the expected cost is above the budget of B; how strong it is must be
                said too
    ours        the plan of a run, trained from the float model by our training for as many steps: what is
                left of the difference if only the plan is PLiNIO's

Quantizers are its defaults: weights by max|w| of a channel, PACT for activations, whose ranges start at the
largest value in the 512 calibration images, BatchNorm folded into the weights before training. At one bit both
give zeros only, so the candidates begin at 2. First and last layers have 8 bits.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `import plinio` must not find this file, which has the name of what it measures.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import _results  # noqa: E402
import torch  # noqa: E402
from budget_search import Unit  # noqa: E402
from plinio.cost import ops_bit  # noqa: E402
from plinio.methods.mps import MPS, get_default_qinfo  # noqa: E402
from plinio.methods.mps.graph import set_pact_clip_values  # noqa: E402
from plinio.methods.mps.quant.quantizers import PACTActSigned  # noqa: E402
from plinio.regularizers import DUCCIO, BaseRegularizer  # noqa: E402
from torch import nn  # noqa: E402

from bitsmith.tasks.classification import evaluate  # noqa: E402
from bitsmith.tasks.dataset import to_float  # noqa: E402
from bitsmith.train.batches import Batches  # noqa: E402
from bitsmith.train.distillation import combined_loss, cross_entropy  # noqa: E402
from bitsmith.train.schedule import learning_rate_factor  # noqa: E402

NAME, MODEL, COMMIT = "peer_plinio", "digits_cnn", "3d6b5e0"
WIDTHS = (2, 3, 4, 6, 8)
POINTS = (1.5, 2.0, 2.5, 3.0)
STRENGTHS = (0.3, 0.4, 0.55, 0.8, 1.2, 3.0, 10.0)
TARGETS = (2.5, 3.0)  # at 2 the cheapest plan is the only one
TARGET_STRENGTH = 4.0
EPOCHS, LEARNING_RATE = 20, 4e-3
LAST_TEMPERATURE = 0.1
SETTINGS = {
    "plinio": f"commit {COMMIT}",
    "epochs": EPOCHS,
    "learning_rate": LEARNING_RATE,
    "last_temperature": LAST_TEMPERATURE,
    "target_strength": TARGET_STRENGTH,
}


def searchable(unit: Unit) -> MPS:
    """PLiNIO's form of the float model without `normalize`: logits over the widths of all free tensors."""
    layers = nn.Sequential()
    for name, layer in list(copy.deepcopy(unit.model).named_children())[1:]:
        layers.add_module(name, layer)
    widths = get_default_qinfo(WIDTHS, WIDTHS)
    widths["input_default"] = {"quantizer": PACTActSigned, "search_precision": (8,), "kwargs": {}}
    for name, tensor in (("conv1", "weight"), ("fc", "weight"), ("conv4", "output")):  # conv4's is fc's input
        widths[name] = copy.deepcopy(widths["layer_default"])
        widths[name][tensor]["search_precision"] = (8,)
    images = normalized(unit, unit.data.train_x[:512])
    widths = set_pact_clip_values(layers, images[:1], widths, [images])
    return MPS(layers, cost={"bops": ops_bit}, input_example=images[:1], qinfo=widths)


def normalized(unit: Unit, images: torch.Tensor) -> torch.Tensor:
    """What the first convolution sees; the layer before it is left out, as its input is what is quantized."""
    normalize: nn.Module = unit.model.get_submodule("normalize")
    return normalize(to_float(images))


def train_half(
    unit: Unit,
    model: nn.Module,
    first_step: int,
    steps: int,
    *,
    penalty: Callable[[int], torch.Tensor] | None = None,
    after_epoch: Callable[[], None] | None = None,
) -> None:
    """Steps first_step.. of the batches that our training sees, with optimizers made anew."""
    batches = Batches(
        unit.data.train_x, unit.data.train_y, batch_size=64, seed=unit.seed, teacher=frozen(unit.model)
    )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    logits = [p for name, p in named if name.endswith("alpha")]
    ranges = [p for name, p in named if "clip_val" in name]
    weights = [p for name, p in named if "clip_val" not in name and not name.endswith("alpha")]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam(
            [{"params": weights, "weight_decay": 1e-4}, {"params": ranges}],
            lr=LEARNING_RATE,
            weight_decay=0.0,
        )
    ]
    if penalty is not None:
        optimizers.append(torch.optim.SGD(logits, lr=1e-2, momentum=0.9))
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    model.train()
    for step in range(steps):
        (batch,) = batches.step(first_step + step)
        factor = learning_rate_factor("cosine", step, steps, warmup=0.05, cooldown=0.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        loss = combined_loss(
            model(normalized(unit, batch.x)),
            batch.y,
            batch.teacher_logits,
            task_loss=cross_entropy,
            weight=0.5,
            temperature=2.0,
        )
        if penalty is not None:
            loss = loss + penalty(step // batches.steps_per_epoch)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if after_epoch is not None and (step + 1) % batches.steps_per_epoch == 0:
            after_epoch()
    model.eval()


def frozen(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The float model as a teacher."""

    @torch.no_grad()
    def logits(x: torch.Tensor) -> torch.Tensor:
        return model.eval()(x)

    return logits


def plan(model: MPS) -> dict[str, int]:
    """The most likely widths, by our names of the tensors."""
    bits = {}
    for name, found in model.summary().items():
        if "w_precision" in found:
            bits[f"{name}.weight"] = found["w_precision"]
            bits[f"{name}.input"] = found["in_precision"]
    return bits


def search(unit: Unit, regularizer: Any, *, annealed: bool) -> dict[str, Any]:
    """One run: search, `export`, the other half of the steps."""
    torch.manual_seed(unit.seed)
    model = searchable(unit)
    half = EPOCHS // 2
    steps = half * -(-len(unit.data.train_x) // 64)
    temperatures = iter([LAST_TEMPERATURE ** ((epoch + 1) / half) for epoch in range(half)])
    train_half(
        unit,
        model,
        0,
        steps,
        penalty=lambda epoch: regularizer(model, epoch, half) if annealed else regularizer(model),
        after_epoch=lambda: model.update_softmax_options(temperature=next(temperatures)),
    )
    bits = plan(model)
    model(normalized(unit, unit.data.train_x[:64]))  # in eval mode the cost is that of the most likely widths
    assert math.isclose(unit.cost.bops(bits), model.get_cost("bops").item()), "our cost is not PLiNIO's"
    final = model.export()
    train_half(unit, final, steps, steps)
    whole = nn.Sequential(unit.model.get_submodule("normalize"), final)
    return {
        "bits": bits,
        "bops": unit.cost.bops(bits),
        "accuracy": evaluate(whole, unit.data.test_x, unit.data.test_y)["accuracy"],
        "validation": evaluate(whole, unit.data.val_x, unit.data.val_y)["accuracy"],
    }


def run(unit: Unit, name: str) -> dict[str, Any]:
    """A run by its name: "strength 0.4", "target 2.5", "ours 2.0"."""
    kind, number = name.split()
    two = unit.cost.bops({n: 2 if len(c) > 1 else c[0] for n, c in unit.candidates.items()})
    if kind == "strength":
        return search(unit, BaseRegularizer("bops", float(number) / two), annealed=False)
    limit = float(unit.budget(float(number)).limits[0])
    regularizer = DUCCIO({"bops": limit}, final_strengths={"bops": TARGET_STRENGTH / two})
    return search(unit, regularizer, annealed=True)


def within(unit: dict[str, Any], point: float, kind: str = "strength") -> list[dict[str, Any]]:
    """Runs of one kind whose plan costs at most the budget."""
    return [
        r for n, r in unit["runs"].items() if n.startswith(kind) and r["bops"] <= unit["limits"][str(point)]
    ]


def by_validation(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The run most accurate on the validation split; of equals the dearest."""
    return max(found, key=lambda r: (r["validation"], r["bops"]))


def train_by_ours(unit: Unit, entry: dict[str, Any]) -> None:
    """Train the plans chosen for the budgets as budget_search.py trains its own."""
    for point in POINTS:
        if (name := f"ours {point}") in entry["runs"] or not (found := within(entry, point)):
            continue
        bits = by_validation(found)["bits"]
        same = [r for n, r in entry["runs"].items() if n.startswith("ours") and r["bits"] == bits]
        entry["runs"][name] = (
            same[0]
            if same
            else {
                **{k: v for k, v in unit.fixed(bits).items() if k != "seconds"},
                "bits": bits,
                "bops": unit.cost.bops(bits),
            }
        )


def cell(units: list[dict[str, Any]], found: list[dict[str, Any] | None], point: float) -> str:
    """Points against float, mean ± standard error (units), and the share of the budget used."""
    pairs = [(u, r) for u, r in zip(units, found, strict=True) if r is not None]
    if not pairs:
        return "-"
    mean, error = _results.mean_and_error([100 * (r["accuracy"] - u["float"]) for u, r in pairs])
    used, _ = _results.mean_and_error([100 * r["bops"] / u["limits"][str(point)] for u, r in pairs])
    return f"{mean:+.2f} ± {error:.2f} ({len(pairs)}), {used:.0f} %"


def table(results: dict[str, Any]) -> None:
    """What a user gets at each budget, and where single runs end."""
    units = [u for u in results.get(MODEL, {}).values() if "limits" in u]
    if not units:
        return
    print(f"\n{MODEL} with PLiNIO: points against float (units), share of the budget used")
    heads = ("best on test", "best on validation", "its plan, trained by ours", "target")
    print(f"{'budget':<8}" + "".join(f"{h:>30}" for h in heads))
    for point in POINTS:
        rows = [within(u, point) for u in units]
        cells = (
            cell(units, [max(r, key=lambda x: x["accuracy"]) if r else None for r in rows], point),
            cell(units, [by_validation(r) if r else None for r in rows], point),
            cell(units, [u["runs"].get(f"ours {point}") for u in units], point),
            cell(units, [(within(u, point, f"target {point}") or [None])[0] for u in units], point),
        )
        print(f"{point:<8}" + "".join(f"{c:>30}" for c in cells))
    print("\ncost of the plan that a run ends with, in uniform 2-bit plans")
    for name in [f"strength {s}" for s in STRENGTHS] + [f"target {p}" for p in TARGETS]:
        costs = [u["runs"][name]["bops"] / u["limits"]["2.0"] for u in units if name in u["runs"]]
        if costs:
            print(f"{name:<14} {min(costs):.2f} to {max(costs):.2f} (mean {sum(costs) / len(costs):.2f})")
    limits = units[0]["limits"]
    print("budgets        " + ", ".join(f"{p}: {limits[str(p)] / limits['2.0']:.2f}" for p in POINTS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [f"strength {s}" for s in STRENGTHS] + [f"target {p}" for p in TARGETS]
    for seed in range(0 if options.table else options.seeds):
        results = _results.load(NAME, options.out)
        entry = results.setdefault(MODEL, {}).setdefault(str(seed), {"runs": {}})
        missing = [name for name in wanted if name not in entry["runs"]]
        if not missing and "ours 3.0" in entry["runs"]:
            continue
        unit = Unit(MODEL, seed)
        entry["float"] = evaluate(unit.model, unit.data.test_x, unit.data.test_y)["accuracy"]
        entry["limits"] = {str(p): float(unit.budget(p).limits[0]) for p in POINTS}
        for name in missing:
            entry["runs"][name] = r = run(unit, name)
            share = r["bops"] / entry["limits"]["2.0"]
            print(
                f"seed {seed}  {name:<14} cost {share:.2f}, {r['accuracy'] - entry['float']:+.2%}", flush=True
            )
            _results.save(NAME, {**results, **SETTINGS}, options.out)
        train_by_ours(unit, entry)
        _results.save(NAME, {**results, **SETTINGS}, options.out)
    table(_results.load(NAME, options.out))


if __name__ == "__main__":
    main()
