"""A hollow model has the shapes, names and ties of the one that it stands for, without its memory."""

import pytest
import torch

from bitsmith.errors import RecipeError
from bitsmith.tasks import build
from bitsmith.tasks.hollow import build_hollow, fill
from bitsmith.tasks.models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_but_for_its_numbers(name: str) -> None:
    whole, hollow = build(name), build_hollow(name)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    for key, buffer in whole.named_buffers():
        assert torch.equal(hollow.get_buffer(key), buffer)
    fill(hollow)
    hollow.load_state_dict(whole.state_dict())
    for key, value in whole.state_dict().items():
        assert torch.equal(hollow.state_dict()[key], value)
    assert hollow.bitsmith_model == whole.bitsmith_model


def test_tied_weights_stay_tied() -> None:
    hollow = build_hollow("byte_llama", width=16, depth=1, tied=True)
    assert hollow.lm_head.weight is hollow.embed_tokens.weight
    fill(hollow)
    assert hollow.lm_head.weight is hollow.embed_tokens.weight
    assert hollow.lm_head.weight.device.type == "cpu"


def test_models_that_are_built_later_have_their_memory() -> None:
    with pytest.raises(RecipeError):
        build_hollow("byte_llama", width=7)
    assert not any(parameter.is_meta for parameter in torch.nn.Linear(2, 2).parameters())
