"""One shift after another: what integer training still knows of each when it has learned the next.

    python benchmarks/continual.py                                  # the digits CNN, 3 seeds; resumes
    python benchmarks/continual.py --task vit
    python benchmarks/continual.py --contenders "integer @0.005"    # any contender at another learning rate
    python benchmarks/continual.py --table                          # what has been measured so far

    cnn    the CNN of adapt_quality: trained on the training split of a fold of the digits, by float QAT to 4-bit weights
           and 8-bit activations, then packed
    vit    the small vision transformer, the same

Then it meets the shifts of WORLDS in that order, each for 5 epochs (`vit`: 3) in batches of 32, as many steps for all, on
the training images as they look under that shift alone. Each has an optimizer and a schedule of its own (warm-up, then a
cosine to 0), as five calls of `bitsmith adapt` would. Accuracies are those of the test split, clean and under every shift,
before and after each; shifts of training and of test images are drawn from different seeds. BatchNorm is folded where codes
train, and float QAT still has it; ranges of activations learn in float QAT, and are as stored in the others.

`replay` keeps a tenth as many images as the training split has, in bytes, shared evenly by clean images and the shifts so
far: an old share shrinks when a new one comes. They are mixed into each epoch, the steps are the same. `replay x4`: each
four times in an epoch. `carried on`: one optimizer for all shifts, whose residuals and moments stay. `all at once`: one
training on the clean images and all shifts, of as many steps as the five have together: what there is to reach.
`zeroth order`: scales and biases by forward passes alone. Learning rates of the CNN are those that adapt_quality found for one
shift, of the transformer those of recipes; nothing was chosen by what is forgotten.

    average       mean accuracy on the clean images and the five shifts, after the last
    forgetting    mean over all of these but the last shift: the best accuracy so far minus that after the last
    plasticity    mean accuracy on a shift, right after its own training
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _results
import torch
from adapt_quality import INTEGER, RATES, Digits, optimizer_of
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.optim import IntegerOptimizer
from bitsmith.quantization.integer_packed import resume_integer
from bitsmith.tasks import evaluate, to_float
from bitsmith.tasks.shifts import shifted
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train

WORLDS = ("contrast", "rotation", "noise", "blur", "brightness")
COLUMNS = ("clean", *WORLDS)
POINT = "W4"
SHARE = 0.1  # of the training split, in the replay buffer
TRAINING_DRAWS = 1000  # added to the seed of the shifts of training images
MODES = {"qat": "float", "integer": "integer", "zeroth_order": "zeroth_order"}  # of TrainConfig, by family


@dataclass(frozen=True)
class Contender:
    """How one trains."""

    family: str = "integer"  # of adapt_quality.RATES
    replay: int = 0  # times that an image of the buffer comes in an epoch
    carried: bool = False  # the optimizer, from one shift to the next
    at_once: bool = False


CONTENDERS = {
    "float QAT": Contender("qat"),
    "float QAT, replay": Contender("qat", replay=1),
    "float QAT, replay x4": Contender("qat", replay=4),
    "float QAT, all at once": Contender("qat", at_once=True),
    "integer": Contender(),
    "integer, carried on": Contender(carried=True),
    "integer, replay": Contender(replay=1),
    "integer, replay x4": Contender(replay=4),
    "integer, all at once": Contender(at_once=True),
    "zeroth order": Contender("zeroth_order"),
}


class CNN(Digits):
    """The packed CNN and its fold, clean and under every shift."""

    rounds = 5  # epochs of each shift
    rates: Mapping[str, float] = RATES["digits"]

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.train, self.test = {"clean": to_float(self.data.train_x)}, {"clean": to_float(self.data.test_x)}
        for world in WORLDS:
            self.train[world] = shifted(world, self.data.train_x, self.severity, seed + TRAINING_DRAWS)
            self.test[world] = shifted(world, self.data.test_x, self.severity, seed)

    def start(self, family: str) -> nn.Module:
        """The model before the first shift, in the form that the family trains."""
        model = self.prepared(POINT)
        if family != "qat":
            model = bs.finalize(model, self.train["clean"][:8])
        if family in INTEGER:
            resume_integer(model)
        return model

    def accuracies(self, model: nn.Module) -> list[float]:
        """Of the test split in every world, as COLUMNS."""
        return [evaluate(model, self.test[world], self.data.test_y)["accuracy"] for world in COLUMNS]

    def buffer(self, worlds: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """What is kept of these worlds: images as bytes, labels. What it keeps of one, it kept before."""
        count, kept = len(self.data.train_y), []
        for number, world in enumerate(worlds):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed * 100 + number))
            rows = order[: round(SHARE * count) // len(worlds)]
            images = (self.train[world][rows] * 255).round().to(torch.uint8)
            kept.append((images, self.data.train_y[rows].to(torch.uint8)))
        images, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return images, labels

    def one(self, contender: Contender, rate: float) -> dict[str, Any]:
        """Accuracies before the first and after each shift, (1 + shifts, clean and shifts), and what it took."""
        started, model, most, optimizer = time.process_time(), self.start(contender.family), 0, None
        matrix = [self.accuracies(model)]
        steps = self.rounds * -(-len(self.data.train_y) // self.size)
        if contender.at_once:
            x = torch.cat([self.train[world] for world in COLUMNS])
            y = self.data.train_y.repeat(len(COLUMNS))
            self.learn(model, x, y, contender, rate, steps * len(WORLDS))
            matrix.append(self.accuracies(model))
            return {"matrix": matrix, "seconds": time.process_time() - started}
        for number, world in enumerate(WORLDS, 1):
            x, y = self.train[world], self.data.train_y
            if contender.replay:
                images, labels = self.buffer(COLUMNS[:number])
                most = max(most, images.numel() + labels.numel())
                x = torch.cat([x, *[to_float(images)] * contender.replay])
                y = torch.cat([y, *[labels.long()] * contender.replay])
            optimizer = self.learn(model, x, y, contender, rate, steps, optimizer)
            matrix.append(self.accuracies(model))
        return {"matrix": matrix, "buffer_bytes": most, "seconds": time.process_time() - started}

    def learn(
        self, model: nn.Module, x: Tensor, y: Tensor, contender: Contender, rate: float, steps: int,
        optimizer: Any = None,
    ) -> Any:  # fmt: skip
        """So many steps on x and y, in place. Returns the optimizer if the next training goes on with it."""
        optimizer = optimizer or optimizer_of(contender.family, model, rate, {})
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"])  # the schedule ended at 0
        mode = MODES[contender.family]
        config = TrainConfig(
            batch_size=self.size,
            learning_rate=rate,
            weight_decay=0.0,
            seed=self.seed,
            device="cpu",
            mode=mode,
        )
        train(model, x, y, config, optimizer=optimizer, steps=steps)
        if contender.carried:
            return optimizer
        if isinstance(optimizer, IntegerOptimizer):
            optimizer.detach()
        return None


class ViT(CNN):
    """The same of the vision transformer."""

    network, epochs, decay = "digits_vit", 30, 0.05
    rounds = 3
    rates: Mapping[str, float] = {"qat": 2e-3, "integer": 1e-2, "zeroth_order": 1e-2}


TASKS: dict[str, type[CNN]] = {"cnn": CNN, "vit": ViT}


# ---- tables


def figures(matrix: list[list[float]]) -> dict[str, float]:
    """What the header says, in per cent; of a training on all at once the average alone."""
    last = matrix[-1]
    found = {"average": sum(last) / len(last)}
    if len(matrix) == len(COLUMNS):
        lost = [max(row[at] for row in matrix[:-1]) - last[at] for at in range(len(last) - 1)]
        found["forgetting"] = sum(lost) / len(lost)
        found["plasticity"] = sum(matrix[at][at] for at in range(1, len(matrix))) / len(WORLDS)
    return {name: 100 * value for name, value in found.items()}


def table(entries: Mapping[str, Any], task: str) -> None:
    """The three figures of every contender, and the mean matrix of each."""
    names = dict.fromkeys(name for entry in entries.values() for name in entry)
    print(f"\n{task}: per cent, mean ± standard error (seeds)")
    print(f"{'':<26}" + "".join(f"{key:>18}" for key in ("average", "forgetting", "plasticity", "buffer")))
    for name in names:
        runs = [entry[name] for entry in entries.values() if name in entry]
        found = [figures(run["matrix"]) for run in runs]
        cells = []
        for key in ("average", "forgetting", "plasticity"):
            values = [one[key] for one in found if key in one]
            mean, error = _results.mean_and_error(values) if values else (0.0, 0.0)
            cells.append(f"{mean:.1f} ± {error:.1f} ({len(values)})" if values else "-")
        cells.append(f"{max(run.get('buffer_bytes', 0) for run in runs)} bytes")
        print(f"{name:<26}" + "".join(f"{cell:>18}" for cell in cells))
    for name in names:
        matrices = torch.tensor([entry[name]["matrix"] for entry in entries.values() if name in entry])
        print(f"\n{task}, {name}: accuracy, mean\n{'after':<14}" + "".join(f"{c:>12}" for c in COLUMNS))
        after = ("none", *WORLDS) if matrices.shape[1] == len(COLUMNS) else ("none", "all at once")
        for label, row in zip(after, matrices.double().mean(0).tolist(), strict=True):
            print(f"{label:<14}" + "".join(f"{100 * value:>12.1f}" for value in row))


def named(task: str, names: list[str]) -> dict[str, tuple[Contender, float]]:
    """Name -> contender and learning rate, of those asked for, or of all."""
    chosen = {}
    for name in names or CONTENDERS:
        base, _, rate = name.partition(" @")
        contender = CONTENDERS[base]
        chosen[name] = (contender, float(rate or TASKS[task].rates[contender.family]))
    return chosen


def main() -> None:
    """Measure what is missing, seed by seed, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="cnn", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contenders", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("continual", options.out)
    entries = results.setdefault(options.task, {})
    chosen = named(options.task, options.contenders)
    for seed in range(0 if options.table else options.seeds):
        entry, unit = entries.setdefault(str(seed), {}), TASKS[options.task](seed)
        for name, (contender, rate) in chosen.items():
            if name in entry:
                continue
            entry[name] = {**unit.one(contender, rate), "rate": rate}
            told = ", ".join(f"{k} {v:.1f}" for k, v in figures(entry[name]["matrix"]).items())
            print(f"seed {seed}  {name:<26} {told}, {entry[name]['seconds']:.0f} s", flush=True)
            _results.save("continual", results, options.out)
    table(entries, options.task)


if __name__ == "__main__":
    main()
