"""The torch ops behind the public functions: ``torch.ops.cupymoe.*``, with fake implementations and gradients.

One module a family, in which forward, fake, setup and backward of an op stand together. The ops trust their arguments;
:mod:`cupymoe.functional` checks them. Outputs are contiguous, whatever the strides of the inputs, because the fake
implementations promise it; only the gradient of a weight that is not contiguous is laid out as the weight.
"""

from cupymoe.ops import activation, experts, routing
from cupymoe.ops.experts import experts_call
from cupymoe.ops.register import dispatch

__all__ = ["activation", "dispatch", "experts", "experts_call", "routing"]
