"""GGUF files: a reader of headers, and experts in Q4_0."""

import json
import re
import struct

import numpy as np
import pytest
import torch

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from cupymoe.checkpoint.gguf import GgufFile
from tests.checkpoint.quantised.layers import EXPERTS, LAYER

H, I = 96, 64  # noqa: E741
BLOCK = f"blk.{LAYER}."
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors, values=(), version=3, alignment=32):
    """The bytes of a file; ``tensors`` are (name, type, shape rows first, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    for name, type, value in values:
        header += text(name) + struct.pack("<I", type) + value
    data = b""
    for name, type, shape, content in tensors:
        data += bytes(-len(data) % alignment)
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += struct.pack("<IQ", TYPES[type], len(data))
        data += content
    return header + bytes(-len(header) % alignment) + data


def q4_0(rng, *shape):
    """Bytes block by block, and the weight that they stand for."""
    count = int(np.prod(shape)) // 32
    scales = (rng.uniform(0.01, 0.1, count) * rng.choice([-1, 1], count)).astype(np.float16)
    codes = rng.integers(0, 16, (count, 32))
    content = b"".join(
        scale.tobytes() + bytes(int(low) | int(high) << 4 for low, high in zip(block[:16], block[16:], strict=True))
        for scale, block in zip(scales, codes, strict=True)
    )
    return content, torch.from_numpy(((codes - 8) * scales[:, None].astype(float)).reshape(shape))


def experts(rng, apart):
    """The tensors of a layer's experts, and both weights."""
    if apart:
        gate, up = q4_0(rng, EXPERTS, I, H), q4_0(rng, EXPERTS, I, H)
        tensors = [("ffn_gate_exps", gate, (EXPERTS, I, H)), ("ffn_up_exps", up, (EXPERTS, I, H))]
        gate_up = torch.cat([gate[1], up[1]], 1)
    else:
        both = q4_0(rng, EXPERTS, 2 * I, H)
        tensors, gate_up = [("ffn_gate_up_exps", both, (EXPERTS, 2 * I, H))], both[1]
    down = q4_0(rng, EXPERTS, H, I)
    tensors.append(("ffn_down_exps", down, (EXPERTS, H, I)))
    return [(f"{BLOCK}{name}.weight", "Q4_0", shape, each[0]) for name, each, shape in tensors], gate_up, down[1]


def floats(name, *shape):
    return BLOCK + name, "F32", shape, torch.rand(shape).numpy().tobytes()


def router():
    return [
        floats("ffn_gate_inp.weight", EXPERTS, H),
        floats("ffn_gate_inp.scale", H),
        floats("ffn_down_exps.scale", EXPERTS),
    ]


FIELDS = {
    "hidden_size": H,
    "num_experts": EXPERTS,
    "moe_intermediate_size": I,
    "top_k_experts": 2,
    "num_experts_per_tok": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}


def write(folder, content, model_type="gemma4_text"):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **FIELDS}))
    (folder / "x.gguf").write_bytes(content)
    return folder / "x.gguf"


@pytest.mark.parametrize("apart", [False, True])
def test_gemma4(tmp_path, apart):
    tensors, gate_up, down = experts(np.random.default_rng(0), apart)
    others = [("token_embd.weight", "Q8_0", (4, 32), bytes(4 * 34)), floats("ffn_gate_inp_shexp.weight", H)]
    path = write(tmp_path, gguf([*others, *tensors, *router()], [("general.name", 8, text("x"))]))
    assert checkpoint.layers(path) == (LAYER,)
    moe = checkpoint.load_layer(path, LAYER)
    assert torch.equal(moe.experts.gate_up_proj.dequantize(), gate_up)
    assert torch.equal(moe.experts.down_proj.dequantize(), down)
    assert moe.router.proj.weight.shape == (EXPERTS, H)
    exported = checkpoint.export_experts(moe.experts, path, LAYER)
    assert {name: tensor.numpy().tobytes() for name, tensor in exported.items()} == {
        name: content for name, *_, content in tensors
    }


@pytest.mark.parametrize("apart", [False, True])
def test_another_model_s(tmp_path, apart):
    tensors, gate_up, down = experts(np.random.default_rng(0), apart)
    path = write(tmp_path, gguf([*tensors, floats("ffn_gate_inp.weight", EXPERTS, H)]), "qwen3_moe")
    loaded = checkpoint.load_experts(path, LAYER)
    assert torch.equal(loaded.gate_up_proj.dequantize(), gate_up)
    assert torch.equal(loaded.down_proj.dequantize(), down)


def test_unquantised(tmp_path):
    tensors = [floats("ffn_gate_up_exps.weight", EXPERTS, 2 * I, H), floats("ffn_down_exps.weight", EXPERTS, H, I)]
    moe = checkpoint.load_layer(write(tmp_path, gguf([*tensors, *router()])), LAYER, dtype=torch.bfloat16)
    expected = torch.frombuffer(bytearray(tensors[1][3]), dtype=torch.float32).view(EXPERTS, H, I).bfloat16()
    assert torch.equal(moe.experts.down_proj, expected)


