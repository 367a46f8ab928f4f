"""Shared by every test: what runs without a GPU, and one seed, printed."""

import os

import pytest
import torch

from cupymoe import calls
from cupymoe.ops import experts as experts_ops

SEED = int(os.environ.get("CUPYMOE_TEST_SEED", "0"))


def pytest_report_header():
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"cupymoe: CUPYMOE_TEST_SEED={SEED}, torch {torch.__version__}, {device}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(SEED)


@pytest.fixture
def mesh():
    """A device mesh of this process alone, for DTensors."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """For tests that hold on every device."""
    return torch.device(request.param)


@pytest.fixture
def gate_up_kept_on_the_cpu_too(monkeypatch):
    """As it is on CUDA in bfloat16, in which such tests compute there."""
    keeps_on_cuda = calls._may_keep_gate_up

    def keeps(keep, backend, hidden_states, *others):
        if hidden_states.is_cuda:
            return keeps_on_cuda(keep, backend, hidden_states, *others)
        tensors = (hidden_states, *others)
        return keep == "gate_up" and any(tensor is not None and tensor.requires_grad for tensor in tensors)

    monkeypatch.setattr(calls, "_may_keep_gate_up", keeps)
    monkeypatch.setattr(calls.ops, "keeps_gate_up", lambda *_: True)


@pytest.fixture
def computed(monkeypatch):
    """Directions in which a backend has computed experts, in order."""
    directions, select = [], experts_ops.select

    def spy(name, call, direction="forward"):
        directions.append(direction)
        return select(name, call, direction)

    monkeypatch.setattr(experts_ops, "select", spy)
    return directions
