"""FP8 of ``transformer_engine_torch``: numbers are scaled and rounded to real 8-bit numbers of torch.

A tensor has one scale (delayed scaling: given; current scaling: of its largest value), or one per block of 128 or
128 x 128 values. Each kind keeps the values by rows, transposed for products over the other side, or both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 128


def torch_type(dtype: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return dtype if isinstance(dtype, torch.dtype) else TE_DType_To_Torch[dtype]


def values(operand: Any, rowwise: bool) -> Tensor:
    """Return what a product reads of ``operand``, in float32: its rows, or what was kept for its columns."""
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if isinstance(operand, Float8TensorStorage):
        data = operand._data if rowwise else (None if operand._transpose_invalid else operand._transpose)
        assert data is not None, f"FP8 data for the product is missing: rowwise={rowwise}"
        summed = data.size(-1) if rowwise else data[0].numel()
        assert summed % 16 == 0, f"cuBLAS refuses FP8 products that sum over {summed} numbers: not a multiple of 16"
        wide = data.view(torch_type(operand._fp8_dtype)).float() * operand._scale_inv
        return wide if rowwise else wide.flatten(1).T
    if isinstance(operand, Float8BlockwiseQTensorStorage):
        usage = operand.get_usages()
        assert usage["rowwise" if rowwise else "columnwise"], f"FP8 data for the product is missing: rowwise={rowwise}"
        return _half_of_blocks(operand, rowwise).dequantize()
    return operand.float()


def _half_of_blocks(operand: Any, rowwise: bool) -> Any:
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    meta = operand.get_metadata()
    for name in ("data", "scale_inv"):
        meta[f"{'columnwise' if rowwise else 'rowwise'}_{name}"] = None
    return Float8BlockwiseQTensorStorage(**meta)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Round ``tensor`` as ``quantizer`` says, into ``output`` or a new tensor."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    assert noop is None
    source = tensor.detach().contiguous()
    if output is None:
        output = quantizer.make_empty(source.shape, dtype=source.dtype, device=source.device)
        if quantizer.internal:
            output = _without_tensor(output)
    if isinstance(quantizer, Float8BlockQuantizer):
        _fill_blocks(source.float().reshape(-1, source.size(-1)), quantizer, output)
        return output
    if isinstance(quantizer, Float8Quantizer):  # delayed: all that pass in one entry of the history leave their largest
        quantizer.amax.copy_(torch.maximum(quantizer.amax, source.abs().max().float()))
    else:
        _scale_by_own_largest(source, quantizer)
    data = _round(source.float() * quantizer.scale, quantizer.dtype)
    output._scale_inv.copy_(quantizer.scale.reciprocal())
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None or (quantizer.columnwise_usage and output._data is not None):
        output._transpose = fp8_transpose(data, quantizer.dtype, out=output._transpose)
        output._transpose_invalid = False
    return output


def _without_tensor(output: Any) -> Any:
    """Return the storage alone, which Transformer Engine asks for where a tensor stays inside a module."""
    storage = next(cls for cls in type(output).__mro__ if cls.__name__.endswith("TensorStorage"))
    return storage(**output.get_metadata())


def _scale_by_own_largest(source: Tensor, quantizer: Any) -> None:
    largest = source.abs().max().float().reshape(1)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
    quantizer.amax.copy_(largest)
    quantizer.scale.copy_(_scale_of(largest.clamp(min=quantizer.amax_epsilon), quantizer))


def _scale_of(largest: Tensor, quantizer: Any) -> Tensor:
    scale = torch.finfo(torch_type(quantizer.dtype)).max / largest
    scale = torch.where((largest > 0) & scale.isfinite(), scale, 1.0)
    return 2 ** scale.log2().floor() if quantizer.force_pow_2_scales else scale


def _round(scaled: Tensor, dtype: Any) -> Tensor:
    eight = torch_type(dtype)
    limit = torch.finfo(eight).max
    return scaled.clamp(-limit, limit).to(eight).view(torch.uint8)


def _fill_blocks(matrix: Tensor, quantizer: Any, output: Any) -> None:
    """Blocks of 128 along the side that a product sums over, or of 128 x 128 for weights."""
    square = quantizer.block_scaling_dim == 2
    compact = quantizer.all_gather_usage  # between ranks, columns stay columns
    if output._rowwise_data is not None:
        scales = _block_scales(matrix, BLOCK if square else 1, BLOCK, quantizer)
        data = _round(matrix * _spread(scales, matrix, BLOCK if square else 1, BLOCK), quantizer.dtype)
        output._rowwise_data.copy_(data.view_as(output._rowwise_data))
        _keep(output._rowwise_scale_inv, scales if square or compact else scales.T)
    if output._columnwise_data is not None:
        scales = _block_scales(matrix, BLOCK, BLOCK if square else 1, quantizer)
        data = _round(matrix * _spread(scales, matrix, BLOCK, BLOCK if square else 1), quantizer.dtype)
        kept = data if compact and not square else data.T
        output._columnwise_data.copy_(kept.reshape(output._columnwise_data.shape))
        _keep(output._columnwise_scale_inv, scales.T if square else scales)


def _block_scales(matrix: Tensor, height: int, width: int, quantizer: Any) -> Tensor:
    rows, columns = math.ceil(matrix.size(0) / height), math.ceil(matrix.size(1) / width)
    padding = (0, columns * width - matrix.size(1), 0, rows * height - matrix.size(0))
    tiles = torch.nn.functional.pad(matrix.abs(), padding).view(rows, height, columns, width)
    return _scale_of(tiles.amax((1, 3)).clamp(min=quantizer.amax_epsilon), quantizer)


def _spread(scales: Tensor, matrix: Tensor, height: int, width: int) -> Tensor:
    spread = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return spread[: matrix.size(0), : matrix.size(1)]


def _keep(scale_inv: Tensor, scales: Tensor) -> None:
    """Store reciprocals; what is longer than needed, for cuBLAS's sake, stays unread."""
    scale_inv.fill_(torch.nan)
    scale_inv[: scales.size(0), : scales.size(1)] = scales.reciprocal()


