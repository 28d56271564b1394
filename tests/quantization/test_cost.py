"""The cost model against a hand count and PyTorch's FLOP counter: BOPs, bytes, average bits."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bitsmith.quantization import Scheme, calibrate, measure, plan_of, prepare
from bitsmith.tasks.models import build

W4, A8 = Scheme(bits=4, granularity="channel"), Scheme(bits=8)
IMAGES = torch.rand(2, 1, 8, 8)


def float_macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as flops:
        model(x)
    return flops.get_total_flops() // 2 // len(x)


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


# ---- BOPs


def test_bops_of_the_cnn_are_those_by_hand() -> None:
    model = build("digits_cnn")
    prepare(model, W4, Scheme(bits=3))
    cost = measure(model, IMAGES)
    macs = {
        "conv1": 64 * 9 * 12,
        "conv2": 64 * 108 * 12,
        "conv3": 16 * 108 * 16,
        "conv4": 16 * 144 * 16,
        "fc": 160,
    }
    bits = {"conv1": 8 * 8, "fc": 8 * 8}
    assert cost.bops(plan_of(model).bits) == sum(n * bits.get(name, 4 * 3) for name, n in macs.items())
    assert (
        cost.bops_float == sum(macs.values()) * 32 * 32 == float_macs(build("digits_cnn"), IMAGES) * 32 * 32
    )


def test_bops_of_the_vit_are_those_by_hand_attention_included() -> None:
    width, hidden, tokens, heads = 8, 16, 16, 2
    arguments = {"width": width, "depth": 1, "heads": heads, "hidden": hidden}
    model = build("digits_vit", **arguments)
    prepare(model, W4, Scheme(bits=3), overrides={"*.scores.left": {"bits": 5}})
    linear = tokens * width * width * 4 + 2 * tokens * width * hidden
    product = heads * tokens * tokens * (width // heads)
    ends = tokens * 16 * width, width * 10
    cost = measure(model, IMAGES)
    expected = linear * 4 * 3 + product * (5 * 3 + 3 * 3) + sum(ends) * 8 * 8
    assert cost.report()["bops"] == expected
    assert cost.float_macs == 0
    assert cost.bops_float == (linear + 2 * product + sum(ends)) * 1024
    assert cost.bops_float == float_macs(build("digits_vit", **arguments), IMAGES) * 1024


def test_operands_in_float_count_32_bits() -> None:
    model = two()
    prepare(model, W4, None, first_last_bits=None)
    assert measure(model, torch.randn(3, 6)).report()["bops"] == (48 + 24) * 4 * 32


def test_bops_are_those_of_the_layers_and_per_sample() -> None:
    model = build("digits_cnn")
    prepare(model, W4, A8)
    reports = [measure(model, torch.rand(n, 1, 8, 8)).report() for n in (1, 5)]
    assert reports[0] == reports[1]
    assert reports[0]["bops"] == sum(layer["bops"] for layer in reports[0]["layers"])


def test_every_figure_is_differentiable_in_the_bits() -> None:
    model = two()
    prepare(model, W4, A8, first_last_bits=None)
    cost = measure(model, torch.randn(3, 6))
    bits = {name: torch.tensor(float(q), requires_grad=True) for name, q in plan_of(model).bits.items()}
    bops, size = cost.bops(bits), cost.weight_bytes(bits)
    assert bops.item() == cost.report()["bops"]
    assert size.item() == pytest.approx(cost.report()["weight_bytes"], abs=1)
    assert cost.average_bits(bits, "weight").item() == 4
    assert cost.average_bits(bits, "activation").item() == 8
    gradient = dict(zip(bits, torch.autograd.grad(bops, list(bits.values())), strict=True))
    assert gradient["0.weight"] == 48 * 8
    assert gradient["2.input"] == 24 * 4
    (d_size,) = torch.autograd.grad(size, [bits["0.weight"]])
    assert d_size == 48 / 8


# ---- bytes and averages


def test_bytes_are_those_by_hand() -> None:
    model = two()
    prepare(model, W4, A8, overrides={"2.weight": {"bits": 3}}, first_last_bits=None)
    calibrate(model, [torch.randn(20, 6)])
    codes = 48 * 4 // 8 + 24 * 3 // 8
    scales, biases, inputs = 4 * (8 + 3), 4 * (8 + 3), 4 * 2
    report = measure(model, torch.randn(3, 6)).report()
    assert report["weight_bytes"] == codes + scales + biases + inputs
    assert report["weight_bytes_float"] == 4 * (48 + 8 + 24 + 3)


def test_codes_are_padded_to_bytes_and_zero_points_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    prepare(model, Scheme(bits=3, granularity="channel", grid="asymmetric"), None, first_last_bits=None)
    assert measure(model, torch.randn(1, 3)).report()["weight_bytes"] == 4 + 3 * 4 + 2  # 27, 9 bits


def test_onnx_containers_hold_three_bits_in_four_and_five_in_eight() -> None:
    for bits, held in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        model = nn.Sequential(nn.Linear(16, 4, bias=False))
        prepare(model, W4.replace(bits=bits), None, first_last_bits=None, target="onnxruntime")
        cost = measure(model, torch.randn(1, 16))
        assert cost.report()["weight_bytes"] == 64 * held // 8 + 4 * 4
        assert measure(model, torch.randn(1, 16), "native").report()["weight_bytes"] == 64 * bits // 8 + 16


def test_a_folded_batchnorm_leaves_a_bias_and_another_one_itself() -> None:
    for granularity, left in (("channel", 4 * 5 + 4 * 5), ("tensor", 4 * 1 + 4 * 4 * 5)):
        model = nn.Sequential(nn.Conv2d(1, 5, 2, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        prepare(model, Scheme(bits=4, granularity=granularity), None, first_last_bits=None)
        assert measure(model, torch.randn(1, 1, 4, 4)).report()["weight_bytes"] == 20 * 4 // 8 + left


def test_a_tied_weight_is_stored_once_and_costs_its_bits_in_both_products() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    prepare(model, Scheme(bits=2), A8, first_last_bits=None)
    calibrate(model, [torch.rand(5, 4)])
    report = measure(model, torch.rand(1, 4)).report()
    assert report["bops"] == 2 * 16 * 2 * 8
    assert report["weight_bytes"] == 16 * 2 // 8 + 4 + 2 * 4
    assert report["average_weight_bits"] == 2


def test_a_module_without_quantized_form_that_shares_a_quantized_weight_stores_it_in_float_as_well() -> None:
    class Scaled(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return 2 * super().forward(tokens)

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = Scaled(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    model = Language()
    prepare(model, W4, None, first_last_bits=None)
    report = measure(model, torch.zeros(2, 3, dtype=torch.int64)).report()
    assert report["weight_bytes"] == 40 * 4 // 8 + 10 * 4 + 40 * 4
    assert report["weight_bytes_float"] == 40 * 4


def test_averages_weigh_sites_by_their_elements() -> None:
    model = two()
    prepare(model, W4, A8, overrides={"2.weight": {"bits": 2}, "2.input": {"bits": 32}}, first_last_bits=None)
    report = measure(model, torch.randn(3, 6)).report()
    assert report["average_weight_bits"] == (48 * 4 + 24 * 2) / 72
    assert report["average_activation_bits"] == (6 * 8 + 8 * 32) / 14


def test_a_report_for_other_bits_is_what_committing_them_would_cost() -> None:
    model, other = build("digits_cnn"), build("digits_cnn")
    prepare(model, W4, A8)
    prepare(other, W4.replace(bits=2), A8, first_last_bits=2)
    for net in (model, other):
        calibrate(net, [IMAGES])
    assert measure(model, IMAGES).report(plan_of(other).bits) == measure(other, IMAGES).report()


# ---- widths per channel


def test_a_width_per_channel_is_counted_channel_by_channel() -> None:
    each = (1, 2, 3, 8, 4, 4, 2, 7)  # 31 bits a column
    model = two()
    prepare(model, W4, A8, overrides={"0.weight": {"bits": each}}, first_last_bits=None)
    calibrate(model, [torch.randn(20, 6)])
    cost = measure(model, torch.randn(3, 6))
    report = cost.report()
    assert report["bops"] == 6 * 31 * 8 + 24 * 4 * 8
    codes = -(-6 * 31 // 8) + 24 * 4 // 8
    assert report["weight_bytes"] == codes + 4 * (8 + 3) + 4 * (8 + 3) + 4 * 2
    assert report["average_weight_bits"] == (6 * 31 + 24 * 4) / 72
    first = report["layers"][0]
    assert (first["weight_bits"], first["bops"]) == (each, 6 * 31 * 8)
    assert json.loads(json.dumps(first))["operand_bits"] == [list(each), 8]


def test_expected_widths_per_channel_are_differentiable() -> None:
    model = two()
    prepare(model, W4, A8, first_last_bits=None)
    cost = measure(model, torch.randn(3, 6))
    width = torch.arange(1.0, 9).requires_grad_()
    bits = {**plan_of(model).bits, "0.weight": width}
    whole = {**bits, "0.weight": tuple(range(1, 9))}
    assert cost.bops(bits).item() == cost.bops(whole)
    assert cost.average_bits(bits, "weight").item() == pytest.approx(cost.average_bits(whole, "weight"))
    assert cost.weight_bytes(bits).item() == cost.weight_bytes(whole)
    (by_bops,) = torch.autograd.grad(cost.bops(bits), [width])
    (by_bytes,) = torch.autograd.grad(cost.weight_bytes(bits), [width])
    assert by_bops.tolist() == [6 * 8] * 8
    assert by_bytes.tolist() == [6 / 8] * 8


def test_a_target_of_one_type_a_tensor_holds_all_channels_in_the_widest_ones_container() -> None:
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    overrides = {"0.weight": {"bits": [1, 2, 3, 3]}}
    prepare(model, W4, None, overrides=overrides, first_last_bits=None, target="onnxruntime")
    assert measure(model, torch.randn(1, 16)).report()["weight_bytes"] == 64 * 4 // 8 + 4 * 4
    assert measure(model, torch.randn(1, 16), "native").report()["weight_bytes"] == 16 * 9 // 8 + 16
