"""trace: multiply-accumulates by hand, which BatchNorm can be folded, and sites that are never called."""

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import SiteError
from bitsmith.quantization import MatMul, Scheme, prepare, trace

W4, A8 = Scheme(bits=4, granularity="channel"), Scheme(bits=8)


def prepared(model: nn.Module, weights: Scheme | None = W4, **arguments) -> nn.Module:
    prepare(model, weights, A8, **arguments)
    return model


@pytest.mark.parametrize("samples", [1, 3])
def test_macs_and_operand_sizes_are_per_sample_and_by_hand(samples: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
            self.one = nn.Conv1d(6, 5, 2)
            self.scores = MatMul()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(self.conv(x).flatten(2)).transpose(1, 2)  # (N, 15, 5)
            return self.fc(self.scores(self.scores(x, x.transpose(1, 2)), x)).mean(1)

    found = trace(prepared(Net()), torch.randn(samples, 4, 8, 8))
    macs = {name: layer.macs for name, layer in found.layers.items()}
    assert macs == {
        "conv": 6 * 4 * 4 * (2 * 9),
        "one": 5 * 15 * (6 * 2),
        "scores": 15 * 15 * 5 + 15 * 5 * 15,
        "fc": 15 * 3 * 5,
    }
    assert found.layers["scores"].calls == 2
    assert found.layers["scores"].operands == {"scores.left": 75 + 225, "scores.right": 75 + 75}
    assert found.layers["conv"].operands == {"conv.input": 4 * 8 * 8}
    assert found.layers["fc"].operands == {"fc.input": 75}
    assert found.float_macs == 0


def test_products_that_no_site_covers_are_float_macs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.up = nn.ConvTranspose1d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            x = nn.functional.scaled_dot_product_attention(x, x, x)
            return self.up(x.transpose(1, 2))

    found = trace(prepared(Net()), torch.randn(2, 7, 4))
    assert found.layers["fc"].macs == 7 * 16
    assert found.float_macs == 2 * 7 * 7 * 4 + 7 * 4 * 2


def test_a_model_in_training_mode_is_left_as_it_was() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Conv2d(2, 2, 3)))
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, torch.randn(2, 1, 8, 8))
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(v, state[n]) or v.isnan().all() for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_dead_site_is_named() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(SiteError, match=r"^unused\.weight: the quantizer of this site was never called"):
        trace(prepared(Bypass()), torch.randn(2, 4))


# ---- BatchNorm


class Net(nn.Module):
    """A convolution and a BatchNorm, and whatever ``flow`` does with them."""

    def __init__(self, flow, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 1)
        self.norm = norm or nn.BatchNorm2d(3)
        self.flow = flow

    def forward(self, x: Tensor):
        return self.flow(self, x)


def folds(
    model: nn.Module, shape: tuple[int, ...] = (2, 3, 5, 5), weights: Scheme | None = W4
) -> dict[str, str]:
    return trace(prepared(model, weights), torch.randn(shape)).folds


@pytest.mark.parametrize("weights", [W4, Scheme(bits=4, granularity="group", group_size=9), None])
def test_a_norm_that_alone_reads_a_convolution_is_folded(weights: Scheme | None) -> None:
    model = Net(lambda m, x: m.other(m.norm(m.conv(x)).relu()))
    assert folds(model, weights=weights) == {"conv": "norm"}


STAYS = {
    "read again beside the norm": lambda m, x: (y := m.conv(x), m.other(m.norm(y)) + y)[1],
    "read again before the norm": lambda m, x: (y := m.conv(x), y.mean() + m.other(m.norm(y)))[1],
    "returned as well": lambda m, x: (y := m.conv(x), (m.other(m.norm(y)), y))[1],
    "changed in between": lambda m, x: m.other(m.norm(m.conv(x).relu())),
    "a norm that two convolutions share": lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)),
    "a norm that also reads another tensor": lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x) + 1),
    "a norm called twice on one output": lambda m, x: (y := m.conv(x), m.norm(y) + m.other(m.norm(y)))[1],
    "a convolution called twice": lambda m, x: m.norm(m.conv(m.other(x))) + m.conv(x),
    "a norm before the convolution": lambda m, x: m.other(m.conv(m.norm(x))),
}


@pytest.mark.parametrize("flow", STAYS.values(), ids=STAYS)
def test_a_norm_is_not_folded_where_that_would_change_the_model(flow) -> None:
    model = Net(flow)
    if "other" not in flow.__code__.co_names:
        model.other = nn.Identity()
    assert folds(model) == {}


def test_a_norm_is_not_folded_into_one_scale_for_the_tensor() -> None:
    model = Net(lambda m, x: m.other(m.norm(m.conv(x))))
    assert folds(model, weights=Scheme(bits=4)) == {}


def test_a_norm_is_not_folded_into_a_tied_weight() -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)) + m.other(x), conv=nn.Conv2d(3, 3, 1))
    model.conv.weight = model.other.weight
    assert folds(model) == {}


def test_a_norm_without_statistics_is_not_folded() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    assert folds(Net(lambda m, x: m.other(m.norm(m.conv(x))), norm=norm)) == {}


def test_a_linear_layer_is_folded_where_the_norm_reads_its_features() -> None:
    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    assert folds(Linears(), (4, 5)) == {"conv": "norm"}
    assert folds(Linears(), (4, 5, 5)) == {}, "there the norm's channels are the tokens"


def test_the_product_of_two_activations_takes_no_norm() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product, self.norm = MatMul(), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.product(x, x))

    assert folds(Product(), (2, 5, 5)) == {}


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        # q, k, v and out are 4 x 8 x 8 a token; scores and context 2 x 5 x 8 a token
        (nn.MultiheadAttention(8, 2, batch_first=True), 5 * (4 * 8 * 8 + 2 * 5 * 8)),
        # four gates of an input and a hidden product each, a step
        (nn.LSTM(8, 8, batch_first=True), 5 * 4 * (8 * 8 + 8 * 8)),
    ],
)
def test_products_of_fused_layers_count_as_float(layer: nn.Module, macs: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            arguments = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
            return self.head(self.layer(*arguments)[0])

    model, x = Model(), torch.randn(3, 5, 8)
    prepare(model, Scheme(bits=4), Scheme(bits=4))
    found = trace(model, x)
    assert (found.layers["head"].macs, found.float_macs) == (5 * 8 * 2, macs)
