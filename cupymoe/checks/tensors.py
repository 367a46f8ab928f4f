"""What is asked of any tensor, by its description; and the lookup that spares a kind of call that has passed before."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensor

from cupymoe.activation import MoEActivation
from cupymoe.customisation import is_wrapper
from cupymoe.kernels.dtypes import SCALARS


class Description(NamedTuple):
    """What most checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    kind: type


# The same as a plain tuple, at half the cost.
_attributes = operator.attrgetter("shape", "dtype", "device", "__class__")


class AsPlain(NamedTuple):
    """A quantised weight as most checks see it: as one of the dtype that it is multiplied in."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def is_contiguous(self) -> bool:
        """Its codes always are."""
        return True


def describe(name: str, tensor: torch.Tensor | AsPlain) -> Description:
    """A tensor's description, or the error of what is none."""
    if not isinstance(tensor, torch.Tensor | AsPlain):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    kind = torch.Tensor if isinstance(tensor, AsPlain) else type(tensor)  # torch.compile asks no other class of ours
    return Description(tensor.shape, tensor.dtype, tensor.device, kind)


def passed(check: Callable[..., None], *settings: object, tensors: Sequence[torch.Tensor | AsPlain | None]) -> bool:
    """Whether a call of this kind has passed the cached ``check``, or does: a check costs 20 us, the lookup 2."""
    if torch.compiler.is_compiling() or isinstance(tensors[0], FakeTensor):
        return False  # a traced size has no hash
    try:
        check(*settings, *(None if tensor is None else _attributes(tensor) for tensor in tensors))
    except (AttributeError, TypeError, ValueError):
        return False  # the checks say which is no tensor, or what else is wrong
    return True


def check_plain(name: str, given: Description) -> None:
    """No kind of tensor that wraps another one."""
    if is_wrapper(given.kind):
        raise TypeError(
            f"{name} must be a plain tensor, got {given.kind.__name__}, which wraps another one: pass its local or "
            "dequantised tensor"
        )


def check_shape(name: str, given: Description, shape: tuple[int | None, ...]) -> None:
    """Rank and the sizes that are not None."""
    if len(given.shape) != len(shape) or any(
        size is not None and size != actual for size, actual in zip(shape, given.shape, strict=True)
    ):
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(given.shape)}")


def check_floating(name: str, given: Description) -> None:
    """A floating dtype of at least 16 bits, on a device where calls are computed."""
    if not given.dtype.is_floating_point or given.dtype.itemsize == 1:
        raise TypeError(f"{name} must be a floating-point tensor of at least 16 bits, got {given.dtype}")
    if given.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {given.device}")


def check_served_by_kernel(name: str, given: Description) -> None:
    """A dtype that the kernels take, where the tensor is on CUDA."""
    check_floating(name, given)
    if given.device.type == "cuda" and given.dtype not in SCALARS:
        raise TypeError(
            f"{name} must be bfloat16, float16 or float32 on CUDA, got {given.dtype} "
            "(cupymoe.reference computes any floating dtype)"
        )


def check_same(name: str, given: Description, other_name: str, other: Description, *, dtype: bool) -> None:
    """The device of another argument, and its dtype if that is asked for."""
    if given.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {given.device}")
    if dtype and given.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {given.dtype}")


def check_activation_input(input: torch.Tensor, activation: MoEActivation) -> Description:
    """The input of an activation, which is described."""
    given = describe("input", input)
    check_served_by_kernel("input", given)
    if not given.shape or (activation.is_gated and given.shape[-1] % 2):
        expected = "[..., 2N]" if activation.is_gated else "[..., N]"
        raise ValueError(f"input must have shape {expected} for {activation.name}, got {list(given.shape)}")
    return given


def _memory_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first element and past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * (last + 1)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory, from the first to the last element of each."""
    if a.device.type == "meta" or isinstance(a, FakeTensor) or not a.numel() or not b.numel():
        return False
    (a_first, a_end), (b_first, b_end) = _memory_span(a), _memory_span(b)
    return a_first < b_end and b_first < a_end
