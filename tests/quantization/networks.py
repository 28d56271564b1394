"""Made-up cost models: no network has to be traced to test what is computed from its numbers."""

import random
from collections.abc import Mapping, Sequence

from bitsmith.quantization.cost import CostModel, LayerCost
from bitsmith.quantization.liveness import Liveness, LiveTensor
from bitsmith.quantization.target import TARGETS, Target


def network(
    layers: Sequence[tuple[str, str, int, int]],
    live: Liveness | None = None,
    target: str | Target = "native",
    **fields: int,
) -> CostModel:
    """layers: (weight site, input site, MACs, weight elements); a repeated weight site is tied."""
    found = []
    seen: set[str] = set()
    for i, (weight, x, macs, elements) in enumerate(layers):
        own = 0 if weight in seen else elements
        seen.add(weight)
        found.append(
            LayerCost(f"l{i}", "Linear", macs, (weight, x), own, bool(own), 0, 1, {x: 8 + i}, (1, 1))
        )
    present = {site: 8 for layer in found for site in layer.operands}
    return CostModel(
        layers=tuple(found),
        present=present,
        float_macs=fields.get("float_macs", 0),
        other_bytes=fields.get("other_bytes", 4),
        float_bytes=4 * sum(layer.weight_elements for layer in found) + 100,
        target=TARGETS[target] if isinstance(target, str) else target,
        live=live or Liveness(),
    )


def random_network(
    seed: int, layers: int, target: str | Target = "native", candidates: int = 3
) -> tuple[CostModel, dict[str, list[int]], dict[str, list[float]]]:
    """(cost, candidates, values): some weights tied, inputs that two layers read, some sites fixed."""
    draw = random.Random(seed)
    names = []
    for i in range(layers):
        weight = f"w{draw.randrange(i)}" if i and draw.random() < 0.3 else f"w{i}"
        x = f"x{draw.randrange(i)}" if i and draw.random() < 0.3 else f"x{i}"
        names.append((weight, x, draw.randint(1, 50), draw.randint(1, 60)))
    inputs = sorted({x for _, x, _, _ in names})
    tensors = [
        LiveTensor(draw.randint(1, 30), tuple(draw.sample(inputs, min(len(inputs), draw.randint(0, 2)))))
        for _ in range(4)
    ]
    live = Liveness(tuple(tensors), ((0, 1), (1, 2, 3)))
    cost = network(names, live, target, float_macs=draw.choice((0, 3)))
    choices = {
        site: sorted(draw.sample((2, 3, 4, 6, 8), 1 if draw.random() < 0.15 else draw.randint(2, candidates)))
        for site in cost.present
    }
    values = {site: [round(draw.uniform(-5, 5), 3) for _ in bits] for site, bits in choices.items()}
    return cost, choices, values


def total(
    plan: Mapping[str, int], choices: Mapping[str, list[int]], values: Mapping[str, list[float]]
) -> float:
    """Value of a plan over the free sites."""
    return sum(values[s][choices[s].index(plan[s])] for s in choices if len(choices[s]) > 1)
