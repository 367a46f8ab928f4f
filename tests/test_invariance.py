"""numerics="invariant": who serves it, who says why not, and that a token has the same bits in every call."""

from dataclasses import replace

import pytest
import torch

from cupymoe import (
    Gemma4MoE,
    Gemma4MoEConfig,
    Gemma4Router,
    LowRank,
    MoEActivation,
    MoEExperts,
    explain,
    fused_experts,
    lora_experts,
    quantize,
    route,
    warmup,
)
from cupymoe.backends import ExpertsTensors, registry, select, serving
from cupymoe.backends.fused import FusedBackend, takes_tiles
from cupymoe.kernels.arch import BUILDS
from cupymoe.kernels.expert_tiles import CUTS, cut, few_pairs, tile_shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime
from cupymoe.ops import experts_call
from cupymoe.token_counts import one_of_each_way
from tests.helpers import Experts, oracle, random_biases, random_experts, randomize, relative_error, transposed
from tests.invariance import assert_invariant, assert_same_bits, computed_alone
from tests.test_backends import CALL

INVARIANT = CALL._replace(numerics="invariant")
KINDS = [
    *("plain", "masked", "biased", "transposed", "quantised", "quantised and biased", "adapted", "float32"),
    *("interleaved", "ungated"),
]
GEMMA = Gemma4MoEConfig.gemma4_26b_a4b()
ACTIVATIONS = {"interleaved": MoEActivation.SWIGLUOAI, "ungated": MoEActivation.RELU2_NO_MUL}


# --- who serves it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """What the backends see of the device, where there is none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    select.cache_clear()
    yield
    select.cache_clear()


def test_tiles_serve_every_number_of_tokens_on_hopper(hopper):
    for num_tokens in (1, 16, 17, 383, 384, 16384, 2**20):
        call = INVARIANT._replace(num_tokens=num_tokens)
        assert select("auto", call).name == "fused"
        assert takes_tiles(call.load, call.hidden_size, is_invariant=True)
        assert registry()["fused"].way(call).startswith("tiles of up to ")
        assert registry()["fused"].way(call).endswith(", with the same bits for every number of tokens")


def test_what_has_no_tiles_is_refused(hopper):
    call = INVARIANT._replace(hidden_size=2824)
    with pytest.raises(ValueError, match=r"'fused' does not serve this call: its tiles need a hidden size"):
        select("fused", call)
    assert serving(call).name == "simt"


def test_grouped_is_refused(hopper):
    with pytest.raises(ValueError, match=r"'grouped' does not serve this call: torch's grouped GEMM may sum in anoth"):
        select("grouped", INVARIANT)
    assert registry()["grouped"].unsupported_reason(INVARIANT, "backward") is None


def test_gradients_go_as_always(hopper):
    for num_tokens in (1, 600):
        calls = [call._replace(num_tokens=num_tokens) for call in (CALL, INVARIANT)]
        assert serving(calls[0], "backward") is serving(calls[1], "backward")


def test_simt_and_reference_serve_it(hopper):
    for name in ("simt", "reference"):
        assert registry()[name].unsupported_reason(INVARIANT) is None


def test_who_computes_does_not_depend_on_the_number_of_tokens(monkeypatch, hopper):
    """Cards without wgmma stream, but not any number of pairs: more are refused, and not left to another."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert select("auto", INVARIANT).name == "fused"
    assert select("auto", INVARIANT._replace(num_tokens=2**19)).name == "fused"
    message = r"numerics='invariant' takes backend 'fused' .* does not serve 524289 of them: the weight stream serves"
    with pytest.raises(ValueError, match=message):
        select("auto", INVARIANT._replace(num_tokens=2**19 + 1))


@pytest.mark.parametrize("build", [None, *BUILDS])
@pytest.mark.parametrize("has_codes", [False, True])
def test_the_stream_keeps_to_one_regime_that_sums_k_in_one_chain(build, has_codes):
    loads = [Load.of(num_tokens, 8, 128) for num_tokens in (1, 2, 16, 64, 100, 500, 1000, 5000, 100000)]
    arch = {} if build is None else {"arch": BUILDS[build]}
    settings = {"has_codes": has_codes, "is_invariant": True, **arch}
    (only,) = {regime(load, 704, has_adapter=adapted, **settings) for load in loads for adapted in (False, True)}
    tiles = only.four_bits, only.eight_bits, *(() if has_codes else (only.up, only.down, only.transposed))
    assert all(tile.k_warps == 1 for tile in tiles if tile is not None)
    assert (only.inline_pairs, only.fp32_slots) == (0, False)


def test_experts_of_few_tokens_get_tiles_for_more_multiprocessors():
    """At one token of Gemma 4's 64 tiles of 176 rows would leave half of 132 multiprocessors idle."""

    def widths(num_tokens, **kind):
        few = few_pairs(Load.of(num_tokens, 8, 128))
        its = tile_shape_of(1, 2, torch.bfloat16, MoEActivation.GELU_TANH, 128, 2816, 704, few_pairs=few, **kind)
        return its.up.block_n, its.down.block_n

    assert [widths(num_tokens) for num_tokens in (1, 2, 4, 8, 9)] == [(96, 176), *[(176, 176)] * 3, (176, 128)]
    assert widths(1, gate_up_transposed=True, down_transposed=True) == (128, 192)
    assert few_pairs(Load.of(1, 8, 16, 128)) == 1


