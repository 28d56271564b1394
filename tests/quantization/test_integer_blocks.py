"""What surrounds integer layers keeps codes for backward: the same forward, nearly the same gradient, few
bytes."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.quantization.integer_blocks import from_codes, save_codes, save_floats, swiglu
from bitsmith.quantization.integer_packed import finalize_integer
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.quantization.integer_training import int_layers
from bitsmith.tasks import build
from tests.quantization.integers import Taken, drawn

TOKENS = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))


def llama(**options: Any) -> nn.Module:
    model = build("byte_llama", seed=0, width=64, depth=2, heads=4, context=32)
    prepare_integer(model, 4, **options)
    return model


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, -2), TOKENS[:, 1:].flatten())


def saved(run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What a forward gives, and the tensors that it keeps for backward, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), list(kept.values())


def rounded(x: Tensor) -> Tensor:
    """The nearest of 255 levels of each row, as far as its largest value."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def test_the_gradient_is_that_of_the_function_at_what_codes_stand_for() -> None:
    gate, up, dy = drawn(7, 40) * 3, drawn(7, 40, seed=1), drawn(7, 40, seed=2)
    inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    y = from_codes(swiglu, *inputs)
    assert torch.equal(y, F.silu(gate) * up)
    y.backward(dy)
    a, b, g, e = rounded(gate).double(), rounded(up).double(), dy.double(), 1e-6
    for x, (da, db) in zip(inputs, ((e, 0.0), (0.0, e)), strict=True):
        slope = (F.silu(a + da) * (b + db) - F.silu(a - da) * (b - db)) / (2 * e)
        torch.testing.assert_close(x.grad.double(), slope * g, rtol=1e-4, atol=1e-5)


def test_inputs_without_a_gradient_get_none_and_others_theirs() -> None:
    gate, up = drawn(3, 8).requires_grad_(), drawn(3, 8, seed=1)
    from_codes(swiglu, gate, up).sum().backward()
    assert gate.grad is not None
    assert up.grad is None
    with torch.no_grad():
        assert not from_codes(swiglu, gate, up).requires_grad


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_norm_is_recomputed_from_codes(kind: type[nn.Module]) -> None:
    plain = kind(96)
    nn.init.normal_(plain.weight, 1.0, 0.3)
    norm = copy.deepcopy(plain)
    assert save_codes(norm) == ("",)
    x, g, grads = drawn(10, 96) * torch.logspace(-2, 2, 10)[:, None], drawn(10, 96, seed=1), []
    for module in (plain, norm):
        own = x.clone().requires_grad_()
        y, kept = saved(lambda module=module, own=own: module(own))
        y.backward(g)
        grads.append([y, own.grad * x.norm(dim=1, keepdim=True), *(p.grad for p in module.parameters())])
    assert torch.equal(grads[0][0], grads[1][0])
    for exact, found in zip(grads[0][1:], grads[1][1:], strict=True):
        assert (found - exact).norm() < 0.01 * exact.norm()
    assert [t.dtype for t in kept if t.numel() > 96] == [torch.int8]


def test_a_relu_keeps_signs_exactly() -> None:
    relu, x = nn.ReLU(), torch.tensor([[-1.0, 0.0, 1e-30, 5.0]])
    save_codes(relu)
    own = x.clone().requires_grad_()
    y, kept = saved(lambda: relu(own))
    y.backward(torch.ones(1, 4))
    assert own.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert [t.dtype for t in kept] == [torch.bool]


def test_a_language_model_computes_what_it_did_and_learns_nearly_the_same() -> None:
    found = []
    for codes in (False, True):
        model = llama(save_codes=codes)
        taken = {name: Taken(layer) for name, layer in int_layers(model).items()}
        loss = loss_of(model)
        loss.backward()
        norms = {name: p.grad for name, p in model.named_parameters()}
        found.append((loss, {name: one.gradient for name, one in taken.items()} | norms))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() < 0.06 * gradient.norm(), name  # most of it drawn


def test_bytes_kept_for_a_token_are_those_of_the_formula() -> None:
    """A block of width d and hidden h keeps both inputs of norms, what comes of them (once for all layers
    that read it), q, k, v, what attention gives: 8 d bytes; gate, up and their product: 3 h; and a float of
    each row."""
    model = llama()
    width, heads, hidden = 64, 4, model.layers[0].mlp.gate_proj.out_features
    _, kept = saved(lambda: loss_of(model))
    block = 8 * width + 3 * hidden + 4 * (2 + 2 + 3 * heads + 1 + 3)
    ends = 2 * (width + 4) + 4 * 256  # the last norm and its codes; logits, as a byte model has few
    tokens, constants = TOKENS[:, :-1].numel(), 2**14
    assert sum(t.untyped_storage().nbytes() for t in kept) <= tokens * (2 * block + ends) + constants
    wide = [t for t in kept if t.is_floating_point() and t.numel() >= tokens * width]
    assert [t.shape[-1] for t in wide] == [256]
    _, floats = saved(lambda: loss_of(llama(save_codes=False)))
    assert sum(t.untyped_storage().nbytes() for t in floats) > 4 * tokens * 2 * block


def test_layers_that_read_one_tensor_share_its_codes_until_it_changes() -> None:
    model = nn.ModuleList([nn.Linear(32, 8, bias=False) for _ in range(3)])
    prepare_integer(model, 4, first_last_bits=None)
    x = drawn(5, 32).requires_grad_() * 1.0
    outputs, kept = saved(lambda: [layer(x) for layer in model])
    assert [t.dtype for t in kept if t.numel() > 5] == [torch.int8]
    x = x.detach().requires_grad_() * 1.0
    first = model[0](x)
    with torch.no_grad():
        x.mul_(-2)
    torch.testing.assert_close(model[0](x), -2 * first)
    assert all(torch.equal(y, outputs[0]) for y in (outputs[0], first))


def test_copies_are_their_own_and_files_know_nothing_of_it() -> None:
    model = llama()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert twin(TOKENS[:, :-1]).abs().max() == 0 < model(TOKENS[:, :-1]).abs().max()
    again = pickle.loads(pickle.dumps(model.norm))
    torch.testing.assert_close(again(drawn(2, 64)), model.norm(drawn(2, 64)))
    packed = finalize_integer(model)
    assert not any("forward" in vars(m) or getattr(m, "saves_codes", False) for m in packed.modules())
    with torch.no_grad():
        before, after = model.eval()(TOKENS[:, :-1]), packed(TOKENS[:, :-1])
    assert (after - before).norm() < 0.01 * before.norm()  # a sum in another order may round to another code
    save_floats(model)
    assert save_codes(model) == save_codes(llama(save_codes=False))
    assert save_codes(model) == ()
