"""What the architecture of a GPU lets a kernel do; ``cuda_src/common/arch.cuh`` tells the sources the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

RESERVED_BYTES = 1024
"""Of shared memory, which the system takes of each block on every architecture listed here."""
_GRAIN_BYTES = 128
"""Shared memory is given to blocks in multiples of this."""


@dataclass(frozen=True)
class Arch:
    """One architecture of NVIDIA's GPUs."""

    name: str
    """What NVRTC calls it: ``sm_`` makes machine code, ``compute_`` PTX, which the driver compiles for its card."""
    capability: tuple[int, int]
    """Its compute capability."""
    shared_bytes_of_block: int
    """The most shared memory that a block may have (CUDA C++ Programming Guide, "Technical Specifications")."""
    shared_bytes_of_multiprocessor: int
    """The shared memory of a multiprocessor; each block there takes :data:`RESERVED_BYTES` of it beside its own."""
    dependent_launch: bool
    """Whether a grid may start before the one before it has ended (programmatic dependent launch)."""
    bulk_copies: bool
    """Whether a copy engine moves whole rows, and boxes of a tensor, between global and shared memory."""
    clusters: bool
    """Whether blocks form clusters, in which they reach into each other's shared memory."""
    wgmma: bool
    """Whether a warpgroup multiplies tiles that lie in shared memory, by the instructions of sm_90a."""

    def __hash__(self) -> int:
        return hash(self.name)  # every call looks its regime up by this; a name has its hash at hand

    @property
    def is_build(self) -> bool:
        """Whether it stands for cards that are not here, as those of :data:`BUILDS` do."""
        return self.name.startswith("compute_")

    def shared_bytes_on(self, card: Arch, static_bytes: int, dynamic_bytes: int) -> int:
        """Dynamic shared memory for a launch on another card, so that as many blocks, of one kernel or of several, fit
        its multiprocessors as would fit this architecture's.

        A block's share of a multiprocessor stays what it was: with 99 KB it is alone on one of 100 KB, and so on
        Hopper's 228 KB, which would have room for two. What it asks for beyond ``dynamic_bytes`` is not used. Sizes are
        rounded down, so that what fits here fits there; what misses by a few hundred bytes may fit too.

        Args:
            card: the architecture of the device, which refuses a block that is too large for it.
            static_bytes, dynamic_bytes: of a block, without what is reserved.
        """
        own = -(-(static_bytes + dynamic_bytes + RESERVED_BYTES) // _GRAIN_BYTES) * _GRAIN_BYTES
        of_card = max(card.shared_bytes_of_multiprocessor, self.shared_bytes_of_multiprocessor)
        there = own * of_card // self.shared_bytes_of_multiprocessor
        return there // _GRAIN_BYTES * _GRAIN_BYTES - RESERVED_BYTES - static_bytes

    @staticmethod
    def of(device: int | torch.device) -> Arch:
        """The architecture of a CUDA device; of the current one, where ``device`` has no index.

        It asks torch each time, so what a call needs in every launch is best kept with the kernel.
        """
        return of_capability(torch.cuda.get_device_capability(device))


_KB = 1024
HOPPER = Arch(
    "sm_90a", (9, 0), 227 * _KB, 228 * _KB, dependent_launch=True, bulk_copies=True, clusters=True, wgmma=True
)

ARCHITECTURES = (
    Arch("sm_80", (8, 0), 163 * _KB, 164 * _KB, dependent_launch=False, bulk_copies=False, clusters=False, wgmma=False),
    Arch("sm_86", (8, 6), 99 * _KB, 100 * _KB, dependent_launch=False, bulk_copies=False, clusters=False, wgmma=False),
    Arch("sm_89", (8, 9), 99 * _KB, 100 * _KB, dependent_launch=False, bulk_copies=False, clusters=False, wgmma=False),
    HOPPER,
    Arch("sm_100", (10, 0), 227 * _KB, 228 * _KB, dependent_launch=True, bulk_copies=True, clusters=True, wgmma=False),
    Arch("sm_103", (10, 3), 227 * _KB, 228 * _KB, dependent_launch=True, bulk_copies=True, clusters=True, wgmma=False),
    Arch("sm_120", (12, 0), 99 * _KB, 100 * _KB, dependent_launch=True, bulk_copies=True, clusters=True, wgmma=False),
    Arch("sm_121", (12, 1), 99 * _KB, 100 * _KB, dependent_launch=True, bulk_copies=True, clusters=True, wgmma=False),
)
"""Every architecture that sources are compiled for without a GPU, by ascending capability."""

BUILDS = {
    "sm_80": Arch("compute_80", (8, 0), 163 * _KB, 164 * _KB, False, False, False, False),
    "sm_86": Arch("compute_80", (8, 6), 99 * _KB, 100 * _KB, False, False, False, False),
    "sm_120": Arch("compute_90", (12, 0), 99 * _KB, 100 * _KB, True, True, clusters=False, wgmma=False),
}
"""Architectures as a Hopper card can run them: their features and their shared memory, in PTX that it takes. ``sm_86``
stands for 8.9 too, ``sm_120`` for 12.1. Blocks share a multiprocessor as there (:meth:`Arch.shared_bytes_on`). So the
sources and their tiles are tested for cards that are not here. What the compiler makes of them for those cards, and how
fast they are, is not."""


def build_of(arch: Arch) -> str | None:
    """Which of :data:`BUILDS` an architecture is run as on Hopper; None: it runs what Hopper does, but for wgmma."""

    def features(of: Arch) -> tuple[int, bool, bool]:
        return of.shared_bytes_of_block, of.dependent_launch, of.bulk_copies

    return next((name for name, build in BUILDS.items() if features(build) == features(arch)), None)


@functools.cache
def of_capability(capability: tuple[int, int]) -> Arch:
    """The architecture of a compute capability, in :data:`ARCHITECTURES` or not.

    One that is not listed has what the newest of the older ones has, but for wgmma, which no capability shares with
    Hopper. One that is older than all has none of the features, and the 48 KB of shared memory that every GPU gives.
    """
    name = f"sm_{capability[0]}{capability[1]}"
    older = [arch for arch in ARCHITECTURES if arch.capability <= capability]
    if not older:
        return Arch(name, capability, 48 * _KB, 48 * _KB, False, False, False, False)
    if older[-1].capability == capability:
        return older[-1]
    return replace(older[-1], name=name, capability=capability, wgmma=False)
