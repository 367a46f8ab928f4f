"""A weight of the experts in a quantised format, and both weights of a layer, as torch modules.

Their tensors are buffers, not parameters: there is no gradient with respect to a code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cupymoe.weights.buffers import BUFFERS, bytes_moved, expected_buffers, padded
from cupymoe.weights.checks import check_natural, check_range
from cupymoe.weights.dequantize import Buffers, dequantize, some_of
from cupymoe.weights.format import WeightFormat, format_of
from cupymoe.weights.pack import pack_codes, unpack_codes

_OLD_LAYOUT = "codes that lie as another version of cupymoe had them: load the checkpoint, or quantize, anew"


class QuantizedWeight(nn.Module):
    """A weight ``[E, n, k]`` as codes and scales, in the layout that the kernels read.

    It goes where a weight goes in :func:`cupymoe.fused_experts` and in the modules of the experts. Its ``state_dict``
    has its buffers and, as ``_extra_state``, a uint8 tensor of the format's name and the shape, with which loading
    compares them. ``to(dtype)``, ``half()`` and their like change the device only: codes and scales keep their dtypes.

    Args:
        format: one of :data:`cupymoe.weights.FORMATS`, or its name.
        shape: ``(E, n, k)``.
        scale_dtype: of the scales of groups, where the format lets it be chosen; None: the first that it allows,
            bfloat16 where that is one.
        device: None: torch's default.

    The buffers are uninitialised; :meth:`of` fills them.

    - ``codes`` uint8 ``[E, n, format.row_bytes(k)]``: see :mod:`cupymoe.weights.pack`;
    - ``scales`` ``[E, n, G]``, where G is the number of groups, padded with zeros to rows of whole 16 bytes; None where
      the format has no groups;
    - ``zeros`` uint8 ``[E, n, G]``, padded so too; None where the format has no zero points;
    - ``row_scales`` float32 ``[E, n]``; None where the format has none.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    row_scales: torch.Tensor | None

    def __init__(
        self,
        format: WeightFormat | str,
        shape: tuple[int, int, int],
        *,
        scale_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.format = format_of(format)
        if len(shape) != 3 or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
            raise ValueError(f"shape must be three positive integers (E, n, k), got {tuple(shape)}")
        self.shape: tuple[int, int, int] = (*shape,)
        """``(E, n, k)``, without any padding."""
        allowed = self.format.scale_dtypes
        if scale_dtype is not None and scale_dtype not in allowed:
            raise TypeError(f"scale_dtype must be one of {[*allowed]} for {self.format.name}, got {scale_dtype}")
        self._expected = expected_buffers(self.format, self.shape, scale_dtype)
        for name, expected in zip(BUFFERS, self._expected, strict=True):
            empty = None if expected is None else torch.empty(expected[0], dtype=expected[1], device=device)
            self.register_buffer(name, empty)

    @classmethod
    def of(
        cls,
        format: WeightFormat | str,
        codes: torch.Tensor,
        scales: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        row_scales: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """The weight of codes in their natural order; everything is copied.

        Args:
            format: one of :data:`cupymoe.weights.FORMATS`, or its name.
            codes: ``[E, n, k]`` uint8, one code a byte.
            scales: ``[E, n, G]``, finite, of one of ``format.scale_dtypes``; none of ``nvfp4`` negative. Of
                codes ``int4`` so small that no weight can be beyond 340, of ``e4m3`` beyond 1023.
            zeros: ``[E, n, G]`` uint8, 0 to 15.
            row_scales: ``[E, n]`` float32, finite.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed. What is there and what the
                format has must agree; no value may be NaN or infinite.
        """
        format = format_of(format)
        check_natural(format, codes, scales, zeros, row_scales)
        scale_dtype = None if scales is None else scales.dtype
        weight = cls(format, (*codes.shape,), scale_dtype=scale_dtype, device="meta")
        weight.codes = pack_codes(format, codes)
        for name, given in (("scales", scales), ("zeros", zeros)):
            if given is not None:
                setattr(weight, name, padded(given))
        weight.row_scales = None if row_scales is None else row_scales.clone(memory_format=torch.contiguous_format)
        return weight

    @property
    def device(self) -> torch.device:
        """Of the buffers."""
        return self.tensors()[0].device

    @property
    def group_scales(self) -> torch.Tensor | None:
        """``[E, n, G]``: the scales without their padding, a view."""
        return None if self.scales is None else self.scales[..., : self.format.groups(self.shape[2])]

    @property
    def group_zeros(self) -> torch.Tensor | None:
        """``[E, n, G]``: the zero points without their padding, a view."""
        return None if self.zeros is None else self.zeros[..., : self.format.groups(self.shape[2])]

    @property
    def nbytes(self) -> int:
        """What the buffers take."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def natural_codes(self) -> torch.Tensor:
        """``[E, n, k]`` uint8, one code a byte: what :meth:`of` was given."""
        return unpack_codes(self.format, self.codes, self.shape[2])

    def dequantize(self, dtype: torch.dtype = torch.float64, experts: slice = slice(None)) -> torch.Tensor:
        """The weight, ``[E', n, k]``; exact in float64.

        In another dtype, products of value and scales are computed in float32 and rounded once more, to that dtype.

        Args:
            dtype: of the result.
            experts: which ones.
        """
        return dequantize(self.format, self.shape[2], some_of(self.tensors(), experts), dtype)

    def tensors(self) -> Buffers:
        """``codes``, ``scales``, ``zeros`` and ``row_scales``."""
        buffers: dict[str, Any] = self._buffers  # as attributes, the four take 2 us
        return buffers["codes"], buffers["scales"], buffers["zeros"], buffers["row_scales"]

    def check(self, name: str) -> None:
        """The buffers are as they were made: another may have been assigned, or loaded with ``assign=True``.

        Raises:
            TypeError, ValueError: naming the buffer as one of ``name``, what it is and what it must be.
        """
        buffers = self.tensors()
        for buffer, expected in zip(buffers, self._expected, strict=True):
            if buffer is None or expected is None:
                is_right = buffer is None and expected is None
            else:
                is_right = (
                    buffer.shape == expected[0]
                    and buffer.dtype == expected[1]
                    and buffer.device == buffers[0].device
                    and buffer.is_contiguous()
                )
            if not is_right:
                raise self._complaint(name)

    def _complaint(self, name: str) -> Exception:
        """About the first buffer that :meth:`check` does not let pass."""
        for buffer_name, buffer, expected in zip(BUFFERS, self.tensors(), self._expected, strict=True):
            full_name = f"{name}.{buffer_name}"
            if (buffer is None) != (expected is None):
                wanted = "None" if expected is None else "given"
                return ValueError(f"{full_name} must be {wanted} in {self.format.name}")
            if buffer is None or expected is None:
                continue
            shape, dtype = expected
            if buffer.dtype != dtype:
                return TypeError(f"{full_name} must be {dtype}, got {buffer.dtype}")
            if buffer.shape != shape:
                return ValueError(f"{full_name} must have shape {[*shape]}, got {[*buffer.shape]}")
            if buffer.device != self.codes.device:
                return ValueError(f"{full_name} must be on codes's device {self.codes.device}, got {buffer.device}")
            if not buffer.is_contiguous():
                return ValueError(f"{full_name} must be contiguous, got strides {buffer.stride()}")
        raise AssertionError("every buffer is as it was made")

    @classmethod
    def like_state(
        cls, state_dict: Mapping[str, torch.Tensor], prefix: str, device: torch.device | str | None = None
    ) -> QuantizedWeight | None:
        """An uninitialised weight of the format, shape and dtypes that a ``state_dict`` has under a prefix, ready to be
        loaded from it; None if none lies there.

        Raises:
            ValueError: what says its format there is unknown.
        """
        state = state_dict.get(prefix + "_extra_state")
        if state is None or prefix + "codes" not in state_dict:
            return None
        try:
            name, *sizes = _text(state).split()
            num_experts, rows, k = map(int, sizes[:3])
        except (AttributeError, ValueError):
            raise ValueError(f"{prefix}_extra_state must name a format and a shape, got {state!r}") from None
        scales = state_dict.get(prefix + "scales")
        scale_dtype = None if scales is None else scales.dtype
        return cls(name, (num_experts, rows, k), scale_dtype=scale_dtype, device=device)

    def extra_repr(self) -> str:
        """The format and the shape."""
        return f"{self.format.name}, {' x '.join(map(str, self.shape))}"

    def get_extra_state(self) -> torch.Tensor:
        """Format and shape, and which layout the codes have if it is not the first, as the bytes of a text: safetensors
        keeps nothing but tensors."""
        layout = self.format.codec.layout
        text = " ".join(map(str, (self.format.name, *self.shape, *((layout,) if layout > 1 else ()))))
        return torch.tensor([*text.encode()], dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing is set: a state of another format or shape is refused before its buffers are loaded."""

    def __getstate__(self) -> dict[str, Any]:
        """Buffers as bytes with their dtype, because torch unpickles no tensor of 8-bit floats; the codes' layout."""
        buffers = {
            name: None if buffer is None else (buffer.view(torch.uint8), buffer.dtype)
            for name, buffer in self._buffers.items()
        }
        return {**self.__dict__, "_buffers": buffers, "layout": self.format.codec.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {**state}
        if state.pop("layout", 1) != state["format"].codec.layout:
            raise ValueError(f"this {state['format'].name} weight has {_OLD_LAYOUT}")
        buffers = {name: kept and kept[0].view(kept[1]) for name, kept in state["_buffers"].items()}
        super().__setstate__({**state, "_buffers": buffers})  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedWeight:
        super()._apply(functools.partial(bytes_moved, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Torch would copy what it is given into the buffers whatever the dtypes are, and a shape fits two formats."""
        *_, error_msgs = args
        errors = [
            f"{prefix}{name} must be {buffer.dtype}, got {given.dtype}"
            for name, buffer in self.named_buffers(recurse=False)
            if isinstance(given := state_dict.get(prefix + name), torch.Tensor) and given.dtype != buffer.dtype
        ]
        state = state_dict.get(prefix + "_extra_state")
        own = self.get_extra_state()
        if isinstance(state, torch.Tensor) and not torch.equal(state.cpu(), own):
            name, given, wanted = prefix.removesuffix("."), _text(state), _text(own)
            same = given.split()[:4] == wanted.split()[:4]
            errors.insert(0, f"{name} has {_OLD_LAYOUT}" if same else f"{name} must be {wanted}, got {given}")
        scales = state_dict.get(prefix + "scales")
        if not errors and isinstance(scales, torch.Tensor) and self.scales is not None:
            try:
                check_range(self.format, scales)
            except ValueError as error:
                errors.append(f"{prefix}{error}")
        if errors:
            error_msgs += errors
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)


Weight = torch.Tensor | QuantizedWeight
"""What may be a weight of the experts."""


def put_weight(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Let a quantised weight take the place of a module's parameter, which is gone then."""
    module._parameters.pop(name, None)
    nn.Module.__setattr__(module, name, weight)


def _text(state: torch.Tensor) -> str:
    return bytes(state.tolist()).decode(errors="replace")


class QuantizedExperts(nn.Module):
    """Both weights of a layer's experts; a checkpoint may have left one of them unquantised.

    Iterable as the two, so that ``fused_experts(x, *experts, top_k_index, top_k_weights, activation=...)`` works.

    Args:
        gate_up_proj: ``[E, 2I, H]``, or ``[E, I, H]`` for an ungated activation: a :class:`QuantizedWeight`, or a
            tensor, which becomes a parameter that wants no gradient if it is none yet.
        down_proj: ``[E, H, I]``: the same.
    """

    gate_up_proj: QuantizedWeight | nn.Parameter
    down_proj: QuantizedWeight | nn.Parameter

    def __init__(self, gate_up_proj: QuantizedWeight | torch.Tensor, down_proj: QuantizedWeight | torch.Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
            if not isinstance(weight, QuantizedWeight | torch.Tensor):
                raise TypeError(
                    f"{name} must be a cupymoe.QuantizedWeight or a torch.Tensor, got {type(weight).__name__}"
                )
            if not isinstance(weight, QuantizedWeight | nn.Parameter):
                weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, weight)

    def __iter__(self) -> Iterator[QuantizedWeight | nn.Parameter]:
        yield self.gate_up_proj
        yield self.down_proj
