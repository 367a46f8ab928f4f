"""Faults of the launches and of the backends."""

from __future__ import annotations

from scripts.mutations.mutation import ACTIVATION, EXPERTS, STREAMS, launcher

QUANTISED = ("tests/weights/test_experts.py::test_on_gpu",)
INVARIANT = ("tests/test_invariance.py::test_every_token_at_every_number_of_tokens_up_to_512",)


FAULTS = (
    launcher("always the default stream", "kernels/launch.py", "config.stream = stream", "config.stream = 0", STREAMS),
    launcher(
        "stale parameters",
        "kernels/launch.py",
        "        _PACK[len(arguments)](own.values, 0, *arguments)",
        "        any(own.values) or _PACK[len(arguments)](own.values, 0, *arguments)",
        ACTIVATION,
    ),
    launcher(
        "the last expert's rows not activated",
        "backends/row_products.py",
        "num_rows=self.offsets[-1:]",
        "num_rows=self.offsets[-2:-1]",
        EXPERTS,
    ),
    launcher(
        "the first row of a step given to the expert before it",
        "backends/row_products.py",
        "torch.where(slots < self.offsets[first], output, product)",
        "torch.where(slots <= self.offsets[first], output, product)",
        QUANTISED,
    ),
    launcher(
        "few tokens streamed although their bits are to be those of many",
        "backends/fused.py",
        "prefers = is_invariant or prefers_tiles",
        "prefers = prefers_tiles",
        INVARIANT,
    ),
)
