"""What of a model trains: parts, layers, and the light variant."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import bitsmith as bs
from bitsmith.optim.parts import PARTS, pack_rest
from bitsmith.optim.zeroth_order import ZerothOrder
from tests.optim.models import attention, train


def test_the_light_variant_trains_a_few_layers_and_packs_the_rest() -> None:
    model, x = attention(), torch.randn(2, 5, 8)
    before = model(x)
    assert pack_rest(model) == ["1.q_proj", "1.v_proj"]
    assert torch.equal(model(x), before)
    assert [n for n, p in model.named_parameters() if p.ndim == 2 and n.endswith("weight")] == [
        "1.q_proj.weight",
        "1.v_proj.weight",
    ]
    stored = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = ZerothOrder(model, lr=0.1, eps=0.02, unit="rms", normalize=True)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(x)[:, 0], torch.tensor([0, 2])))
    assert not torch.equal(model(x), before)
    assert all(torch.equal(b, stored[n]) for n, b in model.named_buffers())
    after = model(x)
    whole = bs.finalize(model, x)
    torch.testing.assert_close(whole(x), after, rtol=0, atol=1e-6)
    assert not any(n.endswith("proj.weight") for n, _ in whole.named_parameters())


def test_parts_and_layers_choose_what_trains(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ZerothOrder(
        model, lr={"weights": 0.1, "biases": 0.1}, parts=("weights", "biases"), layers=("2",), normalize=True
    )
    train(model, optimizer, 2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"2.weight", "2.bias"}
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "biases"]
    assert set(PARTS) == {"weights", "scales", "biases", "others", "transforms"}
