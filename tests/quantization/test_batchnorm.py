"""Re-estimated BatchNorm statistics are the plain means over the batches, and nothing else changes."""

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.quantization import reestimate_batchnorm


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 4),
        nn.BatchNorm1d(4),
    )  # fmt: skip


def batches() -> list[Tensor]:
    return list(torch.randn(3, 8, 2, 6, 6, generator=torch.Generator().manual_seed(2)) * 3 + 1)


def test_statistics_are_those_by_hand() -> None:
    net = model()
    with torch.no_grad():
        net[1].running_mean.fill_(50.0)
    assert reestimate_batchnorm(net, batches()) == 2
    outputs = [net[0](x).transpose(0, 1).flatten(1) for x in batches()]
    mean = torch.stack([y.mean(1) for y in outputs]).mean(0)
    variance = torch.stack([y.var(1, unbiased=True) for y in outputs]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean.detach())
    torch.testing.assert_close(net[1].running_var, variance.detach())
    assert net[1].num_batches_tracked == 3


def test_the_second_norm_sees_the_batch_statistics_of_the_first_and_no_dropout() -> None:
    net = model()
    reestimate_batchnorm(net, batches())
    with torch.no_grad():
        head = [net[4](net[1].train()(net[0](x)).flatten(1)).mean(0) for x in batches()]
    torch.testing.assert_close(net[5].running_mean, torch.stack(head).mean(0))


def test_modes_momenta_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    net[1].eval()
    parameters = [p.clone() for p in net.parameters()]
    reestimate_batchnorm(net, ((x,) for x in batches()))
    assert [m.training for m in net] == [True, False, True, True, True, True]
    assert [net[1].momentum, net[5].momentum] == [0.3, 0.1]
    assert all(torch.equal(a, b) for a, b in zip(parameters, net.parameters(), strict=True))


def test_it_is_idempotent() -> None:
    net = model()
    reestimate_batchnorm(net, batches())
    first = {name: value.clone() for name, value in net.state_dict().items()}
    reestimate_batchnorm(net, batches())
    assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())


def test_without_batches_the_old_statistics_stay_and_it_says_so() -> None:
    net = model()
    net(batches()[0])
    before = net[1].running_mean.clone()
    with pytest.raises(DataError, match="there is no batch"):
        reestimate_batchnorm(net, [])
    assert torch.equal(net[1].running_mean, before)
    assert net[1].momentum == 0.3


def test_a_batch_that_fails_leaves_modes_and_momenta() -> None:
    net = model()
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(net, [batches()[0], torch.zeros(1)])
    assert all(m.training for m in net)
    assert net[1].momentum == 0.3


def test_norms_without_statistics_are_left_alone() -> None:
    assert reestimate_batchnorm(nn.BatchNorm2d(3, track_running_stats=False), []) == 0
    assert reestimate_batchnorm(nn.Linear(2, 2), []) == 0
