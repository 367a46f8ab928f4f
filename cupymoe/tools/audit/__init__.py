"""``cupymoe audit``: which function an implementation of the experts computes, found from outside by chosen inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from cupymoe.tools.audit import probes
from cupymoe.tools.audit.measured import NUM_EXPERTS, Finding, Subject, candidate_name, random_case
from cupymoe.tools.audit.targets import FORMS, Target, TargetError, resolve

__all__ = ["FORMS", "Finding", "Subject", "Target", "TargetError", "audit", "prepare", "resolve", "verdict"]


def prepare(name: str, activation: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Subject:
    """The target, run once on random inputs to see that it can.

    Args:
        name: one of :data:`FORMS`.
        activation: what the model's config asks for, in its spelling.
        dtype: of hidden states and weights.
        device: where to run.
        seed: of the random inputs.

    Raises:
        TargetError: the target can't be found or run; the message says why.
        ValueError: no gated activation has that name.
    """
    subject = Subject(resolve(name, activation), candidate_name(activation), dtype, device, seed)
    case, _ = random_case(subject)
    try:
        subject.run(case)
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"{name} can't run here: {type(error).__name__}: {error}") from error
    return subject


def audit(subject: Subject) -> Iterator[Finding]:
    """Every property, one after the other. Masked ids come last: on CUDA they may end in a device-side assertion."""
    if subject.target.asked is not None:
        yield probes.asked(subject, subject.target.asked)
    order = _guarded("gate order", functools.partial(probes.gate_order, subject))
    yield order
    layout, found = order.measured.get("layout"), None
    if layout is not None:
        run = functools.partial(probes.activation, subject, layout, order.value != "ungated")
        activation = _guarded("activation", run)
        found = activation.measured.get("found")
        yield activation
        yield _guarded("routing weights", functools.partial(probes.routing_weights, subject, layout))
    yield _guarded("rounding", functools.partial(probes.rounding, subject, found, layout))
    yield _guarded("determinism", functools.partial(probes.determinism, subject))
    yield _guarded("batch invariance", functools.partial(probes.batch_invariance, subject))
    for sentinel in (NUM_EXPERTS, -1):
        yield _guarded(f"masked id {sentinel}", functools.partial(probes.masked_ids, subject, sentinel))


def _guarded(name: str, probe: Callable[[], Finding]) -> Finding:
    """A probe whose inputs the target refuses, or at which it wants to leave the process, is a finding too."""
    try:
        return probe()
    except (Exception, SystemExit) as error:
        return Finding(name, "not measured", "unclear", f"the target raised {type(error).__name__}: {error}")


def verdict(findings: list[Finding]) -> str:
    """``"contradicts"`` if one finding does, ``"unclear"`` if one could not be told, else ``"agrees"``."""
    statuses = {finding.status for finding in findings}
    return next((status for status in ("contradicts", "unclear") if status in statuses), "agrees")
