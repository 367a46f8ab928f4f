"""What a training loop chooses for a model: what its experts keep, what is recomputed, how gradients add up."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.hooks import RemovableHandle

from cupymoe.checks.settings import check_keep, check_module
from cupymoe.experts import MoEExperts
from cupymoe.integrations import KEEP, are_experts_set_to_cupymoe


def set_keep(model: nn.Module, keep: str) -> int:
    """Let every call of a model's experts keep this for its gradients, from now on.

    Experts of transformers have no argument ``keep``, so this is how to choose it for them, with PEFT's adapters around
    them or without; :class:`MoEExperts` in the model are set too. The choice goes with the modules where they are
    copied or pickled, and not into a saved checkpoint.

    Args:
        model: a module that holds ``Gemma4Experts``, ``MoEExperts``, or transformers' experts with
            ``experts_implementation="cupymoe"``.
        keep: ``"gate_up"`` or ``"input"``; see :func:`cupymoe.fused_experts`.

    Returns:
        How many experts modules there are.

    Raises:
        TypeError, ValueError: ``model`` is no module or holds no such experts, or ``keep`` is another; nothing was
            changed then.
    """
    check_module("model", model)
    check_keep(keep)
    ours = [module for module in model.modules() if isinstance(module, MoEExperts)]
    theirs = [module for module in model.modules() if are_experts_set_to_cupymoe(module)]
    if not ours and not theirs:
        raise ValueError(
            "model must hold a Gemma4Experts, a MoEExperts or experts set to cupymoe "
            f'(experts_implementation="cupymoe"); {type(model).__name__} holds none'
        )
    for experts in ours:
        experts.keep = keep
    for module in theirs:
        setattr(module, KEEP, keep)
    return len(ours) + len(theirs)


def selective_checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint`` that recomputes everything but the experts.

    What the experts return is saved, with what their calls keep: the output, and with ``keep="gate_up"`` what the
    activation is applied to. The rest of the checkpointed function, their inputs and the routing among it, is computed
    again::

        checkpoint(layer, hidden_states, use_reentrant=False, context_fn=cupymoe.selective_checkpoint_contexts)

    Torch allows such a region one backward, also with ``retain_graph=True``. Whoever saves other ops too lists them
    beside ``torch.ops.cupymoe.fused_experts_keeping.default`` and ``torch.ops.cupymoe.fused_experts.default`` for
    torch's ``create_selective_checkpoint_contexts``.
    """
    ops = [torch.ops.cupymoe.fused_experts_keeping.default, torch.ops.cupymoe.fused_experts.default]
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(ops)
    return contexts


def accumulate_in_float32(module: nn.Module) -> list[RemovableHandle]:
    """Add the gradients of a module's parameters up in float32, in ``parameter.main_grad``.

    For sums over many backward passes, in which bfloat16's 8 bits would lose the small ones. Each parameter that
    requires a gradient now has a ``main_grad``, None until its first gradient and then a tensor of its shape: float32,
    or float64 of a parameter in float64. A backward pass adds to it and leaves ``grad`` None. It is never emptied here:
    zero it, or set it to None, after each step of the optimizer, which ``optimizer.zero_grad()`` does not do.

    Args:
        module: a whole model, or its experts alone.

    Returns:
        What takes the hooks away again: call ``remove()`` of each.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: none of its parameters requires a gradient.
    """
    check_module("module", module)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"module must have a parameter that requires a gradient; {type(module).__name__} has none")
    for parameter in parameters:
        parameter.main_grad = getattr(parameter, "main_grad", None)  # type: ignore[attr-defined]
    return [parameter.register_post_accumulate_grad_hook(_add_to_main_grad) for parameter in parameters]


@torch.no_grad()
def _add_to_main_grad(parameter: Any) -> None:
    grad, parameter.grad = parameter.grad, None
    if grad is None:  # the hook of an earlier call has taken it
        return
    if parameter.main_grad is None:
        parameter.main_grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    else:
        parameter.main_grad += grad
