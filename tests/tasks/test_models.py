"""Built-in models: size, names, determinism, and the pretrained weights that they must load."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitsmith.errors import FormatError, RecipeError
from bitsmith.quantization.layers import MatMul
from bitsmith.tasks import build
from bitsmith.tasks.models import MODELS


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [
        ("digits_cnn", 5718, (1, 8, 8)),
        ("digits_vit", 26858, (1, 8, 8)),
        ("resnet20", 269722, (3, 32, 32)),
        ("resnet32", 464154, (3, 32, 32)),
        ("resnet56", 853018, (3, 32, 32)),
    ],
)
def test_every_model_has_its_size_and_gives_one_logit_per_class(name, count, shape):
    model = build(name)
    assert parameters(model) == count
    assert f"{count:,} parameters" in MODELS[name].__doc__
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    assert build(name, classes=4)(torch.rand(2, *shape)).shape == (2, 4)


def test_the_table_above_covers_every_model():
    images = {"digits_cnn", "digits_vit", "resnet20", "resnet32", "resnet56"}
    elsewhere = {"byte_llama", "unet", "mlp"}  # test_llama.py, test_unet.py, test_tabular.py
    assert set(MODELS) == images | elsewhere


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone(name):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = build(name, seed=1), build(name, seed=1), build(name, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_model_knows_how_to_be_built_again():
    model = build("digits_vit", width=16, depth=1)
    note = model.bitsmith_model
    assert note == {"name": "digits_vit", "arguments": {"width": 16, "depth": 1}}
    assert parameters(build(note["name"], **note["arguments"])) == parameters(model)


def test_normalisation_sits_inside_the_model():
    model = build("resnet20").eval()
    seen = {}
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    model(torch.full((1, 3, 32, 32), 0.5))
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen["x"][0, :, 0, 0], expected)


def test_channels_follow_the_number_of_means():
    model = build("resnet20", mean=[0.3], std=[0.35])
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_both_attention_products_are_modules():
    model = build("digits_vit")
    products = [name for name, module in model.named_modules() if isinstance(module, MatMul)]
    assert products == [f"blocks.{i}.attention.{name}" for i in range(2) for name in ("scores", "context")]
    linears = [name for name, module in model.blocks[0].named_modules() if isinstance(module, nn.Linear)]
    assert linears == [f"attention.{n}" for n in ("query", "key", "value", "proj")] + ["mlp.up", "mlp.down"]


def test_attention_equals_torchs_own():
    attention = build("digits_vit", seed=0).blocks[0].attention
    x = torch.randn(2, 16, 32)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        layers = [attention.query, attention.key, attention.value]
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        theirs.out_proj.load_state_dict(attention.proj.state_dict())
    assert torch.allclose(attention(x), theirs(x, x, x)[0], atol=1e-6)


def test_the_option_a_shortcut_subsamples_and_pads_half_on_each_side():
    block = build("resnet20").layer2[0]
    x = torch.rand(1, 16, 8, 8)
    out = block.shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() + out[:, 24:].abs().sum() == 0
    assert out.shape == (1, 32, 4, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digit_cnn", {}, "unknown model 'digit_cnn'.*Did you mean 'digits_cnn'"),
        ("resnet20", {"clases": 3}, "model resnet20: unknown argument 'clases'. Did you mean 'classes'"),
        ("digits_vit", {"width": 30}, "width 30 is not a multiple of heads 4"),
        ("digits_vit", {"size": 9}, "size 9 is not a multiple of patch 2"),
        ("no_such_module:make", {}, "module no_such_module cannot be imported"),
        ("torch.nn:Linaer", {}, "module torch.nn has no 'Linaer'. Did you mean 'Linear'"),
        ("torch.nn:Linear", {"in_features": 3}, "argument 'out_features' is missing"),
        ("builtins:dict", {}, "the factory returned something else; got dict, expected a torch.nn.Module"),
        ("../models.py:make", {}, "unknown model"),
    ],
)
def test_a_wrong_name_or_argument_is_one_clear_line(name, arguments, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build(name, **arguments)
    assert "\n" not in str(caught.value)


def test_a_users_factory_builds_a_model_that_is_never_rebuilt_by_name():
    model = build("torch.nn:Linear", in_features=3, out_features=2)
    assert isinstance(model, nn.Linear)
    assert not hasattr(model, "bitsmith_model")


def test_float_weights_load_by_name_and_are_no_part_of_the_structure(tmp_path):
    source = build("resnet20", seed=3)
    tensors = {n: t for n, t in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "weights.safetensors")
    model = build("resnet20", seed=4, weights=tmp_path / "weights.safetensors")
    assert torch.equal(model.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    assert model.bitsmith_model == {"name": "resnet20", "arguments": {}}


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(FormatError, match="there is no such weights file"):
        build("resnet20", weights=path)
    path.write_bytes(b"not tensors")
    with pytest.raises(FormatError, match="corrupted"):
        build("resnet20", weights=path)
    tensors = build("resnet20").state_dict()
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"tensor layer1.3.conv1.weight is missing \(60 in all\)"):
        build("resnet32", weights=path)
    with pytest.raises(FormatError, match=r"fc.bias has another shape; got \(10,\), expected \(3,\)"):
        build("resnet20", classes=3, weights=path)
    save_file({**tensors, "fc.scale": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match=r"tensor fc\.scale is not in the model"):
        build("resnet20", weights=path)