def test_warmup_knows_the_tiles_of_few_tokens():
    counts = one_of_each_way(128, 8, 2816, 704, numerics="invariant")
    assert counts[:6] == (1, 2, 3, 5, 9, 17)
    assert one_of_each_way(128, 8, 2816, 704) != counts


# --- the same bits ----------------------------------------------------------------------------------------------------


def layer_and_tokens(kind, num_tokens, sizes, device, dtype, backend="auto", *, requires_grad=False):
    """A call of the experts as tests.invariance wants it, its tokens, and the case of the float64 oracle or None."""
    activation = ACTIVATIONS.get(kind, MoEActivation.GELU_TANH)
    dtype = torch.float32 if kind == "float32" else dtype
    case = random_experts(num_tokens, *sizes, dtype=dtype, device=device, activation=activation)
    weights, settings = case[1:3], {"activation": activation, "numerics": "invariant"}
    if kind == "masked":
        case.top_k_index[::3, 0], case.top_k_index[1::3, 1:] = -1, sizes[0]
    if "biased" in kind:
        settings.update(random_biases(case))
    if kind == "transposed":
        weights = [transposed(weight) for weight in weights]
    if "quantised" in kind:
        weights = quantize(*weights, "int8")
    if kind == "adapted":
        shapes = [(each.shape[0], 16, each.shape[2], each.shape[1]) for each in weights]
        adapters = [
            LowRank(*(torch.randn(shape, dtype=dtype, device=device) / 8 for shape in ((e, r, i), (e, o, r))))
            for e, r, i, o in shapes
        ]

    def layer(hidden_states, index, top_k_weights):
        if requires_grad:
            hidden_states = hidden_states.clone().requires_grad_()
        tensors = hidden_states, *weights, index, top_k_weights
        if kind == "adapted":
            return lora_experts(*tensors, *adapters, **settings).detach()
        return fused_experts(*tensors, backend=backend, **settings).detach()

    is_plain = kind in ("plain", "masked", "float32", "interleaved", "ungated")
    return layer, (case.hidden_states, *case[3:]), case if is_plain else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_cpu(kind, dtype):
    layer, tokens, case = layer_and_tokens(kind, 40, (6, 40, 24, 2), "cpu", dtype)
    expected = computed_alone(layer, tokens)
    assert_invariant(layer, tokens, (1, 2, 3, 8, 39, 40), expected)
    if case is not None and kind != "masked":
        assert relative_error(expected, oracle(case, ACTIVATIONS.get(kind, MoEActivation.GELU_TANH))) < 0.003


def test_tokens_that_begin_anywhere_in_memory():
    layer, tokens, _ = layer_and_tokens("plain", 16, (6, 40, 24, 2), "cpu", torch.float32)
    expected = computed_alone(layer, tokens)
    memory = torch.empty(16 * 40 + 1)
    shifted = memory[1:].view(16, 40).copy_(tokens[0])
    assert shifted.data_ptr() % 16
    assert_same_bits(layer(shifted, *tokens[1:]), expected, "shifted")


def test_who_computes_does_not_depend_on_where_tokens_and_output_begin():
    case = random_experts()
    memory = torch.empty(case.hidden_states.numel() + 1)
    shifted = memory[1:].view_as(case.hidden_states)
    settings = {"activation": MoEActivation.GELU_TANH, "numerics": "invariant"}
    assert experts_call(shifted, *case[1:4], **settings).aligned_hidden_states
    assert experts_call(*case[:4], **settings, out=shifted).aligned_hidden_states
    assert not experts_call(*case[:4], MoEActivation.GELU_TANH, out=shifted).aligned_hidden_states
    fused_experts(*case, **settings, out=shifted)
    assert torch.equal(shifted, fused_experts(*case, **settings))


