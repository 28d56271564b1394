"""What a recipe may say: its keys, their defaults, and the checks that need more than one key.

Sections that belong to a lower floor are that floor's own dataclasses (`Scheme`, `TrainConfig`), so a range
is declared once, where it is used; pydantic checks them here and refuses unknown keys. This file does not
read YAML (`load`) and does no work (`run`).

`Recipe` is resolved: shorthands are written out, `float:` has taken what it does not say from `train:`.
Dumping it and loading it again gives the same recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core.core_schema import ValidationInfo

from bitsmith.errors import BitsmithError, RecipeError, check_value
from bitsmith.post_training.post_train import check_options as check_rounding
from bitsmith.quantization.outliers import check_options as check_outliers
from bitsmith.quantization.scheme import Scheme
from bitsmith.tasks.flatness import RADIUS
from bitsmith.tasks.shifts import MEASURED
from bitsmith.train.config import TrainConfig

Export = Literal["native", "onnx"]
EXPORTS: tuple[Export, ...] = get_args(Export)
NO_RUNTIME = "research"  # the target that gives figures only


def _placed(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Put the key in front of an error that a dataclass raised about itself."""
    try:
        return handler(value)
    except ValidationError:
        raise
    except BitsmithError as error:
        inner = error.where.removeprefix("train.").removeprefix("scheme.").removeprefix("split_outliers.")
        raise relocated(error, ".".join(filter(None, (alias(info.field_name), inner)))) from None


def alias(field: str | None) -> str:
    """The recipe's key of a field of `Recipe`: `float` cannot be a field name, as it is a type."""
    return "float" if field == "float_train" else str(field)


def relocated(error: BitsmithError, where: str, also: str = "") -> BitsmithError:
    """``error`` again, at another place, its remedy followed by ``also``: whoever calls knows more about
    where, and what a recipe can do, than whoever found it."""
    remedy = error.remedy + also
    return type(error)(error.what, where=where, got=error.got, expected=error.expected, remedy=remedy)


Placed = WrapValidator(_placed)


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Named(Section):
    """A model or data set: a built-in name or ``package.module:factory``, and what to call it with."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Outliers(Section):
    """Which input channels of Linear layers get a layer of their own, and its width (recipe.outliers)."""

    share: float = 0.01
    above: float = 4.0
    layers: list[str] | None = None
    bits: Annotated[int, Field(ge=1, le=32)] = 8

    @model_validator(mode="after")
    def _options_are_in_range(self) -> Outliers:
        check_outliers(self.share, self.above)
        return self


class Quantize(Section):
    """What is quantized and how; `overrides`: glob on site names -> changed fields, the last match wins."""

    weights: Annotated[Scheme, Placed] = Scheme(bits=4, granularity="channel")
    activations: Annotated[Scheme | None, Placed] = Scheme(bits=8)
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    first_last_bits: Annotated[int, Field(ge=1, le=32)] | None = 8
    calibration_samples: Annotated[int, Field(ge=1)] = 1024
    outliers: Annotated[Outliers | None, Placed] = None

    @model_validator(mode="after")
    def _activations_have_their_grids(self) -> Quantize:
        if self.activations is not None:
            self.activations.check_kind("activation", "activations")
        return self

    @model_validator(mode="after")
    def _overrides_make_schemes(self) -> Quantize:
        for glob, changes in self.overrides.items():
            activation = glob.endswith((".input", ".left", ".right")) and self.activations is not None
            base = self.activations if activation else self.weights
            assert base is not None
            base.replace(f"overrides.{glob}", **changes)
        return self


class PostTraining(Section):
    """How weights are rounded before training: the options of `post_training.post_train`, and its samples."""

    rounding: str = "gptq"
    matching: bool = True
    alpha: float | None = None
    beta: float | None = None
    norm: bool = True
    damping: float = 0.01
    order: bool = True
    refit: bool = True
    correction: float = 1.0
    samples: Annotated[int, Field(ge=1)] = 512

    @model_validator(mode="after")
    def _options_are_in_range(self) -> PostTraining:
        check_rounding(self.rounding, self.alpha, self.beta, self.damping, self.correction)
        return self

    def options(self) -> dict[str, Any]:
        """The keywords of `post_train`."""
        return self.model_dump(exclude={"samples"})


class Shifts(Section):
    """Under which shifts, and how strong ones, both models are measured at the end (tasks.suites)."""

    suite: str = "default"
    severities: list[Annotated[int, Field(ge=1, le=5)]] = Field(default=list(MEASURED), min_length=1)


class Flatness(Section):
    """How flat both models lie, measured at the end: on how many training rows, how far from the weights,
    and at how many points along each axis of the picture."""

    rows: Annotated[int, Field(ge=1)] = 512
    radius: Annotated[float, Field(gt=0, lt=1)] = RADIUS
    points: Annotated[int, Field(ge=3)] = 11

    @model_validator(mode="after")
    def _points_have_a_middle(self) -> Flatness:
        check_value("points", self.points, self.points % 2 == 1, "an odd number: the middle is the model")
        return self


class Recipe(Section):
    """One job, from a float model to a verified low-bit one."""

    model: Named = Named(name="digits_cnn")
    data: Named = Named(name="digits")
    pretrained: str | None = None
    target: str = "native"
    quantize: Annotated[Quantize, Placed] = Quantize()
    post_training: Annotated[PostTraining | None, Placed] = None
    plan: str | None = None
    methods: list[dict[str, dict[str, Any]]] = Field(default_factory=list)
    train: Annotated[TrainConfig, Placed] = TrainConfig()
    float_train: Annotated[TrainConfig | None, Placed] = Field(default=None, alias="float")
    shift: Shifts = Shifts()
    flatness: Annotated[Flatness | None, Placed] = None
    export: list[Export] = Field(default_factory=lambda: list(EXPORTS))

    @model_validator(mode="after")
    def _exports_have_a_runtime(self) -> Recipe:
        if self.target == NO_RUNTIME and "onnx" in self.export:
            raise RecipeError(
                f"target {NO_RUNTIME} has no runtime, so no ONNX file",
                where="export",
                got=f"[{', '.join(self.export)}]",
                expected="[native] or []",
                remedy="Write export: [native], or target: onnxruntime",
            )
        return self

    @model_validator(mode="after")
    def _without_epochs_nothing_is_learned(self) -> Recipe:
        if self.float_train is not None and self.float_train.epochs == 0:
            raise RecipeError(
                "the float model has to be trained",
                where="float.epochs",
                got=0,
                expected="1 or more",
                remedy="Write float: {epochs: 10}, or give pretrained: its weights",
            )
        if self.train.epochs == 0 and self.methods:
            raise RecipeError(
                "a method works while the model trains",
                where="train.epochs",
                got=0,
                expected=f"1 or more with {', '.join(name for entry in self.methods for name in entry)}",
                remedy="Give it epochs, or write methods: []",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML, in the order of the contract."""
        return self.model_dump(by_alias=True)


