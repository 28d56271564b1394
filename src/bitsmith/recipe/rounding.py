"""The recipe's `post_training:`: weights rounded layer by layer before anything trains with quantization.

Without the section weights are rounded to nearest by their quantizers. With it the model holds weights on
their grids, which are the post-training figure of a run and the start of its training. All of it follows from
the recipe, so that a resumed run repeats it and finds the same. What became of each layer is in FILE.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.files import write_json
from bitsmith.post_training.post_train import LayerFacts, checked_structure, post_train
from bitsmith.post_training.streams import HELD_OUT
from bitsmith.recipe.progress import Event, Progress
from bitsmith.recipe.schema import PostTraining, Recipe, relocated
from bitsmith.tasks import Examples

FILE = "post_training.json"
BATCHES = 8  # of a small sample: a quarter of them is held out
ROWS = 64  # of a batch at most: activations of all layers are kept


def round_weights(
    recipe: Recipe, model: nn.Module, float_model: nn.Module, data: Examples, out: Path, tell: Progress
) -> list[LayerFacts]:
    """Round ``model``, prepared and calibrated, in place, and write FILE into ``out``; nothing where the
    recipe has no such section. Raises what `post_train` raises."""
    spec = recipe.post_training
    if spec is None:
        return []

    def show(facts: LayerFacts, done: int, count: int) -> None:
        # one unit is kept back for the figures that follow
        values = {} if facts.error is None else {"output error": facts.error}
        tell(Event("post_training", done, count + 1, values, facts.name))

    batches = rows(spec, recipe.train.seed, data)
    facts = post_train(model, float_model, batches, **spec.options(), progress=show)
    layers = [asdict(each) for each in facts]
    write_json(out / FILE, {"version": 1, "options": spec.model_dump(), "layers": layers})
    return facts


def check(recipe: Recipe, model: nn.Module, float_model: nn.Module, data: Examples) -> None:
    """Find out before a long training what `round_weights` would refuse of ``model``, prepared and
    calibrated."""
    spec = recipe.post_training
    if spec is not None:
        finds = spec.matching and (spec.alpha is None or spec.beta is None)
        batches = rows(spec, recipe.train.seed, data)
        try:
            checked_structure(model, copy.deepcopy(float_model), batches, HELD_OUT if finds else 0)
        except DataError as error:
            raise relocated(error, f"post_training: {error.where}", " (post_training.samples)") from None


def rows(spec: PostTraining, seed: int, data: Examples) -> list[Tensor]:
    """The samples that it looks at, in batches. Raises DataError where the training part has fewer."""
    if len(data.train_x) < spec.samples:
        raise DataError(
            f"there are fewer training {data.unit} than post-training looks at",
            where="post_training.samples",
            got=spec.samples,
            expected=f"at most {len(data.train_x)}",
        )
    size = max(1, min(ROWS, spec.samples // BATCHES))
    return [x for x, _ in data.drawn(spec.samples, seed, size)]
