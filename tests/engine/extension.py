"""The module ``transformer_engine_torch``: as much of Transformer Engine's C++ extension as our layers call."""

from __future__ import annotations

from enum import IntEnum
from types import ModuleType
from typing import Any

from engine import attention, layers, optimizers, products, rounding

DType = IntEnum(  # those that Python knows, with their numbers in C++
    "DType",
    {
        "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
)  # fmt: skip
FP8FwdTensors = IntEnum(
    "FP8FwdTensors", [f"GEMM{gemm}_{role}" for gemm in (1, 2, 3) for role in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = IntEnum(
    "FP8BwdTensors", [f"GRAD_{role}{gemm}" for gemm in (1, 2, 3) for role in ("OUTPUT", "INPUT")], start=0
)
NVTERoutingMapFormat = IntEnum("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8", start=0)
NAMED = (
    "CommOverlapType", "CommOverlapAlgo", "Float8BlockScaleTensorFormat", "NVTE_Bias_Type", "NVTE_Mask_Type",
    "NVTE_QKV_Format", "NVTE_QKV_Layout", "NVTE_Softmax_Type",
)  # fmt: skip


class Names:
    """Stands in for an enum of which only the names matter: each value is its own name."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Extension(ModuleType):
    """A module in place of one that cannot be loaded.

    Transformer Engine imports more than it calls here: a function that is missing says so when it is called.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} has no counterpart in tests/engine")

        return missing


def build() -> ModuleType:
    module: Any = Extension("transformer_engine_torch")
    module.DType, module.FP8FwdTensors, module.FP8BwdTensors = DType, FP8FwdTensors, FP8BwdTensors
    module.NVTERoutingMapFormat = NVTERoutingMapFormat
    for name in NAMED:
        setattr(module, name, Names())
    for part in (attention, layers, optimizers, products, rounding):
        for function in part.FUNCTIONS:
            setattr(module, function.__name__, function)
    module.get_cublasLt_version = lambda: 130000
    module.get_cudnn_version = lambda: 91000
    module.get_num_cublas_streams = lambda: 4
    module.get_stream_priority_range = lambda: (0, 0)
    module.device_supports_multicast = lambda: False
    return module
