"""Files that hold what was trained: native and ONNX, and the proof that they do.

Exporters write packed models (quantization.finalize) and never quantize again; `verify` runs every file in
its own runtime. Importing this room needs no extra; writing or running ONNX does.
"""

from bitsmith.export.native import load, save
from bitsmith.export.onnx import to_onnx
from bitsmith.export.verify import verify

__all__ = ["load", "save", "to_onnx", "verify"]
