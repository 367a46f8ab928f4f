"""batched_experts: rows that lie by expert, of which the first ones count; others are neither read nor written."""

import pytest
import torch

from cupymoe import MoEActivation, QuantizedExperts, QuantizedWeight, batched_experts, quantize, reference
from cupymoe.backends import BatchTensors, fused_batched
from cupymoe.kernels.expert_tiles import MANY_SLOTS
from cupymoe.kernels.stored_weight import stored_weight
from cupymoe.ops import experts_call
from tests.helpers import no_host_sync, poison_free_memory, relative_error, slow_on_cuda, transposed

ACTIVATION = MoEActivation.GELU_TANH
UNWRITTEN = 7.0
COUNTS = [0, 1, 63, 64, 65, 10**6, -3, 17]
"""Of eight experts; one has more than there are, and one less than none."""
MANY = [250, 190, 250, 242, 250, 10**6, 249, 250]
"""The same, of which the tiles are cut for many rows: more than 240 on average."""
MAX_TOKENS = [1, 3, 16, 23, 64, 100, 250, 700]
"""On a Hopper card the weight stream, in three of its regimes, and tiles from 24 rows on, from 240 in two cuts."""


def random_batch(max_tokens, counts=COUNTS, hidden=128, intermediate=96, *, dtype, device, activation=ACTIVATION):
    """Rows that don't count are NaN; the counts are no more than there are, but for the most of all."""
    num_experts, kwargs = len(counts), {"dtype": dtype, "device": device}
    tokens = torch.tensor([min(count, max_tokens) if count < 10**6 else count for count in counts], dtype=torch.int32)
    states = torch.randn(num_experts, max_tokens, hidden, **kwargs)
    for expert, rows in enumerate(states):
        rows[max(int(tokens[expert]), 0) :] = torch.nan
    gate_up = torch.randn(num_experts, activation.input_size(intermediate), hidden, **kwargs) * hidden**-0.5
    down = torch.randn(num_experts, hidden, intermediate, **kwargs) * intermediate**-0.5
    return states, tokens.to(device), gate_up, down


def dequantized(weight):
    return weight.dequantize().to(weight.device) if isinstance(weight, QuantizedWeight) else weight.double()


def oracle(states, counts, gate_up, down, activation=ACTIVATION):
    """float64, with :data:`UNWRITTEN` where nothing is."""
    output = torch.full_like(states, UNWRITTEN, dtype=torch.float64)
    gate_up, down = dequantized(gate_up), dequantized(down)
    for expert, count in enumerate(counts.clamp(0, states.shape[1]).tolist()):
        intermediate = reference.activate(states[expert, :count].double() @ gate_up[expert].T, activation)
        output[expert, :count] = intermediate @ down[expert].T
    return output


def check(states, counts, gate_up, down, activation=ACTIVATION, *, bound=0.005, largest=0.03):
    """With memory given and not: rows that count, elementwise and in norm, and that no others are written."""
    truth = oracle(states, counts, gate_up, down, activation)
    counted = torch.arange(states.shape[1], device=states.device) < counts.unsqueeze(1)
    out = torch.full_like(states, UNWRITTEN)
    assert batched_experts(states, counts, gate_up, down, activation=activation, out=out) is out
    assert (out[~counted] == UNWRITTEN).all()
    if counted.any():
        assert relative_error(out[counted], truth[counted]) < bound
        assert (out[counted] - truth[counted]).abs().max() < largest * truth[counted].abs().max()
    if states.is_cuda:
        poison_free_memory()
    fresh = batched_experts(states, counts, gate_up, down, activation=activation)
    assert fresh.is_contiguous()
    assert torch.equal(fresh[counted], out[counted])
    return out


@slow_on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_counted_rows_and_no_others(device, max_tokens, dtype):
    check(*random_batch(max_tokens, dtype=dtype, device=device))


@slow_on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_of_each_expert(device, dtype):
    check(*random_batch(700, MANY, dtype=dtype, device=device))


