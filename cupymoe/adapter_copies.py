"""Packed copies of adapters that are kept between calls: the one exception to the rule that nothing copies a weight.

A call that nobody differentiates would pack the same factors again and again. So what it has packed stays, at one
address, and is packed again in place when a parameter may have changed. Torch counts a parameter's writes
(``Tensor._version``), but for those of its fused optimizers; so every step of an optimizer counts too. Nobody sees
writes through ``.data`` nor those of a replayed CUDA graph: after these, :func:`refresh_adapters` is to be called.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from cupymoe.backends.adapters import new_packed, pack_into, takes_as_it_is
from cupymoe.checks.settings import check_module
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.pack_adapter import Copy
from cupymoe.lora import LowRank, is_packed, packed_shapes
from cupymoe.ops.register import on_device_of

_PLAIN = (torch.Tensor, nn.Parameter)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _Steps:
    """Of all optimizers, since there are copies."""

    def __init__(self) -> None:
        self.is_new = False
        """Whether there was one since they were counted. The hook adds nothing up, lest ``torch.compile``, which makes
        it a part of a compiled step, compile it for each sum."""
        self._count = 0

    def note(self, *_: Any) -> None:
        """Torch's hook after a step."""
        self.is_new = True

    def count(self) -> int:
        """Another number than before, if there was a step."""
        if self.is_new:
            self.is_new = False
            self._count += 1
        return self._count


_steps = _Steps()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_steps.note)


