"""What is known of an architecture: of those that are listed, of those that are not, and in the sources."""

import pytest
import torch

from cupymoe.kernels.arch import ARCHITECTURES, HOPPER, Arch


@pytest.fixture
def arch_of(monkeypatch):
    """Arch.of a device of some compute capability."""

    def arch_of(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return Arch.of(0)

    return arch_of


# name, capability, KB of shared memory of a block, and whether it is as Hopper is but for wgmma
EXPECTED = [
    ("sm_75", (7, 5), 48, False),
    ("sm_80", (8, 0), 163, False),
    ("sm_86", (8, 6), 99, False),
    ("sm_87", (8, 7), 99, False),
    ("sm_89", (8, 9), 99, False),
    ("sm_90a", (9, 0), 227, True),
    ("sm_91", (9, 1), 227, True),
    ("sm_100", (10, 0), 227, True),
    ("sm_103", (10, 3), 227, True),
    ("sm_120", (12, 0), 99, True),
    ("sm_121", (12, 1), 99, True),
]


@pytest.mark.parametrize(("name", "capability", "kilobytes", "newer"), EXPECTED)
def test_every_capability_has_an_architecture(arch_of, name, capability, kilobytes, newer):
    assert arch_of(capability) == Arch(name, capability, kilobytes * 1024, newer, newer, newer, capability == (9, 0))


def test_every_architecture_is_found_and_expected(arch_of):
    for arch in ARCHITECTURES:
        assert arch_of(arch.capability) is arch
        assert (arch.name, arch.capability) in [row[:2] for row in EXPECTED]
    assert [*ARCHITECTURES] == sorted(ARCHITECTURES, key=lambda arch: arch.capability)
    assert HOPPER in ARCHITECTURES


@pytest.mark.parametrize("device", [1, torch.device("cuda", 1), torch.device("cuda")])
def test_the_device_that_is_asked_for(monkeypatch, device):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    assert Arch.of(device) is HOPPER
    assert asked == [device]


def test_a_device_without_index_is_the_current_one(monkeypatch):
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, its=capability: its)
        assert Arch.of(torch.device("cuda")).capability == capability


@pytest.mark.gpu
def test_the_current_device_s_architecture_is_listed():
    assert Arch.of(torch.cuda.current_device()) in ARCHITECTURES


@pytest.mark.gpu
def test_a_block_may_have_as_much_shared_memory():
    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    assert Arch.of(device).shared_bytes_of_block == properties.shared_memory_per_block_optin