def test_split_files(tmp_path):
    tensors, gate_up, _ = experts(np.random.default_rng(0), True)
    write(tmp_path, b"")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(gguf(tensors[:1]))
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf: the file is missing"):
        checkpoint.load_layer(tmp_path / "m-00001-of-00002.gguf", LAYER)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(gguf([*tensors[1:], *router()]))
    moe = checkpoint.load_layer(tmp_path / "m-00001-of-00002.gguf", LAYER)
    assert torch.equal(moe.experts.gate_up_proj.dequantize(), gate_up)


def test_values_of_every_type_are_passed_over(tmp_path):
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    values = [(f"v{type}", type, struct.pack(f"<{code}", 1)) for type, code in scalars.items()]
    values += [("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc"))]
    values += [("numbers", 9, struct.pack("<IQ3H", 2, 3, 1, 2, 3)), ("general.alignment", 4, struct.pack("<I", 64))]
    (tmp_path / "x.gguf").write_bytes(
        gguf([("a", "F32", (2, 3), bytes(24)), ("b", "F16", (5,), bytes(10))], values, 2, 64)
    )
    with GgufFile(tmp_path / "x.gguf") as file:
        assert file.keys() == ["a", "b"]
        assert file.get_slice("a").get_shape() == [2, 3]
        assert file.get_tensor("b").dtype == torch.float16


def damaged(change):
    tensors, *_ = experts(np.random.default_rng(0), False)
    return change([*tensors, *router()])


DAMAGED = {
    "another file": (b"GGML" + bytes(100), "must begin with b'GGUF', got b'GGML'"),
    "empty": (b"", "not a readable GGUF file"),
    "version": (gguf([], version=1), "its version must be one of (2, 3), got 1"),
    "count": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "a count must be at most 16777216"),
    "cut in the header": (damaged(gguf)[:200], "it ends within its header, after 200 bytes"),
    "cut in the data": (damaged(gguf)[:-2000], "can't be read: it has"),
    "type of a value": (gguf([], [("x", 13, b"")]), "the type of a value must be at most 12, got 13"),
    "alignment": (gguf([], [("general.alignment", 4, struct.pack("<I", 3))]), "must be a power of two, got 3"),
    "twice": (gguf([("x", "F32", (1,), bytes(4))] * 2), "x is there twice"),
    "dimensions": (gguf([("x", "F32", (1,) * 5, bytes(4))]), "x must have at most 4 dimensions, got 5"),
    "a cut block": (gguf([("x", "Q4_0", (48,), bytes(27))]), "x must have whole blocks of 32 in a row, got 48"),
    "another type": (
        damaged(lambda tensors: gguf([(tensors[0][0], "Q8_0", *tensors[0][2:]), *tensors[1:]])),
        f"{BLOCK}ffn_gate_up_exps.weight must be of type Q4_0, BF16, F16, F32, F64, got Q8_0",
    ),
    "another shape": (
        damaged(lambda tensors: gguf([(tensors[0][0], "Q4_0", (EXPERTS, 2 * I, 2 * H), b""), *tensors[1:]])),
        f"{BLOCK}ffn_gate_up_exps.weight must have shape [4, 128, 96], got [4, 128, 192]",
    ),
    "missing": (damaged(lambda tensors: gguf(tensors[1:])), f"{BLOCK}ffn_gate_up_exps.weight is missing"),
    "left over": (
        damaged(lambda tensors: gguf([*tensors, floats("ffn_down_exps.bias", EXPERTS, H)])),
        f"{BLOCK}ffn_down_exps.bias is left over",
    ),
    "NaN": (
        damaged(lambda tensors: gguf([(*tensors[0][:3], b"\0\x7e" + tensors[0][3][2:]), *tensors[1:]])),
        f"{BLOCK}ffn_gate_up_exps.weight of expert 0 must be finite, got nan",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(tmp_path, case):
    content, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.load_layer(write(tmp_path, content), LAYER)


def test_every_cut_of_a_header_is_refused(tmp_path):
    content = gguf([("x", "F32", (2, 2), bytes(16))], [("words", 9, struct.pack("<IQ", 8, 1) + text("abc"))])
    end = content.index(b"x") + 1 + 4 + 16 + 12
    for length in range(1, end):
        (tmp_path / "x.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="not a readable GGUF file"):
            GgufFile(tmp_path / "x.gguf")


def test_the_gguf_package_s_own_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma4")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    weights = {}
    shapes = {"gate_up": (EXPERTS, 2 * I, H), "down": (EXPERTS, H, I)}
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
        weights[name] = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)).double()
        writer.add_tensor(f"{BLOCK}ffn_{name}_exps.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name, _, shape, content in router():
        writer.add_tensor(name, np.frombuffer(content, np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write(tmp_path, (tmp_path / "x.gguf").read_bytes())
    moe = checkpoint.load_layer(tmp_path / "x.gguf", LAYER)
    assert torch.equal(moe.experts.gate_up_proj.dequantize(), weights["gate_up"])
    assert torch.equal(moe.experts.down_proj.dequantize(), weights["down"])
