"""The registry of backends: who can compute the experts and their gradients, and who takes a call.

A backend says of every call, and of either direction of it, whether it serves it. ``"auto"`` takes the first that does;
a named one that can't raises with its reason. Nothing falls back to another formula.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch

from cupymoe.activation import MoEActivation
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.load import Load
from cupymoe.reference import work_dtype
from cupymoe.weights.format import PLAIN

_log = logging.getLogger("cupymoe")

Direction = Literal["forward", "backward"]
"""Of a call: its output, or the gradients of its tensors."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

NUMERICS = ("fast", "invariant")
"""What a caller may ask of the bits of an output: see :func:`cupymoe.fused_experts`."""
INVARIANT = "invariant"


class ExpertsCall(NamedTuple):
    """What a backend may know of a call before it runs."""

    device: torch.device
    dtype: torch.dtype
    activation: MoEActivation
    num_tokens: int
    top_k: int
    num_experts: int
    """How many experts' weights are here."""
    hidden_size: int
    intermediate_size: int
    aligned_hidden_states: bool
    """Whether hidden_states, and the output's memory where the caller gave it, start on 16 bytes."""
    aligned_weights: bool
    """Whether both weights start on 16 bytes; of quantised ones, codes and scales."""
    adapter_rank: int = 0
    """The largest rank of a weight's low-rank adapter, as it is padded; 0: no weight has one."""
    gate_up_scaling: float = 1.0
    """What the adapter of ``gate_up_proj`` is multiplied with."""
    down_scaling: float = 1.0
    """The same of ``down_proj``."""
    global_num_experts: int | None = None
    """How many experts ``top_k_index`` chooses from; None: those that are here."""
    gate_up_transposed: bool = False
    """Whether ``gate_up_proj`` is the ``transpose(1, 2)`` of a contiguous tensor, instead of contiguous itself."""
    down_transposed: bool = False
    """The same of ``down_proj``."""
    has_bias: bool = False
    """Whether either projection has a bias."""
    weight_format: str = PLAIN
    """``"plain"``, or where a weight is quantised both formats: ``"int4_g32,int4_g32"``, ``"fp8_g128,plain"``."""
    numerics: str = "fast"
    """One of :data:`NUMERICS`."""

    @property
    def load(self) -> Load:
        """How much work it is."""
        return Load.of(self.num_tokens, self.top_k, self.num_experts, self.global_num_experts)

    def is_invariant(self, direction: Direction = "forward") -> bool:
        """Whether the bits of a token may depend on nothing but the token, its experts and their weights. Gradients of
        weights are sums over tokens, and are never asked for so."""
        return self.numerics == INVARIANT and direction == "forward"


class ExpertsTensors(NamedTuple):
    """The tensors of a call that are computed with, checked and contiguous; a weight may instead be the
    ``transpose(1, 2)`` of a contiguous tensor."""

    hidden_states: torch.Tensor
    """``[T, H]``"""
    gate_up_proj: torch.Tensor
    """``[E, 2I, H]``, or ``[E, I, H]`` for an ungated activation."""
    down_proj: torch.Tensor
    """``[E, H, I]``"""
    top_k_index: torch.Tensor
    """``[T, K]`` int32 or int64; at least one pair. Of the experts that are here, or with ``expert_map`` of all."""
    top_k_weights: torch.Tensor
    """``[T, K]`` float32, float64 where ``hidden_states`` is."""
    gate_up_a: torch.Tensor | None = None
    """``[E, r, H]``: the adapter adds ``scaling * b @ a`` to ``gate_up_proj``. Factors are as they were given: of any
    strides, of the weight's dtype or of float32."""
    gate_up_b: torch.Tensor | None = None
    """``[E, 2I, r]``"""
    down_a: torch.Tensor | None = None
    """``[E, r, I]``"""
    down_b: torch.Tensor | None = None
    """``[E, H, r]``"""
    gate_up_bias: torch.Tensor | None = None
    """``[E, 2I]``, or ``[E, I]`` for an ungated activation: added before the activation."""
    down_bias: torch.Tensor | None = None
    """``[E, H]``: added to an expert's output before that is weighted."""
    gate_up_scales: torch.Tensor | None = None
    """Of a quantised ``gate_up_proj``, which is its codes then: the buffers of :class:`cupymoe.QuantizedWeight`."""
    gate_up_zeros: torch.Tensor | None = None
    gate_up_row_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None
    """The same of ``down_proj``."""
    down_zeros: torch.Tensor | None = None
    down_row_scales: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    """``[global experts]`` int32 or int64: what each expert that ``top_k_index`` chooses from is here; one outside of
    ``[0, E)`` is not here. None: it is itself."""


