"""The float models that benchmarks of output approximation start from, what a quantized one is judged by, their parts.

A part is (its jobs, one job, its table); a job is a contender and a point. A seed decides the calibration sample, and of
the byte model the float model, too, which is kept beside the results. byte_llama: trained on pydoc, 128 windows of 128
bytes, tested on its test split. aidreams260k (in $BITSMITH_DATA): 64 sequences that the float model writes at temperature
1, tested on 64 others. resnet20 (CIFAR-10, weights as they circulate): 256 training images, tested on 2,000 test images.
digits_vit: trained on the training split of a fold, tested on the fold. First and last layers have 8 bits.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _results
import _shared_data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.files import load_tensors, save_tensors
from bitsmith.quantization import Scheme, calibrate, prepare
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks import build, load
from bitsmith.tasks.classification import to_float
from bitsmith.tasks.examples import Examples
from bitsmith.train.config import TrainConfig
from bitsmith.train.distillation import IGNORED
from bitsmith.train.loop import train

LENGTH, WRITTEN = 128, 64  # tokens of a sequence, sequences that aidreams260k writes for each purpose
IMAGES, TESTED = 256, 2000

Part = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]  # jobs(task), one(unit, ...), table


class Unit:
    """A float model, the batches that rounding looks at, and what a rounded model is judged by."""

    data: Any  # what it was trained on; aidreams260k has none

    def __init__(self, task: str, seed: int, beside: Path) -> None:
        self.task, self.seed = task, seed
        self.model, rows, self.x, self.y, size = MAKERS[task](self, seed, beside)
        self.model.eval()
        self.batches: list[Tensor] = list(rows.split(size))
        self.logits = self.answers(self.model)

    def answers(self, model: nn.Module) -> Tensor:
        """Log-probabilities of the test samples (rows, classes)."""
        with torch.no_grad(), in_eval_mode(model):
            return torch.cat([model(x).log_softmax(-1).flatten(0, -2) for x in self.x.split(32)])

    def judged(self, model: nn.Module) -> dict[str, float]:
        """KL from the float model, loss and accuracy."""
        asked = self.y.flatten() != IGNORED
        mine, y = self.answers(model)[asked], self.y.flatten()[asked]
        return {
            "kl": F.kl_div(mine, self.logits[asked], log_target=True, reduction="batchmean").item(),
            "loss": F.nll_loss(mine, y).item(),
            "accuracy": (mine.argmax(-1) == y).double().mean().item(),
        }

    def prepared(
        self, weights: int, activations: int | None, group: int | None = None, calibrated: bool = True
    ) -> nn.Module:
        """A copy at these widths, weights per channel or in groups of so many inputs."""
        shared: dict[str, Any] = {"granularity": "group", "group_size": group} if group else {}
        scheme = Scheme(bits=weights, **{"granularity": "channel", **shared})
        model = copy.deepcopy(self.model)
        prepare(model, scheme, None if activations is None else Scheme(bits=activations))
        if calibrated:
            calibrate(model, self.batches)
        return model


def byte_llama(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The byte model of this seed, trained once."""
    unit.data = data = load("pydoc")
    config = TrainConfig(epochs=4, batch_size=16, learning_rate=4e-3, weight_decay=0.1, seed=seed)
    model = kept(build("byte_llama", seed=seed), data, config, beside / f"oa_byte_llama_{seed}.safetensors")
    rows = torch.cat([x for x, _ in data.drawn(128, seed)])
    return model, rows, data.test_x, data.test_y, 16


