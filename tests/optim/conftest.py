"""What the tests of this folder train."""

import pytest
from torch import nn

from tests.optim.models import trained_mlp


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """W4A8 in its middle layer, 8 bits outside, on points without a shift. Copy it before training it."""
    return trained_mlp()
