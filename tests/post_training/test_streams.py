"""What is seen of the two streams: the order, the sums, and how much is kept meanwhile."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from bitsmith.post_training.streams import FloatStream, patches, sums, token_weights
from bitsmith.post_training.structure import Structure, Writer, structure_of
from tests.post_training import models


def sums_of(
    group: Any, quantized: nn.Module, model: nn.Module, batches: Any, shape: Structure, **options: Any
) -> Any:
    memory = options.pop("memory", 0)
    return sums(group, quantized, FloatStream(model, batches, shape, memory), batches, shape, **options)


def structure(model: nn.Module, batch: Any) -> Structure:
    return structure_of(models.prepared(model), model, batch)


def test_layers_come_in_the_order_of_execution_and_share_their_input() -> None:
    shape = structure(models.residual(), models.tokens()[0])
    assert shape.groups == [
        ("embed",),
        ("blocks.0.gate", "blocks.0.up"),
        ("blocks.0.down",),
        ("blocks.1.gate", "blocks.1.up"),
        ("blocks.1.down",),
        ("head",),
    ]
    assert shape.rows == dict.fromkeys(shape.calls, 40)


def test_writers_are_found_with_the_norm_that_reads_the_sum() -> None:
    assert structure(models.residual(), models.tokens()[0]).writers == {
        "blocks.0.down": Writer(None, "rms"),
        "blocks.1.down": Writer(None, "rms"),
    }
    vit = structure(models.vit(), models.images()[0])
    assert vit.writers == {
        f"blocks.{i}.{name}": Writer(None, "layer")
        for i in range(1)
        for name in ("attention.proj", "mlp.down")
    }
    assert ("blocks.0.attention.query", "blocks.0.attention.key", "blocks.0.attention.value") in vit.groups
    resnet = structure(models.resnet(), models.images()[0])
    assert resnet.writers == {f"layer{i}.0.conv2": Writer(f"layer{i}.0.bn2", None) for i in (1, 2)}


def test_writers_and_shared_inputs_of_a_transformers_llama_are_found() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    shape = structure(transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 32, (2, 6)))
    layer = "model.layers.1."
    assert shape.groups[4:8] == [
        tuple(f"{layer}self_attn.{name}_proj" for name in "qkv"),
        (f"{layer}self_attn.o_proj",),
        (f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"),
        (f"{layer}mlp.down_proj",),
    ]
    assert shape.writers[f"{layer}self_attn.o_proj"] == Writer(None, "rms")
    assert shape.writers[f"{layer}mlp.down_proj"] == Writer(None, "rms")


def test_an_addition_in_place_is_an_addition() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            h += self.second(h.relu())
            return h

    torch.manual_seed(0)
    model, batch = InPlace(), torch.randn(9, 3)
    quantized = models.prepared(model)
    shape = structure_of(quantized, model, batch)
    assert list(shape.writers) == ["second"]
    (found, _) = sums_of(["second"], quantized, model, [batch], shape, held_out=0)["second"]
    x_hat, here, there = quantized.first(batch).relu(), model.first(batch), quantized.first(batch)
    torch.testing.assert_close(found.residual, (x_hat.T @ (here - there)).double())


def test_layers_that_are_not_handled_are_listed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2))
    quantized = models.prepared(model)
    quantized[3].weight_quantizer = None
    shape = structure_of(quantized, model, torch.randn(2, 4, 5, 5))
    assert shape.groups == [("1",)]
    assert shape.left == {
        "0": "a convolution of 2 groups: it is rounded to nearest",
        "3": "its weight is left in float",
    }


def test_layers_whose_inputs_are_quantized_differently_share_nothing() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = models.prepared(model, batches)
    assert ("blocks.0.gate", "blocks.0.up") in structure_of(quantized, model, batches[0]).groups
    with torch.no_grad():
        quantized.blocks[0].up.input_quantizer.range += 0.3
    groups = structure_of(quantized, model, batches[0]).groups
    assert ("blocks.0.gate",) in groups
    assert ("blocks.0.up",) in groups


def test_sums_are_those_of_the_inputs_that_the_layer_really_multiplies() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = models.prepared(model, batches)
    shape = structure_of(quantized, model, batches[0])
    found = sums_of(["blocks.0.gate", "blocks.0.up"], quantized, model, batches, shape, held_out=0)
    whole = torch.cat(batches)
    here = model.blocks[0].norm(model.embed(whole)).flatten(0, 1)
    there = quantized.blocks[0].norm(quantized.embed(whole))
    there = quantized.blocks[0].up.input_quantizer(there).flatten(0, 1)
    fit, held = found["blocks.0.up"]
    assert held is None
    assert fit.rows == len(here)
    torch.testing.assert_close(fit.hessian, (there.T @ there).double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fit.cross, (there.T @ (here - there)).double(), atol=1e-4, rtol=1e-5)
    output = (here @ model.blocks[0].up.weight.T).detach()
    assert fit.energy == pytest.approx(float(output.square().sum()))
    assert torch.equal(fit.hessian, found["blocks.0.gate"][0].hessian)


def test_a_writers_sums_hold_the_error_of_the_stream_and_count_tokens_as_its_norm_does() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = models.prepared(model)
    shape = structure_of(quantized, model, batches[0])

    def by_hand(m: Any) -> tuple[torch.Tensor, ...]:
        r = m.embed(torch.cat(batches))
        block = m.blocks[0]
        h = block.norm(r)
        x = block.gate(h).relu() * block.up(h)
        return x.flatten(0, 1), r.flatten(0, 1), (r + block.down(x)).flatten(0, 1)

    (x, r, total), (x_hat, r_hat, _) = by_hand(model), by_hand(quantized)
    for norm, t in ((False, torch.ones(len(x))), (True, 1 / total.square().mean(1))):
        fit, _ = sums_of(["blocks.0.down"], quantized, model, batches, shape, norm=norm, held_out=0)[
            "blocks.0.down"
        ]
        left = (t[:, None] * x_hat).T
        torch.testing.assert_close(fit.hessian, (left @ x_hat).double(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fit.cross, (left @ (x - x_hat)).double(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fit.residual, (left @ (r - r_hat)).double(), rtol=1e-3, atol=1e-4)


def test_behind_a_batchnorm_the_stream_is_seen_through_it() -> None:
    """What is wanted of the convolution is such that its BatchNorm makes R - R̂ of it."""
    model, batches = models.resnet(), models.images()
    quantized = models.prepared(model)
    shape = structure_of(quantized, model, batches[0])
    name = "layer1.0.conv2"
    fit, _ = sums_of([name], quantized, model, batches[:1], shape, held_out=0)[name]

    def by_hand(m: Any) -> tuple[torch.Tensor, torch.Tensor]:
        r = m.relu(m.bn1(m.conv1(m.normalize(batches[0]))))
        block = m.layer1[0]
        return block.relu1(block.bn1(block.conv1(r))), r

    (_, r), (x_hat, r_hat) = by_hand(model), by_hand(quantized)
    bn = model.layer1[0].bn2
    wanted = (r - r_hat) * (bn.running_var + bn.eps).sqrt()[:, None, None] / bn.weight[:, None, None]
    rows = wanted.movedim(1, -1).flatten(0, -2)
    expected = patches(quantized.layer1[0].conv2, x_hat).T @ rows
    torch.testing.assert_close(fit.residual, expected.double(), rtol=1e-3, atol=1e-3)


def test_an_earlier_layer_moves_the_cross_term_of_a_later_one_and_not_the_other_way_round() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = models.prepared(model, bits=8)
    shape = structure_of(quantized, model, batches[0])

    def cross(name: str) -> torch.Tensor:
        found = sums_of([name], quantized, model, batches, shape, held_out=0)[name][0].cross
        assert found is not None
        return found

    early, late = cross("embed"), cross("blocks.0.down")
    assert not early.any()
    with torch.no_grad():
        quantized.blocks[0].up.weight.mul_(1.2)
    assert torch.equal(cross("embed"), early)
    assert (cross("blocks.0.down") - late).norm() > late.norm()


def test_every_fourth_batch_is_held_out() -> None:
    model, batches = models.residual(), models.tokens(9)
    quantized = models.prepared(model)
    shape = structure_of(quantized, model, batches[0])
    fit, held = sums_of(["head"], quantized, model, batches, shape)["head"]
    only = sums_of(["head"], quantized, model, [batches[3], batches[7]], shape, held_out=0)["head"][0]
    assert held is not None
    assert (fit.rows, held.rows) == (7 * 40, 2 * 40)
    torch.testing.assert_close(held.hessian, only.hessian)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 0)),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2),
        nn.Linear(9, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_patches_times_the_weight_are_the_layers_output(layer: Any) -> None:
    x = torch.randn(2, 3, 9, 9) if layer.weight.ndim != 3 else torch.randn(2, 3, 9)
    y = layer(x) - (
        layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, *[1] * (layer.weight.ndim - 2))
    )
    rows = y.flatten(0, -2) if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(patches(layer, x) @ layer.weight.flatten(1).T, rows)


def test_a_convolution_of_one_pixel_is_a_linear_layer() -> None:
    conv, x = nn.Conv2d(5, 2, 1), torch.randn(3, 5, 4, 4)
    assert torch.equal(patches(conv, x), patches(nn.Linear(5, 2), x.movedim(1, -1).contiguous()))


def test_token_weights_are_the_squares_of_the_norms_factors() -> None:
    stream = torch.randn(7, 16)
    for norm, centred in ((nn.RMSNorm(16), False), (nn.LayerNorm(16), True)):
        base = stream - stream.mean(1, keepdim=True) if centred else stream
        factor = (norm(stream) / base).square().mean(1)
        torch.testing.assert_close(token_weights(stream, centred), factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("group", [["blocks.1.gate", "blocks.1.up"], ["blocks.1.down"]])
def test_activations_are_kept_of_one_batch_alone(group: list[str]) -> None:
    model = models.residual()
    quantized = models.prepared(model)
    shape = structure_of(quantized, model, models.tokens()[0])
    made: list[Any] = []
    alive: list[int] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        made.append(weakref.ref(output))

    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        alive.append(sum(reference() is not None for reference in made))

    for m in (model, quantized):
        for module in m.modules():
            module.register_forward_hook(note)
    model.register_forward_pre_hook(count)  # the first of the two in each batch
    sums_of(group, quantized, model, models.tokens(12), shape)
    assert len(made) > 100
    assert alive == [0] * 12


class InPlace(nn.Module):
    """A residual stream that is written to, and read again, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.second(y)
        y.relu_()  # `second` has read it as it was
        return z + y


