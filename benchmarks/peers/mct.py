"""Digits with the width search of Sony's Model Compression Toolkit, at the budgets of benchmarks/budget_search.py.

    python -m venv build/mct
    build/mct/bin/pip install -r benchmarks/peers/requirements-mct.txt
    PYTHONPATH=src build/mct/bin/python benchmarks/peers/mct.py          # 5 seeds; resumes where it stopped
    PYTHONPATH=src build/mct/bin/python benchmarks/peers/mct.py --table  # what has been measured so far

MCT searches before training: it measures how far the float model's tensors move when one layer has fewer bits,
and solves an integer program under the limit of bit operations (`ResourceUtilization(bops=...)`). The plan that
it finds is then trained as budget_search.py trains a plan: same float start, steps, batches, learning rate and
distillation. So only the search is MCT's; what stands in its place in budget_search.py is `sensitivity`.

The target is one of our own: weights of convolutions and outputs of ReLUs in any of our candidate widths, each
by itself, symmetric, thresholds by squared error (MCT's default) on the 512 calibration images. Convolution,
ReLU and max pooling are fused. (With pooling as a layer of its own that keeps the codes it gets, MCT 2.6.1
found a plan of 1,669,120 BOPs under a limit of 1,411,072.) First and last layers have 8 bits. Sensitivities
are the mean distance of the layers' outputs (MCT's default) on 128 images (its default is 32).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import _results  # noqa: E402
import torch  # noqa: E402
from budget_search import CANDIDATES, POINTS, Unit  # noqa: E402
from torch import nn  # noqa: E402

from bitsmith.tasks.classification import evaluate  # noqa: E402
from bitsmith.tasks.dataset import to_float  # noqa: E402

NAME, MODEL = "peer_mct", "digits_cnn"
IMAGES = 128


# The operators of a library live as long as it does.
STAND_IN: list[torch.library.Library] = []


def import_mct() -> Any:
    """MCT needs torchvision for an operator that nothing here calls. A torchvision that was compiled for another
    build of torch (CUDA beside CPU) has no operators, and fails to import: then empty ones take their names."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        STAND_IN.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            STAND_IN[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("model_compression_toolkit")


mct = import_mct()
schema = importlib.import_module(
    "model_compression_toolkit.target_platform_capabilities.schema.mct_current_schema"
)
filters = importlib.import_module("model_compression_toolkit.core.common.network_editors")


def target() -> Any:
    """Convolutions and ReLUs with every candidate width, all else at 8 bits."""
    method = importlib.import_module("mct_quantizers").QuantizationMethod.SYMMETRIC
    other = schema.AttributeQuantizationConfig(weights_quantization_method=method, weights_n_bits=8)
    kernel = schema.AttributeQuantizationConfig(
        weights_quantization_method=method,
        weights_n_bits=8,
        weights_per_channel_threshold=True,
        enable_weights_quantization=True,
    )
    eight = schema.OpQuantizationConfig(
        default_weight_attr_config=other,
        attr_weights_configs_mapping={"kernel_attr": kernel, "bias_attr": other},
        activation_quantization_method=method,
        activation_n_bits=8,
        supported_input_activation_n_bits=CANDIDATES,
        enable_activation_quantization=True,
        quantization_preserving=False,
        signedness=schema.Signedness.AUTO,
    )

    def options(configs: list[Any]) -> Any:
        return schema.QuantizationConfigOptions(quantization_configurations=tuple(configs), base_config=eight)

    weights = [eight.clone_and_edit(attr_to_edit={"kernel_attr": {"weights_n_bits": b}}) for b in CANDIDATES]
    activations = [eight.clone_and_edit(activation_n_bits=b) for b in CANDIDATES]
    same = eight.clone_and_edit(enable_activation_quantization=False, quantization_preserving=True)
    names = schema.OperatorSetNames
    sets = {
        names.CONV: options(weights),
        names.FULLY_CONNECTED: options([eight]),
        names.RELU: options(activations),
        names.MAXPOOL: options(activations),
        names.FLATTEN: schema.QuantizationConfigOptions(quantization_configurations=(same,)),
    }
    operators = {name: schema.OperatorsSet(name=name, qc_options=found) for name, found in sets.items()}
    fused = [[names.CONV, names.RELU], [names.CONV, names.RELU, names.MAXPOOL]]
    return schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(eight,)),
        operator_set=tuple(operators.values()),
        fusing_patterns=tuple(
            schema.Fusing(operator_groups=tuple(operators[n] for n in group)) for group in fused
        ),
        add_metadata=False,
    )


