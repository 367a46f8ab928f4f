"""Random quantised weights as every kind of file stores them: written number by number, by formulas of their own."""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cupymoe.weights import FORMATS

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Stored(NamedTuple):
    """The tensors of one weight ``[n, k]``, and what it is in float64."""

    tensors: dict[str, torch.Tensor]
    weight: np.ndarray


def words(codes, bits):
    """int32 words along the last axis, the first code in the lowest bits; zeros where the last word is not full."""
    per_word = 32 // bits
    codes = np.pad(codes.astype(np.uint32), (*[(0, 0)] * (codes.ndim - 1), (0, -codes.shape[-1] % per_word)))
    codes = codes.reshape(*codes.shape[:-1], -1, per_word) << (bits * np.arange(per_word, dtype=np.uint32))
    return torch.from_numpy(codes.sum(-1, dtype=np.uint32).view(np.int32).copy())


def nibbles(codes, high_first=False):
    first, second = codes[..., 0::2], codes[..., 1::2]
    first, second = (second, first) if high_first else (first, second)
    return torch.from_numpy((first + 16 * second).astype(np.uint8))


def spread(scales, group):
    return np.repeat(scales, group, axis=-1)


def draw(rng, *shape, high=16):
    return rng.integers(0, high, shape)


def scales_of(rng, *shape, dtype=torch.bfloat16, signed=True):
    """Positive and negative, none of them zero: as a torch tensor, and in float64."""
    values = rng.uniform(0.01, 0.1, shape) * (rng.choice([-1, 1], shape) if signed else 1)
    tensor = torch.from_numpy(np.asarray(values)).to(dtype)
    return tensor, tensor.double().numpy()