@pytest.mark.parametrize("make", [models.residual, InPlace], ids=["residual", "in place"])
def test_what_is_kept_of_the_float_model_gives_the_same_sums(make: Any) -> None:
    torch.manual_seed(0)
    model, batches = make(), models.tokens(8)
    quantized = models.prepared(model)
    shape = structure_of(quantized, model, batches[0])
    for memory in (2**28, 4 * sum(shape.bytes.values())):  # all groups at once; some of them
        kept = FloatStream(model, batches, shape, memory)
        for group in shape.groups:
            one = sums(group, quantized, kept, batches, shape)
            other = sums_of(group, quantized, model, batches, shape)
            for name in group:
                for a, b in zip(one[name], other[name], strict=True):
                    assert torch.equal(a.cross, b.cross)
                    assert a.energy == b.energy


def test_one_forward_of_the_float_model_serves_as_many_groups_as_memory_holds() -> None:
    model, batches = models.residual(), models.tokens(8)
    quantized = models.prepared(model)
    shape = structure_of(quantized, model, batches[0])
    whole = 8 * sum(shape.bytes.values())
    counts = {}
    for memory in (0, whole // 2, whole):
        started: list[int] = []
        hook = model.register_forward_pre_hook(lambda *_, started=started: started.append(1))
        stream = FloatStream(model, batches, shape, memory)
        for group in shape.groups:
            sums(group, quantized, stream, batches, shape)
        hook.remove()
        counts[memory] = len(started)
    assert counts[0] == 8 * len(shape.groups)
    assert counts[whole] == 8
    assert 8 < counts[whole // 2] < counts[0]