@slow_on_cuda
@pytest.mark.parametrize(("max_tokens", "counts"), [(5, COUNTS), (70, COUNTS), (250, COUNTS), (250, MANY)])
@pytest.mark.parametrize("activation", [MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_other_experts(device, max_tokens, counts, activation, is_transposed):
    states, counts, *weights = random_batch(
        max_tokens, counts, hidden=192, dtype=torch.bfloat16, device=device, activation=activation
    )
    check(states, counts, *(map(transposed, weights) if is_transposed else weights), activation)


@slow_on_cuda
@pytest.mark.parametrize("max_tokens", [5, 70])
def test_sizes_that_no_fast_kernel_takes(device, max_tokens):
    check(*random_batch(max_tokens, hidden=36, intermediate=20, dtype=torch.bfloat16, device=device))


@slow_on_cuda
@pytest.mark.parametrize("counts", [[0] * 8, [0] * 7 + [5], [5] + [0] * 7, [10**6] * 8])
@pytest.mark.parametrize("max_tokens", [5, 70, 250])
def test_no_rows_and_all(device, counts, max_tokens):
    check(*random_batch(max_tokens, counts, dtype=torch.bfloat16, device=device))


@slow_on_cuda
@pytest.mark.parametrize(
    "formats", [("int4", None), ("int4", "int4"), (None, "fp8"), ("nvfp4", "nvfp4"), ("int8", "int8")]
)
@pytest.mark.parametrize("max_tokens", [5, 40, 70, 300])
def test_quantised_weights(device, formats, max_tokens):
    states, counts, *weights = random_batch(max_tokens, dtype=torch.bfloat16, device=device)
    experts = [
        weight if format is None else next(iter(quantize(weight, weight.mT.contiguous(), format)))
        for weight, format in zip(weights, formats, strict=True)
    ]
    check(states, counts, *QuantizedExperts(*experts))


def test_empty_batches(device):
    for num_experts, max_tokens, intermediate in ((0, 5, 32), (4, 0, 32)):
        states = torch.zeros(num_experts, max_tokens, 64, device=device)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
        weights = states.new_zeros(num_experts, 2 * intermediate, 64), states.new_zeros(num_experts, 64, intermediate)
        assert batched_experts(states, counts, *weights, activation=ACTIVATION).shape == states.shape
    states, counts, *_ = random_batch(5, dtype=torch.float32, device=device)
    weights = states.new_zeros(8, 0, 128), states.new_zeros(8, 128, 0)
    out = torch.full_like(states, UNWRITTEN)
    batched_experts(states, counts, *weights, activation=ACTIVATION, out=out)
    counted = torch.arange(5, device=device) < counts.unsqueeze(1)
    assert torch.equal(out, torch.where(counted.unsqueeze(2), 0.0, UNWRITTEN).expand_as(out))


@slow_on_cuda
@pytest.mark.parametrize("max_tokens", [3, 70])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients(device, max_tokens, frozen):
    dtype = torch.float64 if device.type == "cpu" else torch.bfloat16
    states, counts, *weights = random_batch(max_tokens, dtype=dtype, device=device)
    leaves = [states, *weights][: 1 if frozen else 3]
    for leaf in leaves:
        leaf.requires_grad_()
    output = batched_experts(states, counts, *weights, activation=ACTIVATION)
    counted = torch.arange(max_tokens, device=device) < counts.unsqueeze(1)
    grad = torch.where(counted.unsqueeze(2), torch.randn_like(output), torch.nan)  # nobody reads the others
    ours = torch.autograd.grad(output, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    given = [*wide, *(weight.double() for weight in weights[len(wide) - 1 :])]
    expected = oracle(given[0], counts, *given[1:])
    theirs = torch.autograd.grad(expected[counted], wide, grad[counted].double(), allow_unused=True)
    assert relative_error(output[counted], expected[counted].detach()) < 0.005
    assert (ours[0][~counted] == 0).all()
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.any()
        assert relative_error(got, torch.where(wanted.isnan(), 0, wanted)) < 0.01


@slow_on_cuda
def test_compiled(device):
    states, counts, *weights = random_batch(9, dtype=torch.bfloat16, device=device)
    counted = torch.arange(9, device=device) < counts.unsqueeze(1)

    def function(*tensors):
        return batched_experts(*tensors, activation=ACTIVATION)

    def into(out, *tensors):
        return batched_experts(*tensors, activation=ACTIVATION, out=out) + 1

    expected = function(states, counts, *weights)[counted]
    for dynamic in (False, True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert torch.equal(compiled(states, counts, *weights)[counted], expected)
    out = torch.full_like(states, UNWRITTEN)
    with torch.no_grad():
        output = torch.compile(into, fullgraph=True, backend="aot_eager")(out, states, counts, *weights)
    assert torch.equal(out[counted], expected)
    assert (out[~counted] == UNWRITTEN).all()
    assert torch.equal(output, out + 1)
    given = [states.clone().requires_grad_(), counts, *weights]
    torch.compile(function, fullgraph=True, backend="aot_eager")(*given)[counted].sum().backward()
    (eager,) = torch.autograd.grad(function(*given)[counted].sum(), given[:1])
    assert torch.equal(given[0].grad, eager)


STATES, TOKENS, GATE_UP, DOWN = random_batch(5, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_states": STATES[0]}, ValueError, r"hidden_states must have shape \[\*, \*, \*\], got \[5, 128\]"),
        ({"hidden_states": STATES.int()}, TypeError, "hidden_states must be a floating-point tensor"),
        ({"hidden_states": STATES.half()}, TypeError, "gate_up_proj must have hidden_states's dtype"),
        ({"expert_num_tokens": TOKENS.long()}, TypeError, "expert_num_tokens must be int32, got torch.int64"),
        ({"expert_num_tokens": TOKENS[1:]}, ValueError, r"expert_num_tokens must have shape \[8\], got \[7\]"),
        ({"expert_num_tokens": TOKENS.tolist()}, TypeError, "expert_num_tokens must be a torch.Tensor, got list"),
        ({"expert_num_tokens": TOKENS.to("meta")}, ValueError, "expert_num_tokens must be on hidden_states's"),
        ({"gate_up_proj": GATE_UP[1:]}, ValueError, r"gate_up_proj must have shape \[8, 192, 128\], got \[7"),
        ({"gate_up_proj": None}, TypeError, "gate_up_proj must be a torch.Tensor or a cupymoe.QuantizedWeight"),
        ({"down_proj": DOWN[:, 1:]}, ValueError, r"down_proj must have shape \[8, 128, \*\], got \[8, 127"),
        ({"down_proj": DOWN.repeat(1, 1, 2)[..., ::2]}, ValueError, "down_proj must be contiguous"),
        ({"activation": "gelo"}, ValueError, "gelo"),
        ({"out": STATES}, ValueError, "out must not overlap an input"),
        ({"out": torch.empty(8, 4, 128)}, ValueError, r"out must have shape \[8, 5, 128\], got \[8, 4, 128\]"),
        ({"out": torch.empty(8, 5, 128).half()}, TypeError, "out must have hidden_states's dtype"),
        ({"out": torch.empty(5, 8, 128).transpose(0, 1)}, ValueError, "out must be contiguous"),
        ({"out": torch.empty(8, 5, 128).requires_grad_()}, ValueError, "out must be None where a gradient"),
    ],
)  # fmt: skip
def test_what_is_refused(changed, error, message):
    arguments = {
        "hidden_states": STATES,
        "expert_num_tokens": TOKENS,
        "gate_up_proj": GATE_UP,
        "down_proj": DOWN,
        "activation": ACTIVATION,
    }
    with pytest.raises(error, match=message):
        batched_experts(**{**arguments, **changed})


@slow_on_cuda
def test_hidden_states_may_lie_anywhere(device):
    states, counts, *weights = random_batch(9, dtype=torch.bfloat16, device=device)
    expected = check(states, counts, *weights)
    strided = states.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.full_like(states, UNWRITTEN)
    batched_experts(strided, counts.repeat_interleave(2)[::2], *weights, activation=ACTIVATION, out=out)
    assert torch.equal(out, expected)


# --- both cuts of the tiles -------------------------------------------------------------------------------------------


def call_of(room):
    states, _, *weights = random_batch(room, dtype=torch.bfloat16, device="cpu")
    rows = states.flatten(0, 1)
    return experts_call(rows, *weights, rows[:, :1], ACTIVATION)


@pytest.mark.parametrize(("room", "plans"), [(100, ["few"]), (239, ["few"]), (240, ["few", "many"])])
def test_each_projection_is_launched_in_every_cut_that_may_be_wanted(monkeypatch, room, plans):
    """With the slots of its own plan, and all up projections, into one memory, before the down projections."""
    launches = []

    def plan_batch(counts, max_tokens, many_from=None):
        return ("few",) if many_from is None else ("few", "many")

    def up(rows, gate_up_proj, scales, slots, shape, out):
        launches.append(("up", slots, (shape.blocks, shape.products), out.data_ptr()))

    def down(intermediate, down_proj, scales, slots, shape, out):
        launches.append(("down", slots, (shape.blocks, shape.products), intermediate.data_ptr()))

    monkeypatch.setattr(fused_batched, "plan_batch", plan_batch)
    monkeypatch.setattr(fused_batched, "up_product", up)
    monkeypatch.setattr(fused_batched, "down_product", down)
    batch = BatchTensors(*random_batch(room, dtype=torch.bfloat16, device="cpu"))
    fused_batched.tiles(call_of(room), batch, torch.empty_like(batch.rows))
    cuts = {"few": (1, 2), "many": (1, 3)}
    expected = [(projection, plan, cuts[plan]) for projection in ("up", "down") for plan in plans]
    assert [launch[:3] for launch in launches] == expected
    assert len({launch[3] for launch in launches}) == 1


def test_quantised_weights_are_launched_once():
    stored = stored_weight("int4_g32", torch.bfloat16)
    assert len(fused_batched._tile_shapes(call_of(700), (stored, stored))) == 1


# --- as a running model calls it --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("max_tokens", [5, 128, 300])
@pytest.mark.parametrize("format", [None, "int4"])
def test_counts_may_change_between_replays(max_tokens, format):
    """From few rows to many and back, too."""
    states, counts, *weights = random_batch(max_tokens, dtype=torch.bfloat16, device="cuda")
    weights = weights if format is None else [*quantize(*weights, format)]
    states.copy_(torch.randn_like(states))
    out = torch.full_like(states, UNWRITTEN)
    batched_experts(states, counts, *weights, activation=ACTIVATION, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batched_experts(states, counts, *weights, activation=ACTIVATION, out=out)
    for least in (-1, -1, max_tokens - 30, max_tokens - 30, -1):
        counts.copy_(torch.randint(least, max_tokens + 3, counts.shape, device="cuda"))
        out.fill_(UNWRITTEN)
        graph.replay()
        expected = torch.full_like(states, UNWRITTEN)
        batched_experts(states, counts, *weights, activation=ACTIVATION, out=expected)
        assert torch.equal(out, expected)
        counted = torch.arange(max_tokens, device="cuda") < counts.unsqueeze(1)
        assert (out[~counted] == UNWRITTEN).all()
        truth = oracle(states, counts, *weights)
        assert relative_error(out[counted], truth[counted]) < 0.005


@pytest.mark.gpu
@pytest.mark.parametrize("max_tokens", [7, 64, 256])
def test_the_host_never_waits_and_bits_stay(max_tokens):
    """Whatever the memory held that the plan and the intermediate are written to."""
    states, counts, *weights = random_batch(max_tokens, dtype=torch.bfloat16, device="cuda")
    out = torch.full_like(states, UNWRITTEN)
    batched_experts(states, counts, *weights, activation=ACTIVATION, out=out)
    for byte in (0x00, 0x7F, 0xFF):
        poison_free_memory(byte)
        again = torch.full_like(states, UNWRITTEN)
        with no_host_sync():
            batched_experts(states, counts, *weights, activation=ACTIVATION, out=again)
        assert torch.equal(again, out)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(8, 128, 96), (32, 512, 704), (16, 2816, 704)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_bits_do_not_depend_on_the_cut(sizes, is_transposed):
    """One row fewer, and all are computed by the launches for few; those for many have another cut at each size."""
    states, counts, *weights = random_batch(
        2 * MANY_SLOTS, [MANY_SLOTS] * sizes[0], *sizes[1:], dtype=torch.bfloat16, device="cuda"
    )
    weights = [transposed(weight) for weight in weights] if is_transposed else weights
    of_many = check(states, counts, *weights)
    counts[-1] -= 1
    of_few = check(states, counts, *weights)
    of_many[-1, MANY_SLOTS - 1] = UNWRITTEN
    assert torch.equal(of_few, of_many)


@pytest.mark.gpu
@pytest.mark.parametrize(("least", "max_tokens"), [(0, 16), (0, 128), (0, 256), (240, 256)])
def test_at_the_sizes_of_gemma_4(least, max_tokens):
    """128 experts, few of which are full."""
    counts = torch.randint(least, max_tokens + 1, (128,)).tolist()
    check(*random_batch(max_tokens, counts, 2816, 704, dtype=torch.bfloat16, device="cuda"))
