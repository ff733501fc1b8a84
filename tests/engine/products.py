"""Matrix products of ``transformer_engine_torch``: sums in float32, of operands in any precision.

Transformer Engine writes its products for cuBLAS, whose matrices are stored by columns: of row-major operands the
result is ``op(B) @ op(A)``. FP8 on Hopper multiplies rows by rows only. An operand that is not used by its rows must
bring a transposed copy, and here too nothing else will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from engine.rounding import torch_type, values


def generic_gemm(
    A: Any, transa: bool, B: Any, transb: bool, out: Tensor | None, quantizer: Any, out_dtype: Any, bias: Tensor | None,
    bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Tensor, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, *, comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None,
    bulk_overlap: bool = False, alpha: float = 1.0, beta: float = 0.0,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """Return the product, and with ``grad`` and a bias the bias's gradient; ``out`` gets it, added or overwritten."""
    assert quantizer is None and not gelu and comm_overlap is None and extra_output is None
    assert (alpha, beta) == (1.0, 1.0 if accumulate else 0.0)
    left, right = values(B, rowwise=not transb), values(A, rowwise=transa)
    product = _flat(left, transb) @ _flat(right, not transa).T
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = _flat(left, False).sum(0).to(torch_type(bias_dtype))
    elif bias is not None:
        product += bias.float()
    dtype = torch_type(out_dtype) if out_dtype is not None else (out.dtype if out is not None else A.dtype)
    if out is None:
        shape = (product.size(0),) if transb else tuple(left.shape[:-1])
        return product.to(dtype).view(*shape, product.size(1)), bias_gradient, None, None
    assert out.numel() == product.numel(), (out.shape, product.shape)
    _store(out.view(product.shape), product, accumulate)
    return out, bias_gradient, None, None


def te_general_grouped_gemm(
    A: Sequence[Any], transa: bool, B: Sequence[Any], transb: bool, out: list[Tensor], out_dtype: Any,
    m_splits: list[int], bias: Sequence[Tensor], bias_dtype: Any, single_output: bool, pre_gelu_out: Any, grad: bool,
    workspace: Any, workspace_size: int, accumulate: bool, use_split_accumulator: bool, sms: int,
) -> Sequence[Tensor]:  # fmt: skip
    """Compute one product for each group; with ``grad`` fill the biases' gradients, which ``bias`` holds then."""
    outputs = list(out[0].split(m_splits)) if single_output else out
    for left, right, target, one_bias in zip(B, A, outputs, bias, strict=True):
        left, right = values(left, rowwise=not transb), values(right, rowwise=transa)
        product = _flat(left, transb) @ _flat(right, not transa).T
        if one_bias.numel() and grad:
            one_bias.copy_(_flat(left, False).sum(0))
        elif one_bias.numel():
            product += one_bias.float()
        _store(target, product, accumulate)
    return bias


def _flat(operand: Tensor, transposed: bool) -> Tensor:
    matrix = operand.reshape(-1, operand.size(-1))
    return matrix.T if transposed else matrix


def _store(target: Tensor, product: Tensor, accumulate: bool) -> None:
    target.copy_(target.float() + product if accumulate else product)


FUNCTIONS = (generic_gemm, te_general_grouped_gemm)
