"""The audit runs on the CPU, also where there is a GPU."""

import pytest
import torch


@pytest.fixture
def _cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
