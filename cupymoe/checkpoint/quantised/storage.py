"""What every way to store a quantised weight has in common: the tensors that it consists of, read and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from cupymoe.weights.format import WeightFormat


class Rule(NamedTuple):
    """What one tensor of a weight must be, as the header of its file says it."""

    dtypes: tuple[str, ...]
    """In the words of safetensors."""
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False
    whole: bool = False
    """Of a fused weight: it belongs to all experts at once, where the other tensors have one part for each."""


class NaturalWeight(NamedTuple):
    """A weight in a format, before it is laid out for the kernels: its rows are those of one expert's projection."""

    codes: torch.Tensor
    """``[n, k]`` uint8, one code a byte."""
    scales: torch.Tensor | None = None
    """``[n, groups]`` in a dtype of the format."""
    zeros: torch.Tensor | None = None
    """``[n, groups]`` uint8."""
    row_scales: torch.Tensor | None = None
    """``[n]`` float32."""


class BadTensorError(ValueError):
    """A tensor that a weight was read from holds what it must not."""

    def __init__(self, name: str, complaint: str) -> None:
        super().__init__(f"{name} {complaint}")
        self.name = name
        self.complaint = complaint


@dataclass(frozen=True)
class Storage(ABC):
    """How a kind of file stores a quantised weight ``[n, k]``, or ``[E, n, k]`` where those of all experts are fused.

    Reading and writing are each other's inverse: what was read is written bit for bit.
    """

    format: WeightFormat

    family: ClassVar[str]
    """Whose kind of file it is, for messages."""
    is_fused: ClassVar[bool] = False
    """Whether the weights of all experts may be fused."""

    def __str__(self) -> str:
        return f"{self.family} {self.format.name}"

    def leaves_plain(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape is left unquantised by whoever writes such files."""
        return False

    @abstractmethod
    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """The tensors of a weight of this shape by name, which begins with ``weight`` where it belongs to the weight.

        Args:
            shape: ``[n, k]``, or ``[E, n, k]`` where those of all experts are fused.
            parts: of how many projections the rows are: 2 where gate and up are fused.

        Raises:
            ValueError: no weight of this shape can be stored so.
        """

    @abstractmethod
    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """The weight ``[n, k]`` of one expert's tensors, which are as :meth:`rules` says.

        Raises:
            BadTensorError: one of them holds what it must not.
        """

    @abstractmethod
    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one expert's weight that :meth:`read` would read it from.

        Args:
            weight: in this storage's format.
            like: tensors of such a weight, where there are some: they say what the weight leaves open.
        """

    def is_same(self, given: torch.Tensor, read: torch.Tensor) -> bool:
        """Whether what was read again is what was written: the same bits."""
        return same_bits(given, read)

    def export(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of :meth:`write` in the dtypes and shapes of ``like``, and those beside the weight, which are
        ``like``'s own: the scales of activations.

        Raises:
            ValueError: such tensors can't hold this weight.
        """
        written = dict(like)
        for name, tensor in self.write(weight, like).items():
            if name in like:
                tensor = tensor.to(like[name].dtype).reshape(like[name].shape)
            written[name] = in_order(tensor)  # as files hold it
        n, k = weight.codes.shape
        for what, given, read in zip(weight._fields, weight, self.read(written, (n, k)), strict=True):
            if given is not None and (read is None or not self.is_same(given, read)):
                raise ValueError(f"{self} can't hold the {what} of this weight")
        return written


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are of one dtype and shape, and the same bytes."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        in_order(a)[..., None].view(torch.uint8), in_order(b)[..., None].view(torch.uint8)
    )


def in_order(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of its shape: ``contiguous()`` and ``clone()`` let be those of dimensions of size 1, and
    then a tensor can't be viewed in another dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# --- words and nibbles ------------------------------------------------------------------------------------------------


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The ``count`` codes, lowest bits first, in each row of little-endian words: ``[..., count]`` uint8.

    Args:
        words: ``[..., m]`` of any integers.
        bits: 4 or 8.
        count: how many codes a row has; what is behind them is padding.
    """
    codes = in_order(words).view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return codes[..., :count]


def pack_words(codes: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`unpack_words`, padded with zero bits to whole words of ``dtype``."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (dtype.itemsize * 8 // bits)))
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return in_order(codes).view(dtype)


# --- what a tensor must hold ------------------------------------------------------------------------------------------


def check_finite(name: str, tensor: torch.Tensor, *, negative: bool = True) -> None:
    """Numbers all, and none below zero (or minus zero) unless ``negative``.

    Raises:
        BadTensorError: there are others.
    """
    values = tensor.float()
    bad = ~torch.isfinite(values)
    if not negative:
        bad |= torch.signbit(values)
    if bad.any():
        allowed = "finite" if negative else "finite and not negative"
        raise BadTensorError(
            name, f"must be {allowed}, got {values[bad][0].item()} ({int(bad.sum())} of {values.numel()} are bad)"
        )


def check_values(name: str, what: str, allowed: torch.Tensor | int, given: torch.Tensor) -> None:
    """All of ``given`` are what is ``allowed``.

    Raises:
        BadTensorError: they are not.
    """
    if not bool((given == allowed).all()):
        bad = given[given != allowed].flatten()[0].item()
        raise BadTensorError(name, f"must be {what}, got {bad} among its {given.numel()}")


def check_codes(format: WeightFormat, name: str, codes: torch.Tensor) -> None:
    """None of the codes is NaN.

    Raises:
        BadTensorError: there is one.
    """
    bad = sum(int((codes == code).sum()) for code in format.nan_codes)
    if bad:
        raise BadTensorError(name, f"must have no code that is NaN, got {bad} of {codes.numel()}")


# --- scales -----------------------------------------------------------------------------------------------------------

FLOATS = ("BF16", "F16", "F32")


def scalar_shapes(lead: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """One number for each weight, as shapes that it is given in."""
    return tuple((*lead, *(1,) * count) for count in range(3))


def block_counts(shape: tuple[int, ...], block: int) -> tuple[int, int]:
    """How many blocks a matrix has in rows and columns, with those that its edges cut."""
    n, k = shape[-2:]
    return -(-n // block), -(-k // block)
