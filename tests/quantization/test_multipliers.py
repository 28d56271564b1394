"""Multipliers hold a limit: on a toy problem whose answer is known, and by the formula."""

from __future__ import annotations

import math

import pytest
import torch

from bitsmith.quantization.multipliers import Multipliers


def settle(*, two_sided: bool, best: float) -> float:
    """The cost where minimizing (log cost - log best)^2 under cost <= 1, or cost = 1, comes to rest."""
    multipliers = Multipliers(["bits"], rate=0.2, damping=2.0, two_sided=two_sided)
    log_cost = torch.tensor([math.log(best)], requires_grad=True)
    for _ in range(400):
        used = log_cost.exp()
        loss = (log_cost - math.log(best)).square().sum() + multipliers.pressure(used) @ used.log()
        (gradient,) = torch.autograd.grad(loss, log_cost)
        log_cost.data -= 0.05 * gradient
        multipliers.advance()
    return float(log_cost.detach().exp())


@pytest.mark.parametrize("best", [1.5, 4.0])
def test_a_limit_that_pulls_is_met_exactly(best: float) -> None:
    assert settle(two_sided=False, best=best) == pytest.approx(1.0, abs=1e-3)


def test_a_limit_that_does_not_pull_is_left_alone_unless_it_is_a_target() -> None:
    assert settle(two_sided=False, best=0.5) == pytest.approx(0.5, abs=1e-3)
    assert settle(two_sided=True, best=0.5) == pytest.approx(1.0, abs=1e-3)


def test_pressure_and_step_follow_the_formula() -> None:
    multipliers = Multipliers(["bops", "weight_bytes"], rate=0.2, damping=2.0)
    used = torch.tensor([1.5, 0.5])
    torch.testing.assert_close(multipliers.pressure(used), (2.0 * used.log()).clamp(min=0))
    multipliers.advance()
    found = multipliers.scalars()
    assert float(found["multiplier_bops"]) == pytest.approx(0.2 * math.log(1.5))
    assert float(found["multiplier_weight_bytes"]) == 0.0
    assert float(found["used_weight_bytes"]) == 0.5
