"""The torch ops behind the public functions: ``torch.ops.cupymoe.*``, with fake implementations and gradients.

One module a family, in which forward, fake, setup and backward of an op stand together. The ops trust their arguments,
which :mod:`cupymoe.functional` and :mod:`cupymoe.calls` check. Outputs are contiguous, whatever the strides of the
inputs, because the fake implementations promise it; only the gradients of weights and of adapters' factors are laid out
as these are.
"""

from cupymoe.ops import activation, batched, experts, routing
from cupymoe.ops.experts import experts_call, keeps_gate_up
from cupymoe.ops.register import dispatch

__all__ = ["activation", "batched", "dispatch", "experts", "experts_call", "keeps_gate_up", "routing"]