def plan(unit: Unit, limit: float) -> dict[str, int]:
    """The widths that MCT finds for the float model at no more than ``limit`` BOPs, by our names of tensors."""
    layers = nn.Sequential()  # without `normalize`: what is quantized is the first convolution's input
    for name, layer in list(copy.deepcopy(unit.model).named_children())[1:]:
        layers.add_module(name, layer)
    images = unit.model.get_submodule("normalize")(to_float(unit.data.train_x[:512]))
    fixed = mct.core.BitWidthConfig()
    fixed.set_manual_weights_bit_width([filters.NodeNameScopeFilter("conv1")], 8, "weight")
    fixed.set_manual_activation_bit_width([filters.NodeNameScopeFilter("relu4")], 8)
    search = mct.core.MixedPrecisionQuantizationConfig(num_of_images=IMAGES)
    with quiet():
        quantized, found = mct.ptq.pytorch_post_training_quantization(
            layers,
            lambda: iter([[part] for part in images.split(128)]),
            target_resource_utilization=mct.core.ResourceUtilization(bops=limit),
            core_config=mct.core.CoreConfig(mixed_precision_config=search, bit_width_config=fixed),
            target_platform_capabilities=target(),
        )
    bits = {}
    width = 8  # of the activation that the next layer sees
    for name, module in quantized.named_children():
        if hasattr(module, "activation_holder_quantizer"):
            width = module.activation_holder_quantizer.num_bits
        elif hasattr(module, "weights_quantizers"):
            layer = name.removesuffix("_bn")
            bits[f"{layer}.weight"] = module.weights_quantizers["weight"].num_bits
            bits[f"{layer}.input"] = width
    assert unit.cost.bops(bits) == found.final_resource_utilization.bops, "our cost is not MCT's"
    return bits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The integer program's solver is a process of its own, which writes to our standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def table(results: dict[str, Any]) -> None:
    """Mean difference to float in points, with its standard error, and the mean share of the budget used."""
    units = results.get(MODEL, {}).values()
    print(f"\n{MODEL}, plans of MCT trained by ours: points against float, mean ± standard error (units)")
    for point in POINTS:
        pairs = [(u["points"][str(point)], u["float"]) for u in units if str(point) in u["points"]]
        if pairs:
            mean, error = _results.mean_and_error([100 * (r["accuracy"] - f) for r, f in pairs])
            used, _ = _results.mean_and_error([100 * r["used"] for r, _ in pairs])
            print(f"budget {point}: {mean:+.2f} ± {error:.2f} ({len(pairs)}), {used:.0f} % of it used")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"model_compression_toolkit": version("model-compression-toolkit"), "images": IMAGES}
    for seed in range(0 if options.table else options.seeds):
        results = _results.load(NAME, options.out)
        entry = results.setdefault(MODEL, {}).setdefault(str(seed), {"points": {}})
        missing = [point for point in POINTS if str(point) not in entry["points"]]
        if not missing:
            continue
        unit = Unit(MODEL, seed)
        entry["float"] = evaluate(unit.model, unit.data.test_x, unit.data.test_y)["accuracy"]
        for point in missing:
            limit = float(unit.budget(point).limits[0])
            bits = plan(unit, limit)
            used = unit.cost.bops(bits) / limit
            assert used <= 1, f"MCT is over the budget: {used}"
            r = unit.fixed(bits)
            entry["points"][str(point)] = {
                "accuracy": r["accuracy"],
                "validation": r["validation"],
                "used": used,
                "bits": bits,
            }
            difference = 100 * (r["accuracy"] - entry["float"])
            print(f"seed {seed}  {point}  {difference:+.2f} points, used {used:.4f}", flush=True)
            _results.save(NAME, {**results, **settings}, options.out)
    table(_results.load(NAME, options.out))


if __name__ == "__main__":
    main()
