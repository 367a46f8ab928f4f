"""The bridge to CuPy: same memory both ways, torch's streams and devices."""

import numpy as np
import pytest
import torch

from cupymoe import MoEActivation, as_cupy, as_torch, moe_activation, reference
from tests.helpers import DTYPES, every_value

ALL_DTYPES = [*DTYPES, torch.float64, torch.int32, torch.int64, torch.uint8]


def test_as_cupy_wants_a_cuda_tensor():
    with pytest.raises(ValueError, match="as_cupy needs a CUDA tensor, got one on cpu"):
        as_cupy(torch.ones(3))


def test_as_cupy_wants_a_tensor():
    with pytest.raises(TypeError, match=r"tensor must be a torch.Tensor, got list"):
        as_cupy([1.0])


def test_as_torch_wants_an_array():
    with pytest.raises(TypeError, match=r"array must be a cupy.ndarray or another DLPack array, got str"):
        as_torch("x")


@pytest.mark.parametrize(("width", "dtype"), [("uint16", torch.float32), ("float32", torch.bfloat16)])
def test_as_torch_keeps_the_shape(width, dtype):
    with pytest.raises(ValueError, match=f"dtype must be as wide as array's torch.{width}, got {dtype}"):
        as_torch(np.zeros((4, 8), width), dtype)


def test_as_torch_reads_the_bits_as_another_dtype():
    tensor = torch.randn(3, 5).to(torch.bfloat16)
    assert torch.equal(as_torch(tensor.view(torch.uint16).numpy(), torch.bfloat16), tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_same_memory_both_ways(dtype):
    tensor = torch.arange(12, device="cuda").to(dtype).view(3, 4)
    before = torch.cuda.memory_allocated()
    array = as_cupy(tensor)
    back = as_torch(array, dtype)
    assert torch.cuda.memory_allocated() == before
    assert array.data.ptr == back.data_ptr() == tensor.data_ptr()
    assert array.shape == back.shape == tensor.shape
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    array[1, 2] = 0
    torch.cuda.synchronize()
    assert tensor[1, 2] == 0
    tensor[2, 3] = 1
    assert back[2, 3] == 1


@pytest.mark.gpu
def test_strides_and_offsets_come_along():
    tensor = torch.arange(40, device="cuda", dtype=torch.float32).view(5, 8)[1:, ::2].T
    array = as_cupy(tensor)
    assert array.data.ptr == tensor.data_ptr()
    assert array.strides == tuple(4 * stride for stride in tensor.stride())
    back = as_torch(array)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


@pytest.mark.gpu
def test_bfloat16_comes_as_its_bits():
    tensor = every_value(torch.bfloat16, "cuda")
    array = as_cupy(tensor)
    assert array.dtype == "uint16"
    assert torch.equal(as_torch(array, torch.bfloat16).view(torch.int16), tensor.view(torch.int16))


@pytest.mark.gpu
def test_a_parameter_comes_without_its_graph():
    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    assert as_cupy(parameter).data.ptr == parameter.data_ptr()
    assert as_cupy(parameter * 2).sum() == 6


@pytest.mark.gpu
def test_the_array_keeps_the_memory():
    array = as_cupy(torch.full((1000,), 7.0, device="cuda"))
    torch.full((1000,), 8.0, device="cuda")
    assert (array == 7).all()


@pytest.mark.gpu
def test_cupy_waits_for_torch_s_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.zeros(1000, device="cuda")
        torch.cuda._sleep(50_000_000)
        tensor.fill_(3)
        array = as_cupy(tensor)
    assert array.sum() == 3000


@pytest.mark.gpu
def test_kernels_run_on_torch_s_current_stream():
    """On another stream the kernel would not wait for the sleeping one, and read zeros."""
    moe_activation("silu", torch.zeros(4, 64, device="cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        input = torch.zeros(4, 64, device="cuda")
        torch.cuda._sleep(50_000_000)
        input.fill_(2)
        output = moe_activation("silu", input)
    stream.synchronize()
    expected = reference.activate(torch.full((4, 64), 2.0), MoEActivation.SILU)
    torch.testing.assert_close(output.cpu(), expected)


@pytest.mark.gpu
def test_kernels_run_on_the_device_of_their_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    input = torch.randn(4, 64, device="cuda:1")
    assert torch.cuda.current_device() == 0
    output = moe_activation("silu", input)
    assert (output.device, torch.cuda.current_device()) == (input.device, 0)
    with torch.cuda.device(1):
        assert torch.equal(moe_activation("silu", input.to("cuda:0")).to("cuda:1"), output)
        assert torch.cuda.current_device() == 1
