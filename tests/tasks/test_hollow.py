"""A hollow model has the shapes, names, ties and buffers of the one that it stands for."""

import pytest
import torch

from bitsmith.tasks import build
from bitsmith.tasks.hollow import build_hollow
from bitsmith.tasks.models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_but_for_its_numbers(name: str) -> None:
    whole, hollow = build(name), build_hollow(name)
    for key, buffer in whole.named_buffers():
        assert torch.equal(hollow.get_buffer(key), buffer)
    hollow.load_state_dict(whole.state_dict())
    for key, value in whole.state_dict().items():
        assert torch.equal(hollow.state_dict()[key], value)
    assert hollow.bitsmith_model == whole.bitsmith_model


def test_it_draws_nothing_and_only_inside() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    hollow = build_hollow("byte_llama", width=16, depth=1, tied=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert hollow.lm_head.weight is hollow.embed_tokens.weight
    assert torch.zeros(9).normal_().abs().sum() > 0