class BatchTensors(NamedTuple):
    """The tensors of a batch of the experts, checked and contiguous but for weights, as :class:`ExpertsTensors`."""

    hidden_states: torch.Tensor
    """``[E, max_tokens, H]``, at least one row: the rows of each expert, of which the first ones count."""
    expert_num_tokens: torch.Tensor
    """``[E]`` int32: how many of them; none where negative, all where more than there are."""
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_scales: torch.Tensor | None = None
    gate_up_zeros: torch.Tensor | None = None
    gate_up_row_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None
    down_zeros: torch.Tensor | None = None
    down_row_scales: torch.Tensor | None = None

    @property
    def max_tokens(self) -> int:
        """Rows of an expert, those that don't count too."""
        return self.hidden_states.shape[1]

    @property
    def rows(self) -> torch.Tensor:
        """``[E * max_tokens, H]``"""
        return self.hidden_states.flatten(0, 1)

    @property
    def counted(self) -> torch.Tensor:
        """``[E, max_tokens]`` bool: which rows count."""
        places = torch.arange(self.max_tokens, device=self.expert_num_tokens.device)
        return places < self.expert_num_tokens.unsqueeze(1)

    def as_routed(self) -> ExpertsTensors:
        """The same as rows that each chose one expert, with a weight of one; those that don't count are masked."""
        experts = torch.arange(len(self.expert_num_tokens), device=self.expert_num_tokens.device)
        index = torch.where(self.counted, experts.unsqueeze(1), -1).view(-1, 1)
        weights = torch.ones(index.shape, dtype=work_dtype(self.hidden_states.dtype), device=index.device)
        of_weights = dict(zip(self._fields[4:], self[4:], strict=True))
        return ExpertsTensors(self.rows, self.gate_up_proj, self.down_proj, index, weights, **of_weights)


class Kept(NamedTuple):
    """What a forward keeps for the gradients, beside its tensors: rows by expert, and those of an expert by token and
    k, in the dtype of ``hidden_states``. Rows past the last kept pair are undefined."""

    gate_up: torch.Tensor
    """``[T * K, 2I]``, or ``[T * K, I]`` for an ungated activation: what the activation is applied to."""
    gate_up_low: torch.Tensor | None = None
    """``[T * K, R]``, where ``gate_up_proj`` has an adapter: its input times the transposed ``a``. R is
    :func:`cupymoe.lora.padded_rank`."""
    down_low: torch.Tensor | None = None
    """The same of ``down_proj``."""


_OF_QUANTISED = tuple(name for name in ExpertsTensors._fields if name.endswith(("_scales", "_zeros")))
DIFFERENTIABLE = tuple(
    name for name in ExpertsTensors._fields if name not in ("top_k_index", "expert_map", *_OF_QUANTISED)
)
"""Names of the tensors that have a gradient, in their order."""


