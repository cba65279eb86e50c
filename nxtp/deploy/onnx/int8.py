"""Weights of a graph's matrices as 8-bit numbers, by onnxruntime's quantiser; everything else stays float32."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

BLOCK = 32  # weights that share a scale
_ACCURACY = 4  # products in whole numbers: activations are rounded to 8 bits too, as the kernels that are fast do it


def quantize(path: Path) -> None:
    """Replace a graph and its external data by the quantised ones."""
    model = onnx.load(path)
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=_ACCURACY)
    quantizer.process()
    # Not by onnx.save_model, which takes a file of the same name in the working directory for its own.
    onnx_ir.save(onnx_ir.from_proto(quantizer.model.model), path, external_data=f"{path.name}.data")
