"""The parts of the weight stream's workspace."""

import pytest
import torch

from cupymoe.kernels.stream_workspace import new_workspace
from tests.kernels.test_expert_stream import shape


@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 8), (127, 1), (16, 8), (129, 1), (17, 8), (1024, 8)])
@pytest.mark.parametrize("ranks", [(0, 0), (16, 128), (48, 0)])
def test_workspace_parts_do_not_overlap(num_tokens, top_k, ranks):
    num_pairs = num_tokens * top_k
    its_shape = shape(num_tokens, 128, 2816, 704, top_k, gate_up_rank=ranks[0], down_rank=ranks[1])
    workspace = new_workspace(torch.empty(0), its_shape, num_pairs)
    memory, *starts = workspace
    chunks = min(num_pairs, 128 + num_pairs // its_shape.regime.tokens)
    slot_bytes = its_shape.slot_dtype.itemsize
    sizes = [16 * chunks, 4 * num_pairs, 4, 4 * num_pairs, 2 * 704 * num_pairs, slot_bytes * 2816 * num_pairs]
    sizes += [2 * rank * num_pairs for rank in ranks]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert starts[0] == memory.data_ptr()
    assert ends[-1] <= memory.data_ptr() + memory.numel()
    assert (workspace.intermediate - starts[0]) % 128 == 0
    assert (workspace.expert_output - starts[0]) % 128 == 0
    assert (workspace.gate_up_low - starts[0]) % 128 == 0
    assert (workspace.down_low - starts[0]) % 128 == 0


def test_what_is_kept_is_written_where_it_is_kept():
    workspace = new_workspace(torch.empty(0), shape(1, 128, 2816, 704, 8, gate_up_rank=16, down_rank=16), 8)
    low = torch.empty(8, 16, dtype=torch.bfloat16)
    assert workspace.keeping(None, None) == workspace
    assert workspace.keeping(None, low) == workspace._replace(down_low=low.data_ptr())
    assert workspace.keeping(low, None) == workspace._replace(gate_up_low=low.data_ptr())