class Backend(Protocol):
    """One way to compute the experts."""

    name: str
    is_slow: bool
    """Whether ``"auto"`` says so when it has to take this one on a CUDA device: see :mod:`cupymoe.backends.slow`."""

    uses_gate_up: bool
    """Whether its gradients are computed from what a forward keeps, and not from the arguments alone."""

    def unsupported_reason(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """Why this backend can't serve a direction of the call; None if it can."""

    def faster(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """Name of a later backend that ``"auto"`` takes instead, where both serve the call; None: none is known."""

    def way(self, call: ExpertsCall, direction: Direction = "forward") -> str:
        """How it computes a direction of a call that it serves, in a few words for a reader."""

    def forward(self, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[T, H]`` in the dtype of ``hidden_states``; in ``out``, which is contiguous, where that is given."""

    def forward_batch(
        self, call: ExpertsCall, batch: BatchTensors, output: torch.Tensor, *, keeps_others: bool
    ) -> None:
        """Write the rows that count of ``output``, ``[E, max_tokens, H]``, contiguous and 16-byte aligned.

        Args:
            call: as of rows that each chose one expert, which it serves.
            batch: what is computed.
            output: where it goes.
            keeps_others: whether its other rows must stay as they are.
        """

    def forward_keeping(self, call: ExpertsCall, tensors: ExpertsTensors) -> tuple[torch.Tensor, Kept]:
        """The output of :meth:`forward`, the same bits, and what the gradients are computed from."""

    def backward(
        self,
        call: ExpertsCall,
        tensors: ExpertsTensors,
        kept: Kept | None,
        grad: torch.Tensor,
        needed: Sequence[bool],
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients with respect to :data:`DIFFERENTIABLE`, from that of the output, ``[T, H]``; None where not
        ``needed``, and then not computed. A weight's gradient is laid out as the weight; that of an adapter's factor
        may have any layout and dtype; the others are contiguous.

        Args:
            kept: what :meth:`forward_keeping` gave, of whichever backend; None: it is computed again.
        """


def ampere_reason(call: ExpertsCall) -> str | None:
    """Why the device of a call is none of Ampere's architecture or a newer one; None if it is."""
    if call.device.type != "cuda":
        return f"it runs on CUDA devices of compute capability 8.0 or newer, not on {call.device.type}"
    major, minor = Arch.of(call.device).capability
    if major < 8:
        return (
            "it needs compute capability 8.0 or newer, which began bfloat16 products and copies to shared memory past "
            f"the registers; this device has {major}.{minor}"
        )
    return None


def row_packs_reason(call: ExpertsCall) -> str | None:
    """Why rows can't be moved 16 bytes at a time; None if they can.

    Rows of hidden states and intermediates are H and I elements, those of weights H or I, or where they are transposed
    2I (I if ungated) or H: multiples of 8 wherever H and I are.
    """
    if call.hidden_size % 8 == 0 and call.intermediate_size % 8 == 0:
        return None
    return (
        "rows must be whole 16-byte packs: hidden and intermediate size multiples of 8, not "
        f"{call.hidden_size} and {call.intermediate_size}"
    )


@functools.cache
def registry() -> dict[str, Backend]:
    """Every backend by name, in the order in which ``"auto"`` asks them."""
    from cupymoe.backends.fused import FusedBackend
    from cupymoe.backends.grouped import GroupedBackend
    from cupymoe.backends.reference import ReferenceBackend
    from cupymoe.backends.simt import SimtBackend

    backends: tuple[Backend, ...] = (FusedBackend(), GroupedBackend(), SimtBackend(), ReferenceBackend())
    return {backend.name: backend for backend in backends}


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: ``name`` is neither ``"auto"`` nor a backend's.
    """
    if name != "auto" and name not in [*registry()]:  # a list: what was given may have no hash
        raise ValueError(f"backend must be one of {['auto', *registry()]}, got {name!r}")


def serving(call: ExpertsCall, direction: Direction = "forward") -> Backend:
    """The first backend that serves a direction of a call, or one that is faster; the last one serves every call.

    Where the bits of a token may not depend on the others, whoever serves one token is asked for any number of them.
    """
    if call.is_invariant(direction):
        call = call._replace(num_tokens=1)
    first = next(backend for backend in registry().values() if backend.unsupported_reason(call, direction) is None)
    faster = registry().get(first.faster(call, direction) or "")
    return first if faster is None or faster.unsupported_reason(call, direction) is not None else faster


@functools.lru_cache(maxsize=4096)
def gradients_use_gate_up(name: str, call: ExpertsCall) -> bool:
    """Whether the gradients of a call, of which ``name`` was asked for, are computed from what its forward keeps."""
    named = registry().get(name)
    if named is None or named.unsupported_reason(call, "backward") is not None:
        named = serving(call, "backward")
    return named.uses_gate_up


@functools.lru_cache(maxsize=4096)
def select(name: str, call: ExpertsCall, direction: Direction = "forward") -> Backend:
    """The backend that a direction of a call is computed by.

    A named one that computes outputs and not gradients leaves these to the first that does. Where only a slow
    backend serves the call on a CUDA device, and it was not named, this says so.

    Raises:
        ValueError: the named backend is unknown or does not serve the call; the message says why. Or numerics are
            invariant, and the backend that serves a single token does not serve so many. Or ``CUPYMOE_ON_SLOW`` is set
            to something unknown.
        RuntimeError: ``CUPYMOE_ON_SLOW`` is ``error`` and only a slow backend serves the call.
    """
    from cupymoe.backends import slow

    check_name(name)
    if name != "auto":
        reason = registry()[name].unsupported_reason(call, direction)
        if reason is None:
            return _logged(registry()[name], call, direction)
        if direction == "forward":
            raise ValueError(f"backend {name!r} does not serve this call: {reason}")
    chosen = serving(call, direction)
    if call.is_invariant(direction) and (reason := chosen.unsupported_reason(call)) is not None:
        raise ValueError(
            f"numerics='invariant' takes backend {chosen.name!r} for these experts, whatever the number of tokens, and "
            f"it does not serve {call.num_tokens} of them: {reason}"
        )
    slow.check(call, chosen, direction)
    return _logged(chosen, call, direction)


def of_format(call: ExpertsCall) -> str:
    """What a message adds to a call's dtype where its weights are quantised."""
    return "" if call.weight_format == PLAIN else f" with {call.weight_format} weights"


@functools.cache
def _warn_that_it_was_never_run(capability: tuple[int, int]) -> None:
    _log.warning(
        "cupymoe's kernels have never been run on a card of compute capability %d.%d, only compiled for it: "
        "`cupymoe verify` checks them here, and its output is welcome as an issue",
        *capability,
    )


def _logged(chosen: Backend, call: ExpertsCall, direction: Direction) -> Backend:
    if call.device.type == "cuda" and chosen.name != "reference" and (arch := Arch.of(call.device)) != HOPPER:
        _warn_that_it_was_never_run(arch.capability)
    _log.info(
        "%s of %d tokens over %d experts [%d, %d] in %s%s on %s: %s (%s)",
        direction,
        call.num_tokens,
        call.num_experts,
        call.hidden_size,
        call.intermediate_size,
        call.dtype,
        of_format(call),
        call.device,
        chosen.name,
        chosen.way(call, direction),
    )
    return chosen