def arithmetic(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The small Llama of recipes/arithmetic.yaml, trained once."""
    unit.data = data = load("arithmetic", seed=seed)
    model = build("byte_llama", seed=seed, width=128, depth=3, context=32)
    config = TrainConfig(epochs=7, batch_size=128, learning_rate=2e-3, gradient_clip=1.0, seed=seed)
    model = kept(model, data, config, beside / f"oa_arithmetic_{seed}.safetensors")
    rows = torch.cat([x for x, _ in data.drawn(512, seed)])
    return model, rows, data.test_x, data.test_y, 64


def digits_vit(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The small transformer on a fold of the digits."""
    unit.data = data = load("digits", seed=seed, fold=seed % 5)
    config = TrainConfig(epochs=20, learning_rate=2e-3, weight_decay=1e-2, seed=seed)
    model = build("digits_vit", seed=seed)
    train(model, data.train_x, data.train_y, config)
    rows = torch.cat([to_float(x) for x, _ in data.drawn(512, seed)])
    return model, rows, to_float(data.test_x), data.test_y, 128


def kept(model: nn.Module, data: Examples, config: TrainConfig, path: Path) -> nn.Module:
    """The model trained, or as it was kept."""
    if path.exists():
        model.load_state_dict(load_tensors(path, "float model", mark="seed")[0])
    else:
        train(model, data.train_x, data.train_y, config)
        save_tensors(path, dict(model.state_dict()), {"seed": str(config.seed)})
    return model


def aidreams260k(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The pretrained model, and what it writes."""
    model = build(f"hf:{_shared_data.root() / 'lm' / 'aidreams260k'}").eval()
    rows, test = (written(model, number) for number in (seed, 10_000))
    return model, rows[:, :-1], test[:, :-1], test[:, 1:], 8


@torch.no_grad()
def written(model: Any, seed: int) -> Tensor:
    """WRITTEN sequences (WRITTEN, LENGTH + 1) that the model draws at temperature 1, after its first token."""
    config, generator = model.lm.config, torch.Generator().manual_seed(seed)
    found = torch.full((WRITTEN, 1), config.bos_token_id)
    past = None
    for _ in range(LENGTH):
        done = model.lm(input_ids=found[:, -1:], past_key_values=past, use_cache=True)
        past = done.past_key_values
        drawn = torch.multinomial(done.logits[:, -1].softmax(-1), 1, generator=generator)
        found = torch.cat([found, drawn], 1)
    return found


def resnet20(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The pretrained network, training images of this seed, and the first test images."""
    train_x, train_y, test_x, test_y = _shared_data.load_arrays("cifar10")
    unit.data = SimpleNamespace(train_x=train_x, train_y=train_y)
    rows = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    model = build("resnet20", weights=_shared_data.resnet_weights(20))
    return model, to_float(train_x[rows]), to_float(test_x[:TESTED]), test_y[:TESTED], 32


MAKERS: dict[str, Callable[..., tuple[nn.Module, Tensor, Tensor, Tensor, int]]] = {
    "byte_llama": byte_llama,
    "arithmetic": arithmetic,
    "digits_vit": digits_vit,
    "aidreams260k": aidreams260k,
    "resnet20": resnet20,
}


def measured(units: list[dict[str, Any]], part: str, contender: str, point: str, key: str) -> list[float]:
    """A figure of every unit that has it."""
    name = f"{part} {contender} {point}"
    return [unit["points"][name][key] for unit in units if name in unit["points"]]


def cell(values: list[float], form: str = ".4f") -> str:
    """Mean and standard error, with the number of units."""
    if not values:
        return "-"
    mean, error = _results.mean_and_error(values)
    return f"{mean:{form}} ± {error:{form}} ({len(values)})"


def measure_parts(name: str, description: str, parts: dict[str, Part], tasks: tuple[str, ...]) -> None:
    """The command line of a benchmark: measure what is missing, seed by seed, and print the tables."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default=tasks[0], choices=tasks)
    parser.add_argument("--parts", default=",".join(parts))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contenders", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--points", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load(name, options.out)
    units = results.setdefault(options.task, {})
    beside = options.out.parent if options.out else _results.RESULTS
    asked = options.parts.split(",")
    jobs = [
        (part, *job)
        for part in asked
        for job in parts[part][0](options.task)
        if (not options.contenders or job[0] in options.contenders)
        and (not options.points or job[1] in options.points)
    ]
    for seed in range(0 if options.table else options.seeds):
        entry = units.setdefault(str(seed), {"points": {}})
        todo = [job for job in jobs if " ".join(job) not in entry["points"]]
        if not todo:
            continue
        unit = Unit(options.task, seed, beside)
        entry["float"] = unit.judged(unit.model)
        for part, contender, point in todo:
            found = parts[part][1](unit, contender, point)
            entry["points"][" ".join((part, contender, point))] = found
            figures = ", ".join(f"{k} {v:.4f}" for k, v in found.items() if isinstance(v, float))
            print(f"seed {seed}  {f'{part}, {contender}, {point}':<32} {figures or found}", flush=True)
            _results.save(name, results, options.out)
    for part in asked:
        parts[part][2](list(units.values()), options.task)
