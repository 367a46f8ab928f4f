"""How torch's dtypes are called in ``cuda_src/common/dtypes.cuh``."""

from __future__ import annotations

import torch

SCALARS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""CUDA names of the dtypes that the kernels serve."""

INDEX_TYPES = {torch.int32: "int", torch.int64: "long long"}
"""CUDA names of the dtypes of ``top_k_index``."""
