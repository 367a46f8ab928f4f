"""FLOPs of the ops for ``torch.utils.flop_counter.FlopCounterMode``, which counts an op without a formula as none.

Counted are the products of matrices, two FLOPs for a multiplication and addition, as torch's own formulas do. A formula
sees shapes alone, so masked (token, k) pairs count as every other, and so does every pair of ``[T, K]`` indices, and
every row of a batch. A backward counts the products that the wanted gradients need, and not what an op computes a
second time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, NamedTuple

import torch

from cupymoe.ops.activation import member_of

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


class _Projection(NamedTuple):
    """``rows @ weight[e].T``, with an adapter or without."""

    rows: int
    weight: Shape
    """``[E, out, in]``"""
    a: Shape | None = None
    """``[E, r, in]``; b is ``[E, out, r]``."""

    def forward(self) -> int:
        _, out_size, in_size = self.weight
        return 2 * self.rows * (out_size * in_size + self._rank * (out_size + in_size))

    def backward(self, of_rows: bool, of_weight: bool, of_a: bool = False, of_b: bool = False) -> int:
        """Of the gradients that are wanted. Those of the rows and of a share a product with b."""
        _, out_size, in_size = self.weight
        dense = (of_rows + of_weight) * out_size * in_size
        low_rank = ((of_rows or of_a) + of_b) * out_size + (of_rows + of_a) * in_size
        return 2 * self.rows * (dense + self._rank * low_rank)

    @property
    def _rank(self) -> int:
        return 0 if self.a is None else self.a[1]


def _router_logits(hidden_states: Shape, scale: Shape, projection: Shape, *_: Any, **__: Any) -> int:
    return _Projection(hidden_states[0], (1, *projection)).forward()


def _router_logits_backward(
    grad: Shape, hidden_states: Shape, scale: Shape, projection: Shape, *_: Any, **__: Any
) -> int:
    return _Projection(hidden_states[0], (1, *projection)).backward(True, True)


def _projections(arguments: Sequence[Any]) -> tuple[_Projection, _Projection]:
    """Of the forward's arguments. The sizes are not those of the weights, which may be packed codes."""
    hidden_states, gate_up_proj, _, index, _, gate_up_a, _, down_a, *others = arguments
    return _projections_of(index[0] * index[1], hidden_states[1], gate_up_proj, others, gate_up_a, down_a)


def _projections_of(
    rows: int,
    hidden_size: int,
    gate_up_proj: Shape,
    others: Sequence[Any],
    gate_up_a: Shape | None = None,
    down_a: Shape | None = None,
) -> tuple[_Projection, _Projection]:
    """Of an op whose first string is the activation."""
    num_experts, width, _ = gate_up_proj
    activation = member_of(next(each for each in others if isinstance(each, str)))
    return (
        _Projection(rows, (num_experts, width, hidden_size), gate_up_a),
        _Projection(rows, (num_experts, hidden_size, activation.output_size(width)), down_a),
    )


def _fused_experts(*arguments: Any, **_: Any) -> int:
    return sum(projection.forward() for projection in _projections(arguments))


def _batched_experts(
    hidden_states: Shape, expert_num_tokens: Shape, gate_up_proj: Shape, *others: Any, **_: Any
) -> int:
    num_experts, max_tokens, hidden_size = hidden_states
    projections = _projections_of(num_experts * max_tokens, hidden_size, gate_up_proj, others)
    return sum(projection.forward() for projection in projections)


def _fused_experts_backward(grad: Shape, *arguments: Any, **__: Any) -> int:
    """Of the forward's tensors and settings, and last of which tensors need a gradient."""
    hidden, of_gate_up, of_down, _, of_up_a, of_up_b, of_down_a, of_down_b, of_up_bias, _ = arguments[-1]
    up, down = _projections(arguments)
    behind_down = hidden or of_gate_up or of_up_a or of_up_b or of_up_bias
    return up.backward(hidden, of_gate_up, of_up_a, of_up_b) + down.backward(behind_down, of_down, of_down_a, of_down_b)


FORMULAS: dict[str, Callable[..., int]] = {
    "router_logits": _router_logits,
    "router_logits_backward": _router_logits_backward,
    "fused_experts": _fused_experts,
    "fused_experts_keeping": _fused_experts,
    "fused_experts_out": _fused_experts,
    "fused_experts_backward": _fused_experts_backward,
    "batched_experts": _batched_experts,
    "batched_experts_out": _batched_experts,
}
"""By op, from the shapes of its arguments. The ops without one multiply no matrices."""


def _register_at(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.cupymoe, name))(formula)


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register_at(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == COUNTER else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def register_when_imported() -> None:
    """Register the formulas with torch's counter, when somebody imports it.

    Not before: its import takes triton's with it, a tenth of the time that ``import cupymoe`` takes, and logs a warning
    where triton is not installed.
    """
    if COUNTER in sys.modules:
        _register_at(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
