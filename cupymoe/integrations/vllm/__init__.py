"""cupymoe as the experts of vLLM 0.23 and newer: the entry point that vLLM calls in each of its processes.

An installed package must not change a served model unasked, so :func:`register` does nothing unless ``CUPYMOE_VLLM`` is
1. Then vLLM makes our methods wherever it would make its ``UnquantizedFusedMoEMethod``, or one of compressed-tensors'
or ``fp8`` for experts, and each layer is computed by cupymoe or, if there is a reason against it, by whatever vLLM
would take; the log says which and why (docs/vllm.md).

- :mod:`.activations`: which activation a layer of vLLM means;
- :mod:`.served`: which layers are taken, and what the log says of them;
- :mod:`.experts`: vLLM's classes of experts;
- :mod:`.unquantized`: the method of plain weights, which stay as vLLM loads them;
- :mod:`.stored`: quantised weights as vLLM loads them, and as codes;
- :mod:`.quantized`: the method of quantised weights, and how vLLM comes to make it;
- :mod:`.warming`: kernels are there before vLLM captures.

Of these ``experts``, ``unquantized`` and ``quantized`` import vLLM, and nothing imports them before :func:`register`.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import version

from cupymoe.integrations.vllm.served import ENVIRONMENT, LOGGER, takes_fp8, variable


def register() -> None:
    """Let vLLM compute its experts with cupymoe, if ``CUPYMOE_VLLM`` is 1. A second call changes nothing.

    Raises:
        ValueError: ``CUPYMOE_VLLM`` or ``CUPYMOE_VLLM_FP8`` is neither 0 nor 1.
        RuntimeError: vLLM is older than 0.23 or has changed what this relies on, or another plug-in has replaced the
            same class.
    """
    if variable(ENVIRONMENT):
        takes_fp8()  # a bad value is refused now, not with the first layer
        _register()


@functools.cache
def _register() -> None:
    try:
        from cupymoe.integrations.vllm import quantized, unquantized
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{ENVIRONMENT}=1 needs vLLM 0.23 or newer, with experts that work as 0.33's, got {version('vllm')}: "
            f"{error}"
        ) from error
    if replaced := {**unquantized.replaced(), **quantized.replaced()}:
        name, theirs = replaced.popitem()
        raise RuntimeError(
            f"{ENVIRONMENT}=1 can't serve vLLM's {name}, which another plug-in has replaced by "
            f"{theirs.__name__}: let VLLM_PLUGINS name only one of the two"
        )
    unquantized.register()
    quantized.register()
    logging.getLogger(LOGGER).info(
        "cupymoe computes vLLM's experts, plain or quantised by compressed-tensors or fp8, where it serves them (%s=1)",
        ENVIRONMENT,
    )