def normalise(document: Mapping[str, Any]) -> dict[str, Any]:
    """Write the shorthands out: ``model: NAME``, ``shift: SUITE``, ``flatness: true``, a method without
    arguments."""
    written = dict(document)
    if isinstance(written.get("shift"), str):
        written["shift"] = {"suite": written["shift"]}
    if isinstance(written.get("flatness"), bool):
        written["flatness"] = {} if written["flatness"] else None
    for key in ("model", "data"):
        if isinstance(written.get(key), str):
            written[key] = {"name": written[key]}
    methods = written.get("methods")
    if isinstance(methods, list):
        written["methods"] = [
            {entry: {}}
            if isinstance(entry, str)
            else {name: {} if arguments is None else arguments for name, arguments in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for entry in methods
        ]
    return written


def resolve(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what depends on another key.

    Weights are quantized per channel unless said otherwise. ``float:`` takes what it does not say from
    ``train:`` (no distillation: it has no teacher); with `pretrained` weights it is left out. A target
    without a runtime exports the native files alone.
    """
    resolved = dict(document)
    if resolved.get("target") == NO_RUNTIME:
        resolved.setdefault("export", ["native"])
    quantize = resolved.get("quantize")
    if isinstance(quantize, Mapping) and isinstance(quantize.get("weights"), Mapping):
        resolved["quantize"] = {**quantize, "weights": {"granularity": "channel", **quantize["weights"]}}
    train, own = resolved.get("train"), resolved.get("float")
    if own is None and ("float" in resolved or resolved.get("pretrained")):
        return resolved | {"float": None}
    if isinstance(train, Mapping | None) and isinstance(own, Mapping | None):
        resolved["float"] = {**(train or {}), "distillation": 0.0, **(own or {})}
    return resolved


def known_keys(location: Iterable[str]) -> list[str]:
    """The keys that are allowed at ``location``, for the message that refuses another."""
    kind: Any = Recipe
    for part in location:
        kind = _child(kind, part)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [field.alias or name for name, field in kind.model_fields.items()]
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _child(kind: Any, part: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return None
    for name, field in kind.model_fields.items():
        if part in (name, field.alias):
            options = get_args(field.annotation) or (field.annotation,)
            return next((option for option in options if option is not type(None)), None)
    return None