def test_modules_ask_for_it():
    config = replace(GEMMA, num_experts=6, hidden_size=32, moe_intermediate_size=24, top_k_experts=2)
    moe = randomize(Gemma4MoE(config, numerics="invariant"))
    assert moe.router.numerics == moe.experts.numerics == "invariant"
    states, residual = torch.randn(2, 24, 32)
    expected = moe(states, router_hidden_states=residual)
    for count in (1, 5, 24):
        parts = zip(states.split(count), residual.split(count), strict=True)
        output = torch.cat([moe(part, router_hidden_states=of_router) for part, of_router in parts])
        assert_same_bits(output, expected, f"calls of {count} tokens")
    assert all(each.reasons for each in explain(moe) if each.direction == "forward")
    warmup(moe)


def test_others_are_refused_by_name():
    message = "numerics must be 'fast' or 'invariant', got 'exact'"
    with torch.device("meta"):
        for make in (
            lambda: MoEExperts(6, 32, 24, "silu", numerics="exact"),
            lambda: Gemma4MoE(GEMMA, numerics="exact"),
        ):
            with pytest.raises(ValueError, match=message):
                make()
        with pytest.raises(ValueError, match=message):
            Gemma4Router(GEMMA, numerics="exact")
    with pytest.raises(ValueError, match=message):
        route(torch.randn(3, 6), 2, numerics="exact")


def test_a_router_that_is_more_than_its_parameters_is_refused():
    router = randomize(Gemma4Router(GEMMA, numerics="invariant"))
    router.proj.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(
        ValueError, match=r"numerics='invariant' needs logits that are one product of hidden states with proj\.weight"
    ):
        router(torch.randn(3, GEMMA.hidden_size))


# --- on a GPU ---------------------------------------------------------------------------------------------------------

SIZES = 32, 256, 176, 4
GEMMA_SIZES = GEMMA.num_experts, GEMMA.hidden_size, GEMMA.moe_intermediate_size, GEMMA.top_k_experts
CUTS_FROM_SLOTS = 240, 368
SERVED_BY_FUSED = [kind for kind in KINDS if kind != "float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SERVED_BY_FUSED)
def test_every_token_at_every_number_of_tokens_up_to_512(kind):
    layer, tokens, _ = layer_and_tokens(kind, 512, SIZES, "cuda", torch.bfloat16)
    expected = layer(*tokens)
    assert_invariant(layer, tokens, range(1, 513), expected)
    assert_same_bits(computed_alone(layer, tokens), expected, "one by one")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SERVED_BY_FUSED)
