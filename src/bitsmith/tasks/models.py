"""The built-in models by name, and `build`, which also takes a user's ``package.module:factory``.

A built model carries `bitsmith_model = {"name", "arguments"}`, from which a saved model is rebuilt without
running anybody's code; a factory's model does not, and is loaded into a model that the user makes. Weights
are drawn from torch's global generator, or from `seed`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from bitsmith.errors import RecipeError
from bitsmith.tasks.factory import FACTORY_PATTERN, call, load_factory, suggestion
from bitsmith.tasks.hub import load_causal_lm
from bitsmith.tasks.llama import Llama
from bitsmith.tasks.normalize import Normalize
from bitsmith.tasks.resnet import ResNet, load_weights
from bitsmith.tasks.unet import UNet
from bitsmith.tasks.vit import VisionTransformer

DIGITS_MEAN, DIGITS_STD = (0.3053,), (0.3761,)
SCENES_MEAN, SCENES_STD = (0.3,), (0.2,)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What files, not construction, decide: a model is rebuilt without them.
NOT_STRUCTURE = ("weights",)
HUB = "hf:"


def build(name: str, *, seed: int | None = None, **arguments: Any) -> nn.Module:
    """The model of that name, in training mode. Raises RecipeError, and FormatError for its weights.

    ``name``: a key of MODELS, ``hf:PATH_OR_ID`` of a causal language model that transformers knows, or
    ``package.module:factory``, called with ``arguments``.
    """
    with _seeded(seed):
        if name.startswith(HUB):
            return call(
                load_causal_lm, {"path": name.removeprefix(HUB), **arguments}, f"model {name}", RecipeError
            )
        if name in MODELS:
            model = call(MODELS[name], arguments, f"model {name}", RecipeError)
            structure = {key: value for key, value in arguments.items() if key not in NOT_STRUCTURE}
            model.bitsmith_model = {"name": name, "arguments": structure}
            return model
        if not FACTORY_PATTERN.fullmatch(name):
            raise RecipeError(
                f"unknown model {name!r}",
                where="model",
                expected=f"{', '.join(MODELS)}, hf:PATH or package.module:factory",
                remedy=suggestion(name, list(MODELS)),
            )
        model = call(load_factory(name, "model", RecipeError), arguments, f"model {name}", RecipeError)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            "the factory returned something else",
            where=f"model {name}",
            got=type(model).__name__,
            expected="a torch.nn.Module",
        )
    return model


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def digits_cnn(
    classes: int = 10, mean: Sequence[float] = DIGITS_MEAN, std: Sequence[float] = DIGITS_STD
) -> nn.Module:
    """Four 3x3 convolutions with BatchNorm and ReLU, then a linear layer: 5,718 parameters; any image size.

    Five layers, so that with the outer two at 8 bits three remain, which hold 94 % of the weights. As many
    input channels as there are means.
    """
    model = nn.Sequential()
    model.add_module("normalize", Normalize(mean, std))
    widths = (len(mean), 12, 12, 16, 16)
    for layer, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        model.add_module(f"conv{layer}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        model.add_module(f"bn{layer}", nn.BatchNorm2d(outputs))
        model.add_module(f"relu{layer}", nn.ReLU())
        if layer == 2:
            model.add_module("pool", nn.MaxPool2d(2))
    model.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(widths[-1], classes))
    return model


def digits_vit(
    classes: int = 10,
    size: int = 8,
    patch: int = 2,
    width: int = 32,
    depth: int = 2,
    heads: int = 4,
    hidden: int = 128,
    mean: Sequence[float] = DIGITS_MEAN,
    std: Sequence[float] = DIGITS_STD,
) -> nn.Module:
    """A pre-norm transformer, one token per 2x2 pixels (16), each seeing 4x4: 26,858 parameters."""
    _check_divides("digits_vit", "size", size, "patch", patch)
    _check_divides("digits_vit", "width", width, "heads", heads)
    return VisionTransformer(Normalize(mean, std), classes, size, patch, width, depth, heads, hidden)


def _check_divides(model: str, what: str, whole: int, divisor: str, part: int) -> None:
    if whole % part:
        raise RecipeError(f"{what} {whole} is not a multiple of {divisor} {part}", where=f"model {model}")


def byte_llama(
    width: int = 96,
    depth: int = 3,
    heads: int = 4,
    context: int = 128,
    tied: bool = False,
    vocab_size: int = 256,
) -> nn.Module:
    """A Llama-like language model over bytes, 381,600 parameters; ``tied``: one matrix reads and predicts.

    The MLPs are 8/3 of the width, as Llama's, to the nearest 32.
    """
    _check_divides("byte_llama", "width", width, "twice the heads,", 2 * heads)
    return Llama(vocab_size, width, depth, heads, max(32, round(8 * width / 96) * 32), context, tied)


def mlp(features: int = 30, classes: int = 2, hidden: Sequence[int] = (64, 64)) -> nn.Module:
    """Linear layers with ReLU for rows of numbers (N, features); 6,334 parameters.

    The norm in front learns mean and standard deviation of each feature: tables come in their own units.
    """
    model = nn.Sequential()
    model.add_module("normalize", nn.BatchNorm1d(features))
    widths = (features, *hidden)
    for layer, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        model.add_module(f"fc{layer}", nn.Linear(inputs, outputs))
        model.add_module(f"relu{layer}", nn.ReLU())
    model.add_module("head", nn.Linear(widths[-1], classes))
    return model


def unet(
    classes: int = 11,
    width: int = 12,
    depth: int = 2,
    upsampling: str = "transposed",
    mean: Sequence[float] = SCENES_MEAN,
    std: Sequence[float] = SCENES_STD,
) -> nn.Module:
    """A small U-Net, a logit for every class and pixel: 66,179 parameters; sides that 2^depth divides.

    upsampling: "transposed" (convolutions) or "nearest". As many input channels as there are means.
    """
    return UNet(Normalize(mean, std), classes, width, depth, upsampling)


def _resnet(
    blocks: int,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    weights: str | os.PathLike[str] | None,
) -> nn.Module:
    model = ResNet(Normalize(mean, std), blocks, classes)
    if weights is not None:
        load_weights(model, weights)
    return model


def resnet20(
    classes: int = 10,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    weights: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """269,722 parameters for 32x32 RGB; ``weights`` is a safetensors file of float weights."""
    return _resnet(3, classes, mean, std, weights)


def resnet32(
    classes: int = 10,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    weights: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """464,154 parameters."""
    return _resnet(5, classes, mean, std, weights)


def resnet56(
    classes: int = 10,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    weights: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """853,018 parameters."""
    return _resnet(9, classes, mean, std, weights)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": digits_cnn,
    "digits_vit": digits_vit,
    "mlp": mlp,
    "byte_llama": byte_llama,
    "unet": unet,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
}
