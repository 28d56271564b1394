"""Blocks are learned in order, by what they put out in float, and never made worse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, DataError, SchemeError, SiteError
from bitsmith.optim.zeroth_order import ZerothOrder
from bitsmith.post_training.block_reconstruction import blocks_of, reconstruct
from bitsmith.quantization.smoothing import fold, smooth, transformations
from tests.post_training.models import residual


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.fixture
def model() -> nn.Module:
    model = residual()
    for block in model.blocks:
        block.norm.weight.data[1] *= 20  # an outlier
    weights = bs.Scheme(bits=3, granularity="channel", calibration="minmax")
    bs.prepare(model, weights, bs.Scheme(bits=4))
    bs.calibrate(model, batches())
    smooth(model, batches())
    return model


def test_every_block_comes_nearer_to_the_float_one(model: nn.Module) -> None:
    reference, seen = residual(), []
    for block in reference.blocks:
        block.norm.weight.data[1] *= 20
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".weight")}
    x = batches(1)[0]
    with torch.no_grad():
        before = float((model(x) - reference(x)).square().mean())
    facts = reconstruct(
        model, batches(), epochs=10, progress=lambda facts, done, count: seen.append((facts, done, count))
    )
    assert [f.name for f in facts] == ["blocks.0", "blocks.1"]
    assert seen == [(facts[0], 1, 2), (facts[1], 2, 2)]
    assert facts[0].after < 0.9 * facts[0].before
    assert all(f.after <= f.before for f in facts)
    with torch.no_grad():
        after = model(x)
        assert float((after - reference(x)).square().mean()) < before
        kept = dict(model.named_parameters())
        assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
        fold(model)
        torch.testing.assert_close(model(x), after, rtol=0.02, atol=0.02)


def test_the_error_is_that_of_the_block_on_what_the_quantized_model_feeds_it(model: nn.Module) -> None:
    reference = residual()
    for block in reference.blocks:
        block.norm.weight.data[1] *= 20
    found = reconstruct(model, batches(), epochs=1, lr=1e-9)
    with torch.no_grad():
        wrong = size = 0.0
        for x in batches():
            hidden, target = model.blocks[0](model.embed(x)), reference.blocks[0](reference.embed(x))
            target = reference.blocks[1](target)
            wrong += float((model.blocks[1](hidden) - target).double().square().sum())
            size += float(target.double().square().sum())
    assert found[1].after == pytest.approx(wrong / size, rel=1e-3)


def test_a_forward_only_optimizer_trains_them_too(model: nn.Module) -> None:
    reference, x = residual(), torch.cat(batches())
    for block in reference.blocks:
        block.norm.weight.data[1] *= 20
    target = reference(x).detach()
    before = {name: p.detach().clone() for name, p in transformations(model).items()}
    optimizer = ZerothOrder(model, lr=0.03, eps=0.05, normalize=True, parts=("transforms",))
    losses = [optimizer.step(lambda: (model(x) - target).square().mean()) for _ in range(80)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(not torch.equal(p, before[name]) for name, p in transformations(model).items())


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"batches": []}, DataError, "no batch"),
        ({"epochs": 0}, SchemeError, "epochs"),
        ({"lr": 0.0}, SchemeError, "lr"),
        ({"blocks": ["norm"]}, SiteError, "nothing to learn"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    model: nn.Module, arguments: dict[str, Any], kind: type[BitsmithError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        reconstruct(model, **({"batches": batches(1)} | arguments))


def test_a_model_that_is_not_smoothed_is_refused() -> None:
    with pytest.raises(SiteError, match="Call smooth"):
        blocks_of(nn.Sequential(nn.Linear(2, 2)))
