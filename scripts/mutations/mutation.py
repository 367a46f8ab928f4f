"""What a planted fault is, and the tests that see faults of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ACTIVATION = ("tests/kernels/test_gated_activation.py",)
EXPERTS = (
    "tests/test_experts_cuda.py::test_every_activation",
    "tests/test_experts_cuda.py::test_masked_ids",
    "tests/test_experts_cuda.py::test_all_tokens_to_one_expert_and_the_rest_empty",
    "tests/test_experts_cuda.py::test_intermediate_sizes_of_tensor_parallel_gemma_4",
)
BITS = ("tests/test_experts_runtime.py::test_same_bits_whatever_the_memory_held",)
STREAMS = (
    "tests/test_experts_runtime.py::test_runs_on_the_current_stream",
    "tests/test_concurrency.py::test_two_modules_on_two_streams_at_once",
)


class Mutation(NamedTuple):
    """One fault: ``old``, which stands once in ``path``, becomes ``new``."""

    fault: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    """That have to see it."""
    source: str = ""
    """Of what is CUDA: a source that holds it,"""
    defines: tuple[str, ...] = ()
    """and what the compilations in which it makes a difference define."""
    hangs: bool = False
    """Whether it shows in tests that never end; of another, a test that runs out of time says nothing."""

    def apply(self, folder: Path) -> None:
        """
        Raises:
            ValueError: ``old`` does not stand in the file exactly once.
        """
        file = folder / self.path
        text = file.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.fault}: stands {count} times in {self.path}, not once: {self.old!r}")
        file.write_text(text.replace(self.old, self.new), encoding="utf-8")


def cuda(
    fault: str,
    file: str,
    old: str,
    new: str,
    tests: tuple[str, ...],
    source: str = "",
    defines: tuple[str, ...] = (),
    **more: bool,
) -> Mutation:
    """A fault in a CUDA source or header."""
    return Mutation(fault, f"cuda_src/{file}", old, new, tests, source or Path(file).stem, defines, **more)


def launcher(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutation:
    """A fault in the Python that launches."""
    return Mutation(fault, f"cupymoe/{file}", old, new, tests)