def are_stand_ins_about() -> bool:
    """Whether tensors may be others' stand-ins now, of which no copy can be kept: under modes such as FakeTensorMode
    and FlopCounterMode, and in torch.func's transforms."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None)


class Adapters(NamedTuple):
    """What is added to a weight."""

    parameters: list[torch.Tensor]
    """What the adapters are made of."""
    scalings: list[float]
    """One for each adapter."""
    views: Callable[[], list[LowRank]]
    """Makes the adapters, at least one."""
    are_here: bool = True
    """Whether the parameters stay where they are between the calls."""

    def can_be_kept(self, weight: torch.Tensor) -> bool:
        """Whether torch counts the writes to the parameters, and a copy of them would lie beside the weight.

        It counts none to inference tensors; ZeRO-3 fills its parameters for each call.
        """
        if not self.are_here or type(weight) not in _PLAIN or weight.dtype not in _DTYPES:
            return False
        device = weight.device
        if device.type not in ("cuda", "cpu"):
            return False
        for parameter in self.parameters:  # all() would take three times as long
            if (
                type(parameter) not in _PLAIN
                or parameter.device != device
                or parameter.is_inference()
                or hasattr(parameter, "ds_id")
            ):
                return False
        return True


class AdapterCopy:
    """The sum of a weight's adapters as the products take it: an ``a`` and a ``b`` as in :class:`cupymoe.lora.Packed`.

    Each keeps its address as long as its shape, layout, dtype and device stay. Any thread and any stream may ask
    for it.
    """

    def __init__(self) -> None:
        _watch_optimizers()
        self._lock = threading.Lock()
        self._factors: list[torch.Tensor | None] = [None, None]
        """``a`` and ``b``; None for one that is packed already where it lies."""
        self._state: Any = None
        """What they were packed from; None: that may have changed unseen."""
        self._storages: list[StorageWeakRef] = []
        """Of the parameters: while these are held, no new storage has the identity of one that is gone."""
        self._packing: torch.cuda.Event | None = None
        self._streams: dict[int, torch.cuda.Stream] = {}
        """Those whose work comes after the packing: they may be reading."""

    def of(self, weight: torch.Tensor, adapters: Adapters) -> LowRank | None:
        """The copy, up to date; None: the call has to pack by itself.

        It has to where the adapters don't fit the weight, which is for the call to say; and where the copy is out of
        date while a CUDA graph is captured: the graph would own its memory, and only the replays would pack.

        Args:
            weight: ``[E, out, in]``.
            adapters: of this weight, which can be kept.
        """
        state = _state_of(weight, adapters)
        with self._lock, on_device_of(weight):
            if self._state != state:
                if _is_capturing(weight) or not self._pack(weight, adapters):
                    return None
                self._state = state
            self._wait(weight)
            a, b = self._factors
        if a is None or b is None:
            (given,) = adapters.views()
            a, b = given.a if a is None else a, given.b if b is None else b
        return LowRank(a, b)

    def refresh(self, weight: torch.Tensor, adapters: Adapters) -> bool:
        """Pack now, whatever has changed. Whether there is a copy; arguments as of :meth:`of`."""
        self.distrust()
        return self.of(weight, adapters) is not None and self._factors != [None, None]

    def distrust(self) -> None:
        """Let the next call pack, whatever has changed."""
        with self._lock:
            self._state = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _pack(self, weight: torch.Tensor, adapters: Adapters) -> bool:
        """Pack in place; whether the adapters fit the weight."""
        views = adapters.views()
        ranks = [view.a.shape[1] for view in views]
        num_experts, out_size, in_size = weight.shape
        for (a, b, _), rank in zip(views, ranks, strict=True):
            if a.shape != (num_experts, rank, in_size) or b.shape != (num_experts, out_size, rank):
                return False
        self._state = None  # until it is done
        for stream in self._streams.values():
            torch.cuda.current_stream().wait_stream(stream)
        a_shape, b_shape = packed_shapes(weight, sum(ranks))
        self._keep(0, a_shape, weight, [(view.a, 1.0) for view in views])
        self._keep(1, b_shape, weight, [(view.b, view.scaling) for view in views])
        ends = [*accumulate(ranks[:-1]), None]  # the last one's zeros fill the rest
        of_a, of_b = self._factors
        copies: list[Copy] = []
        for view, start, end in zip(views, [0, *ends[:-1]], ends, strict=True):
            if of_a is not None:
                copies.append(Copy(view.a, of_a[:, start:end]))
            if of_b is not None:
                copies.append(Copy(view.b, of_b[..., start:end], view.scaling))
        pack_into(copies)
        if weight.is_cuda:
            stream = torch.cuda.current_stream()
            self._packing, self._streams = stream.record_event(), {stream.cuda_stream: stream}
        self._storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in adapters.parameters]
        return True

    def _keep(
        self,
        index: int,
        shape: tuple[int, int, int],
        weight: torch.Tensor,
        parts: list[tuple[torch.Tensor, float]],
    ) -> None:
        """See that there is memory for a factor, unless it is packed already where it lies."""
        kept = self._factors[index]
        if kept is not None and kept.device == weight.device and is_packed(kept, shape, weight, 1.0):
            return
        is_there = len(parts) == 1 and takes_as_it_is(parts[0][0], shape, weight, parts[0][1])
        self._factors[index] = None if is_there else new_packed(shape, weight)

    def _wait(self, weight: torch.Tensor) -> None:
        """Let this stream's work come after the packing.

        A graph that is being captured can't wait for what is outside of it. Torch does, before it captures.
        """
        if self._packing is None or not weight.is_cuda or current_stream(weight.get_device()) in self._streams:
            return
        if _is_capturing(weight):
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self._packing)
        for factor in self._factors:
            if factor is not None:
                factor.record_stream(stream)  # it may be reading when the model is dropped
        self._streams[stream.cuda_stream] = stream


def _state_of(weight: torch.Tensor, adapters: Adapters) -> Any:
    return (
        _steps.count(),
        weight.device,
        weight.dtype,
        weight.shape,
        weight.is_contiguous(),
        adapters.scalings,
        [
            (
                parameter.untyped_storage()._cdata,  # that ``.data`` was replaced counts as no write
                parameter.data_ptr(),
                parameter._version,
                parameter.dtype,
                parameter.shape,
                parameter.stride(),
            )
            for parameter in adapters.parameters
        ],
    )


def _is_capturing(weight: torch.Tensor) -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def refresh_adapters(model: nn.Module) -> int:
    """Pack the kept copies of a model's unmerged adapters again, in place, and make those that are missing.

    Calls that nobody differentiates read packed copies of the adapters, and see by themselves when torch has changed a
    parameter. This is for those changes that nobody can see, and for CUDA graphs, whose replays read the copies as they
    are:

    - after writes through ``.data`` or by other libraries' kernels; PEFT's ``hotswap_adapter`` writes so;
    - after a step of the optimizer, before a captured inference is replayed;
    - after the replay of a captured step, before an inference, captured or not;
    - before a capture, so that the graph reads the copies and does not pack by itself.

    It runs on the current stream of each adapter's device. Copies are kept by the set of adapters that were active
    together, and all of them are packed.

    Args:
        model: a module with PEFT's adapters on experts' parameters, after
            :func:`cupymoe.integrations.peft.use_low_rank`.

    Returns:
        How many copies there are: one for each adapted weight, and for each set of adapters that was active in it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no such adapters.
        RuntimeError: a CUDA graph is being captured.
    """
    check_module("model", model)
    integration = sys.modules.get("cupymoe.integrations.peft")
    wrappers = [] if integration is None else integration.low_rank_wrappers(model)
    if not wrappers:
        raise ValueError(
            f"model must have adapters that are computed unmerged, and {type(model).__name__} has none: call "
            "cupymoe.integrations.peft.use_low_rank(model) first"
        )
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "refresh_adapters must be called before a CUDA graph is captured, or between its replays: during the "
            "capture nothing runs, and each replay would make the copies again"
        )
    count: int = sum(wrapper.refresh_copies() for wrapper in wrappers)
    return count
