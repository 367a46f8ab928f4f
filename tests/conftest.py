"""Shared by every test: what runs without a GPU, and one seed, printed."""

import os

import pytest
import torch

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