def split_quantize(tensor: Tensor, splits: list[int], quantizers: list[Any]) -> list[Any]:
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(splits), quantizers, strict=True)]


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Return the gradient of a bias, and the rounded gradient of its output."""
    bias = gradient.float().reshape(-1, gradient.size(-1)).sum(0).to(gradient.dtype)
    return bias, quantize(gradient, quantizer)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    return values(tensor, rowwise=True).to(torch_type(dtype))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    transposed = data.reshape(-1, data.size(-1)).T.contiguous().view(data.size(-1), *data.shape[:-1])
    return transposed if out is None else out.copy_(transposed)


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def fused_amax_and_scale_update_after_reduction(
    largest: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """End an entry of delayed scaling's histories, and set the scales by the largest values in them."""
    limit = torch.finfo(torch_type(dtype)).max
    for own, history, scale in zip(largest.split([s.numel() for s in scales]), histories, scales, strict=True):
        newest = torch.where(own != 0, own, history[0])
        rolled = history.roll(-1, 0)
        rolled[-1] = newest
        seen = newest if algorithm == "most_recent" else rolled.amax(0)
        rolled[0] = 0  # of a history of one entry, too
        history.copy_(rolled)
        wanted = limit / seen / 2**margin
        scale.copy_(torch.where((seen > 0) & seen.isfinite(), wanted.clamp(max=torch.finfo(torch.float32).max), scale))


FUNCTIONS = (
    quantize, split_quantize, bgrad_quantize, dequantize, fp8_transpose, swap_first_dims,
    fused_amax_and_scale_update_after_reduction,
)  # fmt: skip
