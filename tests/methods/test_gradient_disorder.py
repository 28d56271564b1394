"""Gradient disorder: how it is counted, which scales it freezes, and what then moves them."""

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import SiteError
from bitsmith.methods.sharpness import Sharpness
from bitsmith.quantization import Scheme, prepare, sites
from tests.methods.test_sharpness import quantized, run_of


def signs(text: str) -> list[float]:
    return [{"+": 0.3, "-": -2.0, "0": 0.0}[sign] for sign in text]


def disorder_of(*channels: str, window: int, **options) -> tuple[list[float], list[float]]:
    """Disorder and frozen share after each whole window, of a quantizer with these gradients."""
    net = nn.Sequential(nn.Linear(3, len(channels)))
    prepare(net, Scheme(bits=4, granularity="channel"), None, first_last_bits=None)
    method = Sharpness(
        **{
            "radius": 0.0,
            "kind": "sagm",
            "freeze": "ordered",
            "disorder_window": window,
            **options,
        }
    )
    method.attach(net)
    (quantizer,) = sites(net).values()
    disorders, frozen = [], []
    for step, gradients in enumerate(zip(*map(signs, channels), strict=True)):
        quantizer.range.grad = torch.tensor([gradients])
        method.after_backward(lambda: torch.zeros(()))
        method.after_step(step, 100)
        if (step + 1) % window == 0:
            disorders.append(float(method.disorder))
            frozen.append(float(method.scalars()["frozen_share"]))
    return disorders, frozen


def test_disorder_is_the_share_of_sign_flips_in_a_window() -> None:
    disorders, _ = disorder_of("++++++-+-+++--+-----", window=5)
    assert disorders == pytest.approx([0, 1, 2 / 4, 0]), "from one window to the next nothing is counted"
    disorders, _ = disorder_of("+++++", "+-+-+", "++--+", window=5)
    assert disorders == pytest.approx([(0 + 1 + 2 / 4) / 3]), "a quantizer's is the mean over its scales"


def test_random_signs_have_a_disorder_of_a_half() -> None:
    draws = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    disorders, _ = disorder_of(*("".join("+-"[int(s)] for s in row) for row in draws), window=300)
    assert disorders == pytest.approx([0.5], abs=0.02)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"freeze": "ordered"}, [1, 0, 1]),
        ({"freeze": "ordered", "unfreeze": False}, [1, 1, 1]),
        ({"freeze": "disordered"}, [0, 1, 0]),
        ({"freeze": "disordered", "unfreeze": False}, [0, 1, 1]),
    ],
)
def test_scales_freeze_and_come_free_again_by_their_disorder(options: dict, frozen: list[int]) -> None:
    _, found = disorder_of("+++++-+-----", window=4, disorder_threshold=0.4, **options)
    assert found == frozen


def test_the_task_leaves_a_frozen_scale_to_flatness() -> None:
    def step(freeze: bool) -> dict[str, dict[str, Tensor]]:
        net = quantized(dropout=0.0)
        method = Sharpness(0.05, kind="sagm", freeze="ordered")
        run = run_of(net, method)
        if freeze:
            method.frozen[0] = 1
            method._restore()
        gradients = {}
        original = run._second_pass

        def second(*arguments):
            gradients["first"] = dict(run_gradients)
            loss = original(*arguments)
            gradients["second"] = {n: p.grad.clone() for n, p in net.named_parameters()}
            return loss

        run._second_pass = second
        run_gradients: dict[str, Tensor] = {}
        before = method.after_backward

        def first(closure) -> None:
            run_gradients.update({n: p.grad.clone() for n, p in net.named_parameters()})
            before(closure)

        method.after_backward = first
        run.optimizer.step = lambda: None
        run.train_step()
        gradients["now"] = {n: p.grad for n, p in net.named_parameters()}
        return gradients

    free, held = step(False), step(True)
    name, other = "0.weight_quantizer.range", "5.weight_quantizer.range"
    mean = {n: (free["first"][n] + free["second"][n]) / 2 for n in (name, other)}
    torch.testing.assert_close(free["now"][name], mean[name])
    torch.testing.assert_close(held["now"][name], held["second"][name])
    torch.testing.assert_close(held["now"][other], mean[other])


def test_a_frozen_scale_stands_still_between_second_passes() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    prepare(net, Scheme(bits=4, granularity="channel"), None, first_last_bits=None)
    method = Sharpness(every=4, freeze="ordered", disorder_window=2)
    method.attach(net)
    (quantizer,) = sites(net).values()
    for step in range(4):
        quantizer.range.grad = torch.tensor([[1.0, 2.0]])
        method.after_backward(lambda: torch.zeros(()))
        if step == 3:
            assert not quantizer.range.grad.any()
        method.after_step(step, 100)


def test_without_learned_scales_none_can_be_frozen() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    prepare(net, Scheme(bits=4, granularity="channel", range="static"), None, first_last_bits=None)
    with pytest.raises(SiteError, match="no scale is learned"):
        Sharpness(kind="sagm", freeze="ordered").attach(net)
