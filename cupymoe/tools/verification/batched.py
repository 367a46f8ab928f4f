"""Batches of the experts against float64, and that rows which don't count are neither read nor written."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cupymoe import reference
from cupymoe.backends import BatchTensors
from cupymoe.functional import batched_experts
from cupymoe.tools.verification.experts import bound
from cupymoe.tools.verification.result import Result, Setting, relative_error

_ROOMS, _ROOMS_ON_GPU = (8,), (8, 128, 256)  # rows of an expert: on a Hopper card the weight stream, and each cut
_ORACLE_ROWS = 1024


def checks(setting: Setting) -> Iterator[Result]:
    """Of plain weights, with counts from none to all."""
    for room in _ROOMS_ON_GPU if setting.on_gpu else _ROOMS:
        yield _against_float64(setting, room)


def _against_float64(setting: Setting, room: int) -> Result:
    config, generator, device = setting.config, setting.generator(), setting.device
    shape = (config.num_experts, room, config.hidden_size)
    states = torch.randn(shape, dtype=setting.dtype, device=device, generator=generator)
    counts = torch.randint(room + 1, shape[:1], device=device, generator=generator, dtype=torch.int32)
    gate_up, down = setting.weights
    assert isinstance(gate_up, torch.Tensor)
    assert isinstance(down, torch.Tensor)
    batch = BatchTensors(states, counts, gate_up, down)
    counted = batch.counted
    states[~counted] = torch.nan
    out = torch.zeros_like(states)
    batched_experts(states, counts, *setting.weights, activation=config.activation, out=out)
    rows, _, _, index, weights, *_ = batch.as_routed()
    places = counted.flatten().nonzero().flatten()
    places = places[torch.randperm(len(places), device=device, generator=generator)[:_ORACLE_ROWS]]
    truth = reference.experts(
        rows[places].double(), gate_up, down, index[places], weights[places].double(), config.activation
    )
    error = relative_error(out.flatten(0, 1)[places], truth)
    untouched = not out[~counted].any()
    return Result.of(
        f"a batch with room for {room} rows of each expert against float64",
        error <= bound(setting.dtype) and untouched,
        f"relative error {error:.5f} of {bound(setting.dtype):.5f}"
        + ("" if untouched else "; rows that don't count were written"),
    )
