"""Check that Transformer Engine works on this machine's GPU: products in bf16 and each FP8 recipe, attention, rotary.

Exit code 0: everything works; 2: bf16 works, but not every FP8 recipe; 1: bf16 fails, or the import; 9: no GPU. Every
check prints a line when it ends, so that a crash shows which check it was.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable
from typing import Any

import torch  # before Transformer Engine: it loads the CUDA libraries that the engine needs

from mesh_megatron.platform import device

PACKAGES = ["torch", "triton", "numpy", "transformers", "megatron-core", "transformer-engine"]


def main() -> int:
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES), flush=True)
    if not torch.cuda.is_available():
        print("torch finds no GPU")
        return 9
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), flush=True)
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}", flush=True)
    device.prepare()
    try:
        import transformer_engine.pytorch  # noqa: F401
        from transformer_engine.common import recipe
    except Exception as error:  # a library of another CUDA, cuDNN or torch fails in many ways
        print(f"fail: import: {error}")
        return 1
    recipes = {
        "tensorwise": recipe.Float8CurrentScaling,
        "delayed": recipe.DelayedScaling,
        "blockwise": recipe.Float8BlockScaling,
    }
    bf16 = [check("bf16 product", product, None), check("attention", attention), check("partial rotary", rotary)]
    fp8 = [check(f"fp8 {name}", product, make) for name, make in recipes.items()]
    return 1 if not all(bf16) else 0 if all(fp8) else 2


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def check(name: str, run: Callable[..., None], *args: Any) -> bool:
    began = time.time()
    try:
        run(*args)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"fail: {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return False
    print(f"ok: {name}, {time.time() - began:.1f} s", flush=True)
    return True


def product(make_recipe: Callable[[], Any] | None) -> None:
    import transformer_engine.pytorch as te

    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    linear = te.LayerNormLinear(1024, 3072, params_dtype=torch.bfloat16, device="cuda")
    scaling = make_recipe() if make_recipe is not None else None
    with te.fp8_autocast(enabled=scaling is not None, fp8_recipe=scaling):
        y = linear(x)
    y.float().square().mean().backward()
    if not (y.isfinite().all() and x.grad.isfinite().all() and linear.weight.grad.isfinite().all()):
        raise ArithmeticError("numbers that are not finite")


def attention() -> None:
    import transformer_engine.pytorch as te

    query = torch.randn(512, 4, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = te.DotProductAttention(16, 64, attn_mask_type="causal")(query, query, query).view_as(query)
    batch_first = query.permute(1, 2, 0, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(*[batch_first] * 3, is_causal=True).permute(2, 0, 1, 3)
    found.float().square().mean().backward()
    if (found - expected).float().norm() > 2e-2 * expected.float().norm():
        raise ArithmeticError("attention differs from torch's")


def rotary() -> None:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    heads, angles = torch.randn(64, 2, 4, 64, device="cuda"), torch.randn(64, 1, 1, 16, device="cuda")
    apply_rotary_pos_emb(heads, angles, tensor_format="sbhd", fused=True)


if __name__ == "__main__":
    sys.exit(main())