def test_every_token_in_every_cut_of_the_tiles(kind):
    """On both sides of the bounds between cuts."""
    bounds = [-(-slots * SIZES[0] // SIZES[3]) for slots in CUTS_FROM_SLOTS]
    layer, tokens, _ = layer_and_tokens(kind, max(bounds) + 500, SIZES, "cuda", torch.bfloat16)
    expected = computed_alone(layer, tokens, few=64)
    around = [count for bound in bounds for count in (bound - 1, bound)]
    assert len({cut(Load.of(count, SIZES[3], SIZES[0]), SIZES[2]) for count in around}) == len(CUTS)
    assert_invariant(layer, tokens, (*around, len(expected)), expected)


@pytest.mark.gpu
def test_every_token_of_gemma_4_at_every_number_of_tokens_up_to_512():
    layer, tokens, case = layer_and_tokens("plain", 512, GEMMA_SIZES, "cuda", torch.bfloat16)
    expected = layer(*tokens)
    assert_invariant(layer, tokens, range(1, 513), expected)
    assert relative_error(expected, oracle(case)) <= 0.0029


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_token_of_gemma_4_up_to_16384(dtype):
    """A sample of the numbers of tokens, that reaches every cut of the tiles."""
    layer, tokens, _ = layer_and_tokens("plain", 16384, GEMMA_SIZES, "cuda", dtype)
    drawn = torch.randint(513, 16384, (12,)).tolist()
    expected = computed_alone(layer, tokens, few=64)
    assert_invariant(layer, tokens, (1, 8, 512, 3839, 3840, 5887, 5888, 16384, *drawn), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "plain"])
def test_simt_and_the_reference(kind):
    for backend, count in (("simt", 600), ("reference", 40)):
        layer, tokens, _ = layer_and_tokens(kind, count, SIZES, "cuda", torch.bfloat16, backend)
        expected = computed_alone(layer, tokens)
        assert_invariant(layer, tokens, (1, 2, 17, 33, count // 2, count), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "quantised", "adapted", "biased"])
def test_training_and_inference(kind):
    for count in (1, 9, 600):
        torch.manual_seed(count)
        inference, tokens, _ = layer_and_tokens(kind, count, SIZES, "cuda", torch.bfloat16)
        torch.manual_seed(count)
        training, *_ = layer_and_tokens(kind, count, SIZES, "cuda", torch.bfloat16, requires_grad=True)
        assert_same_bits(training(*tokens), inference(*tokens), f"training with {count} tokens")


@pytest.mark.gpu
def test_what_is_kept_changes_no_bits():
    case = random_experts(600, *SIZES, dtype=torch.bfloat16, device="cuda")
    settings = {"activation": "gelu_tanh", "numerics": "invariant"}
    expected = fused_experts(*case, **settings)
    case.hidden_states.requires_grad_()
    for keep in ("gate_up", "input"):
        assert torch.equal(fused_experts(*case, **settings, keep=keep), expected)


@pytest.mark.gpu
def test_other_experts_of_the_world_and_masked_pairs_change_no_bits():
    """The choice of a cut goes by the expected pairs; the bits do not."""
    case = random_experts(2048, *SIZES, dtype=torch.bfloat16, device="cuda")
    settings = {"activation": "gelu_tanh", "numerics": "invariant"}
    expected = fused_experts(*case, **settings)
    for num_experts in (32, 64, 2048):
        assert torch.equal(fused_experts(*case, **settings, global_num_experts=num_experts), expected)
    others = torch.rand(2048, device="cuda") < 0.9
    index = torch.where(others[:, None], -1, case.top_k_index)
    output = fused_experts(*case._replace(top_k_index=index), **settings)
    assert torch.equal(output[~others], expected[~others])
    assert not output[others].any()


@pytest.mark.gpu
def test_graphs_and_streams():
    layer, tokens, _ = layer_and_tokens("plain", 300, SIZES, "cuda", torch.bfloat16)
    expected = computed_alone(layer, tokens)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = layer(*tokens)
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(on_side, expected, "on another stream")
    for count in (1, 5, 300):
        some = [tensor[:count].clone() for tensor in tokens]
        layer(*some)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(*some)
        for last in (count, 300):
            for tensor, whole in zip(some, tokens, strict=True):
                tensor.copy_(whole[last - count : last])
            graph.replay()
            assert_same_bits(output, expected[last - count : last], f"a replay of {count} tokens")


@pytest.mark.gpu
def test_tokens_and_outputs_that_begin_anywhere():
    layer, tokens, _ = layer_and_tokens("plain", 64, SIZES, "cuda", torch.bfloat16)
    expected = layer(*tokens)
    memory = torch.empty(64 * SIZES[1] + 1, dtype=torch.bfloat16, device="cuda")
    shifted = memory[1:].view(64, SIZES[1]).copy_(tokens[0])
    assert_same_bits(layer(shifted, *tokens[1:]), expected, "shifted")


@pytest.mark.gpu
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_other_cards(build, kind):
    case = random_experts(3000, *SIZES, dtype=torch.bfloat16, device="cuda")
    if kind == "transposed":
        case = case._replace(gate_up_proj=transposed(case.gate_up_proj), down_proj=transposed(case.down_proj))
    backend = FusedBackend(BUILDS[build])

    def layer(hidden_states, index, weights):
        some = Experts(hidden_states, *case[1:3], index.contiguous(), weights.contiguous())
        call = experts_call(*some[:4], MoEActivation.GELU_TANH, numerics="invariant")
        return backend.forward(call, ExpertsTensors(*some))

    tokens = case.hidden_states, *case[3:]
    expected = computed_alone(layer, tokens, few=3)
    assert_invariant(layer, tokens, (1, 2, 8, 16, 17, 63, 64, 65, 500, 2047, 2048, 2049, 3000), expected)


@pytest.mark.gpu
def test_gemma_4_s_layer_from_hidden_states_on():
    config = replace(GEMMA, num_experts=32)
    moe = randomize(Gemma4MoE(config, numerics="invariant")).to("cuda", torch.bfloat16).requires_grad_(False)
    states, residual = torch.randn(2, 700, config.hidden_size, device="cuda").bfloat16()
    expected = moe(states, router_hidden_states=residual)
    for count in (1, 2, 7, 31, 32, 33, 64, 300, 699):
        parts = zip(states.split(count), residual.split(count), strict=True)
        output = torch.cat([moe(part, router_hidden_states=of_router) for part, of_router in parts])
        assert_same_bits(output, expected, f"calls of {count} tokens")