def pack_quantized(group, zeros=False, dtype=torch.bfloat16):
    def write(rng, n, k):
        codes = draw(rng, n, k)
        scale, values = scales_of(rng, n, k // group, dtype=dtype)
        zero = draw(rng, n, k // group) if zeros else np.full((n, k // group), 8)
        tensors = {"weight_packed": words(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        if zeros:
            tensors["weight_zero_point"] = words(zero.T, 4).T.contiguous()
        return Stored(tensors, (codes - spread(zero, group)) * spread(values, group))

    return write


def packed_int8(rng, n, k):
    values = rng.integers(-128, 128, (n, k))
    scale, factors = scales_of(rng, n, 1)
    tensors = {"weight_packed": words(values + 128, 8), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    return Stored(tensors, values * factors)


def e4m3_codes(rng, n, k):
    codes = draw(rng, n, k, high=256)
    codes[(codes & 127) == 127] -= 1  # which is NaN
    return codes, torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)


def fp8(strategy, scale_name="weight_scale", dtype=torch.float32, scalar_shape=(1,), activation=None):
    def write(rng, n, k):
        codes, weight = e4m3_codes(rng, n, k)
        shape = {"channel": (n, 1), "tensor": scalar_shape, "block": (-(-n // 128), -(-k // 128))}[strategy]
        scale, values = scales_of(rng, *shape, dtype=dtype, signed=False)
        if strategy == "block":
            values = np.repeat(np.repeat(values, 128, axis=0)[:n], 128, axis=1)[:, :k]
        tensors = {"weight": weight, scale_name: scale}
        if activation:
            tensors[activation] = scales_of(rng, *scalar_shape, dtype=dtype, signed=False)[0]
        return Stored(tensors, E4M3[codes] * values)

    return write


def e2m1(rng, n, k):
    codes = draw(rng, n, k)
    return codes, E2M1[codes]


def nvfp4_of_compressed_tensors(rng, n, k):
    codes, values = e2m1(rng, n, k)
    scale = torch.from_numpy(rng.uniform(0, 448, (n, k // 16))).to(torch.float8_e4m3fn)
    scale[0, 0] = 0
    divisor = np.float32(rng.uniform(100, 10000))
    tensors = {
        "weight_packed": nibbles(codes),
        "weight_scale": scale,
        "weight_global_scale": torch.tensor([divisor]),
        "input_global_scale": torch.tensor([np.float32(rng.uniform(1, 100))]),
    }
    return Stored(tensors, values * spread(scale.double().numpy(), 16) * float(np.float32(1) / divisor))


def nvfp4_of_modelopt(rng, n, k):
    codes, values = e2m1(rng, n, k)
    scale = torch.from_numpy(rng.uniform(0, 448, (n, k // 16))).to(torch.float8_e4m3fn)
    factor = np.float32(rng.uniform(0.0001, 0.01))
    tensors = {
        "weight": nibbles(codes),
        "weight_scale": scale,
        "weight_scale_2": torch.tensor(factor),
        "input_scale": torch.tensor(np.float32(rng.uniform(0.01, 1))),
    }
    return Stored(tensors, values * spread(scale.double().numpy(), 16) * float(factor))


def mxfp4(rng, n, k):
    codes, values = e2m1(rng, n, k)
    exponents = rng.integers(100, 140, (n, k // 32))
    exponents[0, 0] = 0
    tensors = {"weight_packed": nibbles(codes), "weight_scale": torch.from_numpy(exponents.astype(np.uint8))}
    return Stored(tensors, values * spread(np.exp2(exponents - 127.0), 32))


def gptq(group, offset, symmetric):
    def write(rng, n, k):
        codes = draw(rng, k, n)
        zero = np.full((k // group, n), 8) if symmetric else rng.integers(offset, 16, (k // group, n))
        scale, values = scales_of(rng, k // group, n, dtype=torch.float16)
        tensors = {
            "qweight": words(codes.T, 4).T.contiguous(),
            "qzeros": words(zero - offset, 4),
            "scales": scale,
            "g_idx": torch.arange(k, dtype=torch.int32) // group,
        }
        return Stored(tensors, ((codes - np.repeat(zero, group, 0)) * np.repeat(values, group, 0)).T)

    return write


def awq(group):
    def columns(codes):
        rows, n = codes.shape
        words = np.zeros((rows, n // 8), np.uint32)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(words.view(np.int32).copy())

    def write(rng, n, k):
        codes, zero = draw(rng, k, n), draw(rng, k // group, n)
        scale, values = scales_of(rng, k // group, n, dtype=torch.float16)
        tensors = {"qweight": columns(codes), "qzeros": columns(zero), "scales": scale}
        return Stored(tensors, ((codes - np.repeat(zero, group, 0)) * np.repeat(values, group, 0)).T)

    return write


def nf4(nested):
    def write(rng, n, k):
        table = np.float32(FORMATS["nf4"].values)
        codes = draw(rng, n, k)
        blocks = n * k // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
        absmax = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
        tensors = {
            "weight": nibbles(codes, high_first=True).reshape(-1, 1),
            "weight.quant_map": torch.from_numpy(table),
        }
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
            steps = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            factors = rng.uniform(0.001, 0.01, -(-blocks // 256)).astype(np.float32)
            quantised = draw(rng, blocks, high=256)
            absmax = steps[quantised] * np.repeat(factors, 256)[:blocks] + np.float32(0.0625)
            tensors["weight.nested_absmax"] = torch.from_numpy(factors)
            tensors["weight.nested_quant_map"] = torch.from_numpy(steps)
            tensors["weight.absmax"] = torch.from_numpy(quantised.astype(np.uint8))
        else:
            tensors["weight.absmax"] = torch.from_numpy(absmax)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        tensors["weight.quant_state.bitsandbytes__nf4"] = torch.from_numpy(text)
        weight = table[codes].astype(float) * spread(absmax.astype(float).reshape(n, -1), 64)
        return Stored(tensors, weight)

    return write


class Kind(NamedTuple):
    """One kind of file."""

    write: Callable[..., Stored]
    format: str
    config: dict
    hidden_size: int = 96
    intermediate_size: int = 64
    is_fused: bool = True
    """Whether such weights may be fused."""


def compressed_tensors(format, **weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*router.*"],
        "quantization_status": "compressed",
    }


def packed(group, symmetric=True):
    return compressed_tensors(
        "pack-quantized", num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group
    )


def floats(strategy, **more):
    return compressed_tensors("float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy, **more)


def gptq_config(group, **more):
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, **more}


MODELOPT_NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    },
    "ignore": ["lm_head", "*router*"],
}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

KINDS = {
    "ct int4 g32": Kind(pack_quantized(32), "int4_g32", packed(32)),
    "ct int4 g64": Kind(pack_quantized(64, dtype=torch.float16), "int4_g64", packed(64), 128),
    "ct int4 g128": Kind(pack_quantized(128, dtype=torch.float32), "int4_g128", packed(128), 256, 128),
    "ct int4 g32 zero": Kind(pack_quantized(32, zeros=True), "int4_g32_zero", packed(32, symmetric=False)),
    "ct int4 g64 zero": Kind(pack_quantized(64, zeros=True), "int4_g64_zero", packed(64, symmetric=False), 128),
    "ct int8": Kind(
        packed_int8, "int8", compressed_tensors("pack-quantized", num_bits=8, symmetric=True, strategy="channel")
    ),
    "ct fp8 channel": Kind(fp8("channel", dtype=torch.bfloat16), "fp8", floats("channel")),
    "ct fp8 tensor": Kind(fp8("tensor", activation="input_scale"), "fp8", floats("tensor")),
    "ct fp8 block": Kind(
        fp8("block", dtype=torch.bfloat16), "fp8_g128", floats("block", block_structure=[128, 128]), 160, 192
    ),
    "ct nvfp4": Kind(
        nvfp4_of_compressed_tensors,
        "nvfp4",
        compressed_tensors("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
    "ct mxfp4": Kind(
        mxfp4,
        "mxfp4",
        compressed_tensors("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "modelopt nvfp4": Kind(nvfp4_of_modelopt, "nvfp4", MODELOPT_NVFP4),
    "modelopt fp8": Kind(
        fp8("tensor", scalar_shape=(), activation="input_scale"),
        "fp8",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "fp8 blocks": Kind(fp8("block", "weight_scale_inv"), "fp8_g128", FP8_BLOCKS, 256, 128),
    "fp8 cut blocks": Kind(fp8("block", "weight_scale_inv"), "fp8_g128", FP8_BLOCKS, 160, 192),
    "fp8 tensor": Kind(
        fp8("tensor", "weight_scale_inv", scalar_shape=(1, 1)), "fp8", {**FP8_BLOCKS, "weight_block_size": None}
    ),
    "gptq": Kind(gptq(32, 1, True), "int4_g32", gptq_config(32, sym=True), is_fused=False),
    "gptq zero": Kind(gptq(32, 1, False), "int4_g32_zero", gptq_config(32, sym=False), is_fused=False),
    "gptq v2 zero": Kind(
        gptq(64, 0, False),
        "int4_g64_zero",
        gptq_config(64, sym=False, checkpoint_format="gptq_v2"),
        128,
        is_fused=False,
    ),
    "awq": Kind(awq(64), "int4_g64_zero", AWQ, 128, is_fused=False),
    "nf4": Kind(nf4(False), "nf4", BNB, 128, is_fused=False),
    "nf4 nested": Kind(nf4(True), "nf4", {**BNB, "bnb_4bit_use_double_quant": True}, 128, is_fused=False),
}
