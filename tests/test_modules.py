"""The modules against transformers': names, state_dict, shared storage, outputs."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from cupymoe import Gemma4Experts, Gemma4MoE, Gemma4MoEConfig, Gemma4Router, MoEActivation
from tests.helpers import UNFIT, randomize, slow_on_cuda, transformers_config, transformers_gemma4

KEYS = {
    "router.proj.weight": (6, 32),
    "router.scale": (32,),
    "router.per_expert_scale": (6,),
    "experts.gate_up_proj": (6, 48, 32),
    "experts.down_proj": (6, 32, 24),
}

CONFIG = Gemma4MoEConfig(
    hidden_size=32, moe_intermediate_size=24, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
)


def decoder_layer(**sizes):
    return randomize(transformers_gemma4().Gemma4TextDecoderLayer(transformers_config(**sizes), 0))


def transformers_moe(layer, hidden_states, router_hidden_states):
    """Gemma4TextDecoderLayer.forward between its norms."""
    _, weights, index = layer.router(router_hidden_states)
    return layer.experts(hidden_states, index, weights)


def test_state_dict_keys():
    assert {key: tuple(value.shape) for key, value in Gemma4MoE(CONFIG).state_dict().items()} == KEYS


def test_load_a_whole_decoder_layer():
    layer = decoder_layer()
    moe = Gemma4MoE(CONFIG)
    moe.load_decoder_layer(layer.state_dict())
    for key in KEYS:
        assert torch.equal(moe.state_dict()[key], layer.state_dict()[key])
    hidden_states = torch.randn(7, 32)
    torch.testing.assert_close(moe(hidden_states), transformers_moe(layer, hidden_states, hidden_states))


@pytest.mark.parametrize("key", KEYS)
def test_load_names_a_missing_key(key):
    state_dict = Gemma4MoE(CONFIG).state_dict()
    del state_dict[key]
    with pytest.raises(RuntimeError, match=rf"(?s)Missing key.*{re.escape(key)}"):
        Gemma4MoE(CONFIG).load_decoder_layer(state_dict)


@pytest.mark.parametrize("key", ["experts.gate_up_proj_bias", "router.norm.weight"])
def test_load_names_a_left_over_key(key):
    state_dict = {**Gemma4MoE(CONFIG).state_dict(), key: torch.ones(3), "mlp.gate_proj.weight": torch.ones(3)}
    with pytest.raises(RuntimeError, match=rf"(?s)Unexpected key.*{re.escape(key)}") as caught:
        Gemma4MoE(CONFIG).load_decoder_layer(state_dict)
    assert "mlp" not in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_load_names_a_misshapen_key(key):
    state_dict = Gemma4MoE(CONFIG).state_dict()
    state_dict[key] = state_dict[key][1:]
    with pytest.raises(RuntimeError, match=rf"(?s)size mismatch for {re.escape(key)}"):
        Gemma4MoE(CONFIG).load_decoder_layer(state_dict)


def refuse_to_load(state_dict, error, message):
    """The error is raised, and no parameter was written."""
    moe = randomize(Gemma4MoE(CONFIG))
    before = copy.deepcopy(moe.state_dict())
    with pytest.raises(error, match=message):
        moe.load_decoder_layer(state_dict)
    assert all(torch.equal(value, before[key]) for key, value in moe.state_dict().items())


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", UNFIT)
def test_load_refuses_what_a_copy_would_not_read(kind, key):
    make, error, message = UNFIT[kind]
    state_dict = randomize(Gemma4MoE(CONFIG)).state_dict()
    state_dict[key] = make(state_dict[key])
    refuse_to_load(state_dict, error, f"{key} must .*{message}")


def test_load_refuses_shards(mesh):
    state_dict = randomize(Gemma4MoE(CONFIG)).state_dict()
    shards = distribute_tensor(state_dict["router.scale"], mesh)
    refuse_to_load({**state_dict, "router.scale": shards}, TypeError, "router.scale must be a plain .* got a DTensor")
    moe = fully_shard(randomize(Gemma4MoE(CONFIG)), mesh=mesh)
    with pytest.raises(TypeError, match=r"router.scale must be a plain tensor, .* got a DTensor"):
        moe.load_decoder_layer(state_dict)


def test_load_refuses_a_nested_tensor():
    state_dict = randomize(Gemma4MoE(CONFIG)).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that their interface may change
        state_dict["router.scale"] = torch.nested.nested_tensor([torch.ones(16), torch.ones(16)])
    refuse_to_load(state_dict, TypeError, "router.scale must be a plain tensor, .* got a nested one")


def test_load_refuses_an_array():
    state_dict = randomize(Gemma4MoE(CONFIG)).state_dict()
    state_dict["router.scale"] = state_dict["router.scale"].numpy()
    refuse_to_load(state_dict, TypeError, "router.scale must be a torch.Tensor, got ndarray")


@pytest.mark.parametrize("key", KEYS)
def test_load_writes_nothing_of_a_misshapen_layer(key):
    state_dict = randomize(Gemma4MoE(CONFIG)).state_dict()
    refuse_to_load({**state_dict, key: state_dict[key][1:]}, RuntimeError, f"size mismatch for {key}: must have shape")
    refuse_to_load(
        {**state_dict, key: state_dict[key][None]}, RuntimeError, f"size mismatch for {key}: must have shape"
    )
    refuse_to_load({**state_dict, f"{key}_scale": torch.ones(1)}, RuntimeError, f"Unexpected key {key}_scale")
    del state_dict[key]
    refuse_to_load(state_dict, RuntimeError, f"Missing key {key}")


def test_load_refuses_what_is_no_state_dict():
    refuse_to_load([*Gemma4MoE(CONFIG).state_dict()], TypeError, "state_dict must map keys to tensors, got list")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_load_keeps_the_parameters_dtype(dtype):
    moe, other = Gemma4MoE(CONFIG), randomize(Gemma4MoE(CONFIG)).to(dtype)
    moe.load_decoder_layer(other.state_dict())
    for key, value in moe.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, other.state_dict()[key].float())


def test_load_takes_parameters_and_subclasses_that_are_plain_memory():
    class Named(torch.Tensor):
        pass

    moe, other = Gemma4MoE(CONFIG), randomize(Gemma4MoE(CONFIG))
    state_dict = {key: value.as_subclass(Named) for key, value in other.state_dict().items()}
    moe.load_decoder_layer({**state_dict, "router.scale": other.router.scale})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in moe.state_dict().items())


@pytest.mark.parametrize("kind", UNFIT)
def test_load_refuses_parameters_that_a_copy_would_not_fill(kind):
    make, error, message = UNFIT[kind]
    moe = randomize(Gemma4MoE(CONFIG))
    scale = moe.router.scale.detach().clone()
    moe.experts.down_proj = torch.nn.Parameter(make(moe.experts.down_proj.detach()), requires_grad=False)
    with pytest.raises(error, match=f"experts.down_proj must .*{message}"):
        moe.load_decoder_layer(randomize(Gemma4MoE(CONFIG)).state_dict())
    assert torch.equal(moe.router.scale, scale)


def test_load_refuses_parameters_of_inference_mode_outside_of_it():
    state_dict = randomize(Gemma4MoE(CONFIG)).state_dict()
    moe = Gemma4MoE(CONFIG)
    with torch.inference_mode():
        moe.experts.down_proj = torch.nn.Parameter(torch.zeros(6, 32, 24))
    with pytest.raises(ValueError, match=r"experts.down_proj was made in torch.inference_mode\(\), and can be written"):
        moe.load_decoder_layer(state_dict)
    assert torch.equal(moe.router.scale, torch.ones(32))
    with torch.inference_mode():
        moe.load_decoder_layer(state_dict)
        assert all(torch.equal(value, state_dict[key]) for key, value in moe.state_dict().items())


def test_from_transformers_shares_every_parameter():
    layer = decoder_layer()
    moe = Gemma4MoE.from_transformers(layer)
    parameters = dict(moe.named_parameters())
    assert set(parameters) == set(KEYS)
    for name, parameter in parameters.items():
        assert parameter is layer.get_parameter(name)
    assert moe.training == layer.training
    assert not Gemma4MoE.from_transformers(layer.eval()).training


def test_from_transformers_keeps_what_the_projection_is():
    layer = decoder_layer()
    layer.router.proj = Doubled(32, 6, bias=False)
    moe = Gemma4MoE.from_transformers(layer.eval())
    assert moe.router.proj is layer.router.proj
    hidden_states = torch.randn(9, 32)
    torch.testing.assert_close(moe(hidden_states), transformers_moe(layer, hidden_states, hidden_states))


def test_from_transformers_leaves_the_mode_of_what_it_shares():
    layer = decoder_layer().eval()
    layer.router.proj.train()
    moe = Gemma4MoE.from_transformers(layer)
    assert (moe.training, moe.router.training, moe.experts.training) == (False, False, False)
    assert layer.router.proj.training


HOOKS = {
    "_forward_hooks": lambda module, hook: module.register_forward_hook(hook),
    "_forward_pre_hooks": lambda module, hook: module.register_forward_pre_hook(hook),
    "_backward_hooks": lambda module, hook: module.register_full_backward_hook(hook),
    "_backward_pre_hooks": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("part", ["router", "experts"])
@pytest.mark.parametrize("kind", HOOKS)
def test_from_transformers_refuses_hooks(kind, part):
    """Nothing would call them."""
    layer = decoder_layer()
    module = getattr(layer, part)
    handle = HOOKS[kind](module, lambda *arguments: None)
    with pytest.raises(ValueError, match=f"{part} must have no hooks, .* got {kind} of {type(module).__name__}"):
        Gemma4MoE.from_transformers(layer)
    handle.remove()
    assert Gemma4MoE.from_transformers(layer).router.scale is layer.router.scale


def layer_with_transformers_own_hooks():
    model = randomize(transformers_gemma4().Gemma4ForCausalLM(transformers_config())).eval()
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    layer = model.model.layers[0]
    assert layer.router._forward_hooks
    return layer


def test_from_transformers_takes_a_layer_with_transformers_own_hooks():
    layer = layer_with_transformers_own_hooks()
    assert Gemma4MoE.from_transformers(layer).router.scale is layer.router.scale


@pytest.mark.parametrize("module", [__name__, "transformers.trainer"])
def test_from_transformers_refuses_a_hook_beside_transformers_own(module):
    layer = layer_with_transformers_own_hooks()

    def hook(*arguments):
        pass

    hook.__module__ = module
    layer.router.register_forward_hook(hook)
    with pytest.raises(ValueError, match="router must have no hooks, which would be lost, got _forward_hooks"):
        Gemma4MoE.from_transformers(layer)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_from_transformers_wants_both_weights_of_the_experts(name):
    layer = decoder_layer()
    delattr(layer.experts, name)
    with pytest.raises(ValueError, match=f"experts must hold the parameter {name}, got Gemma4TextExperts"):
        Gemma4MoE.from_transformers(layer)


def test_from_transformers_wants_experts_that_hold_their_weights():
    """An adapter's wrapper would be left out."""
    layer = decoder_layer()
    layer.experts = torch.nn.Sequential(layer.experts)
    with pytest.raises(ValueError, match="experts must hold the parameter gate_up_proj, got Sequential"):
        Gemma4MoE.from_transformers(layer)


@pytest.mark.parametrize("layer", [torch.nn.Linear(2, 2), "dense"], ids=["not a decoder layer", "dense decoder layer"])
def test_from_transformers_wants_experts(layer):
    if layer == "dense":
        layer = decoder_layer(enable_moe_block=False)
    with pytest.raises(ValueError, match=r"decoder_layer must have .router and .experts \(enable_moe_block=True\)"):
        Gemma4MoE.from_transformers(layer)


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("gelu_pytorch_tanh", MoEActivation.GELU_TANH),
        ("gelu", MoEActivation.GELU),
        ("silu", MoEActivation.SILU),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_transformers(dtype, name, member):
    """hidden_activation is what the config says; the router sees the residual and the experts what is normalised."""
    layer = decoder_layer(hidden_activation=name).to(dtype)
    moe = Gemma4MoE.from_transformers(layer)
    assert moe.experts.activation is member
    residual = torch.randn(50, 32, dtype=dtype)
    normed = layer.pre_feedforward_layernorm_2(residual)
    expected = transformers_moe(layer, normed, residual)
    # transformers' routing weights are float32 in both dtypes, and so are ours; sums of 24 and 32 terms near one.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(moe(normed, residual), expected, rtol=tolerance, atol=tolerance)
    batched = moe(normed.view(5, 10, 32), residual.view(5, 10, 32))
    torch.testing.assert_close(batched.view(50, 32), expected, rtol=tolerance, atol=tolerance)


def test_router_probabilities_are_the_same_bits(device):
    """The logits are rounded where transformers rounds them: in bfloat16 the ties depend on it."""
    layer = decoder_layer().to(device, torch.bfloat16)
    router = Gemma4MoE.from_transformers(layer).router
    hidden_states = torch.randn(200, 32, device=device, dtype=torch.bfloat16)
    probabilities, weights, index = router(hidden_states)
    assert torch.equal(probabilities, layer.router(hidden_states)[0])
    assert (probabilities.dtype, weights.dtype, index.dtype) == (torch.float32, torch.float32, torch.int64)


def test_router_differs_from_transformers_in_exact_ties_only(device, capsys):
    layer = decoder_layer(num_experts=64, top_k_experts=8).to(device, torch.bfloat16)
    router = Gemma4MoE.from_transformers(layer).router
    hidden_states = torch.randn(2000, 32, device=device, dtype=torch.bfloat16)
    probabilities, weights, index = router(hidden_states)
    _, their_weights, their_index = layer.router(hidden_states)
    ours, theirs = probabilities.gather(-1, index), probabilities.gather(-1, their_index)
    differs = index != their_index
    with capsys.disabled():
        print(
            f"\n{differs.sum().item()} of {differs.numel()} choices differ from torch.topk's on {device.type}, all ties"
        )
    assert torch.equal(ours, theirs)
    assert (ours[:, :-1] == ours[:, 1:]).any(), "the case holds no ties"
    torch.testing.assert_close(weights[~differs], their_weights[~differs].float(), rtol=1e-6, atol=0)


class Doubled(torch.nn.Linear):
    """What an adapter around a projection may be."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_router_calls_a_projection_that_is_more_than_its_weight(device):
    router, states = randomize(Gemma4Router(CONFIG)).to(device), torch.randn(4, 32, device=device)
    plain = router.logits(states)
    handle = router.proj.register_forward_hook(lambda module, inputs, output: 3 * output)
    torch.testing.assert_close(router.logits(states), 3 * plain)
    handle.remove()
    wrapped = Doubled(32, 6, bias=False).to(device)
    wrapped.weight = router.proj.weight
    router.proj = wrapped
    torch.testing.assert_close(router.logits(states), 2 * plain)


def test_router_calls_a_projection_s_forward_that_was_replaced(device):
    router, states = randomize(Gemma4Router(CONFIG)).to(device), torch.randn(4, 32, device=device)
    plain, kept = router.logits(states), router.proj.forward
    router.proj.forward = lambda input: 2 * kept(input)
    torch.testing.assert_close(router.logits(states), 2 * plain)


@pytest.mark.parametrize("kind", HOOKS)
def test_router_calls_every_kind_of_hook_of_its_projection(device, kind):
    router, called = randomize(Gemma4Router(CONFIG)).to(device), []
    HOOKS[kind](router.proj, lambda *arguments: called.append(kind))
    router.logits(torch.randn(4, 32, device=device)).sum().backward()
    assert called == [kind]


def test_router_adds_a_bias_of_its_projection(device):
    router, states = randomize(Gemma4Router(CONFIG)).to(device), torch.randn(4, 32, device=device)
    plain = router.logits(states)
    router.proj.bias = torch.nn.Parameter(torch.arange(6.0, device=device))
    torch.testing.assert_close(router.logits(states), plain + torch.arange(6.0, device=device))


@pytest.mark.parametrize("name", ["scale", "proj.weight"])
def test_router_refuses_parameters_of_another_device(name):
    router = Gemma4Router(CONFIG)
    module = router.get_submodule(name.rpartition(".")[0])
    setattr(module, name.rpartition(".")[2], torch.nn.Parameter(router.get_parameter(name).to("meta")))
    with pytest.raises(ValueError, match=f"{name} must be on hidden_states's device cpu, got meta"):
        router(torch.randn(4, 32))


def test_router_refuses_a_scale_that_makes_another_dtype_of_the_states(device):
    router = randomize(Gemma4Router(CONFIG)).to(device, torch.bfloat16)
    router.scale.data = router.scale.data.float()
    with pytest.raises(TypeError, match=r"must have proj.weight's dtype torch.bfloat16"):
        router.logits(torch.randn(4, 32, device=device, dtype=torch.bfloat16))


def test_router_under_autocast(device):
    router, states = randomize(Gemma4Router(CONFIG)).to(device), torch.randn(4, 32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert router.logits(states).dtype == torch.bfloat16


@slow_on_cuda
def test_experts_call_is_transformers(device):
    layer = decoder_layer().to(device)
    experts = Gemma4MoE.from_transformers(layer).experts
    hidden_states = torch.randn(9, 32, device=device)
    _, weights, index = layer.router(hidden_states)
    expected = layer.experts(hidden_states, index, weights)
    torch.testing.assert_close(experts(hidden_states, index, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_deepcopy_and_pickle(device, copied):
    moe = randomize(Gemma4MoE(CONFIG, backend="reference")).to(device)
    hidden_states = torch.randn(4, 32, device=device)
    twin = copied(moe)
    assert (twin.config, twin.experts.backend) == (CONFIG, "reference")
    assert twin.experts.activation is MoEActivation.GELU_TANH
    assert twin.router.scale.data_ptr() != moe.router.scale.data_ptr()
    torch.testing.assert_close(twin(hidden_states), moe(hidden_states))


def test_a_reassigned_parameter_is_seen(device):
    moe = randomize(Gemma4MoE(CONFIG)).to(device, torch.bfloat16)
    hidden_states = torch.randn(4, 32, device=device, dtype=torch.bfloat16)
    assert moe(hidden_states).any()
    moe.experts.down_proj = torch.nn.Parameter(torch.zeros_like(moe.experts.down_proj))
    assert not moe(hidden_states).any()


@pytest.mark.parametrize("module", [Gemma4MoE, Gemma4Experts])
def test_an_unknown_backend_is_refused_at_once(module):
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'fused', .*\], got 'zzz'"):
        module(CONFIG, backend="zzz")


def test_from_transformers_hands_the_backend_on():
    assert Gemma4MoE.from_transformers(decoder_layer(), backend="reference").experts.backend == "reference"


def test_backend_is_the_module_s():
    moe = randomize(Gemma4MoE(CONFIG, backend="grouped"))
    with pytest.raises(ValueError, match="backend 'grouped' does not serve this call"):
        moe(torch.randn(4, 32))


@pytest.mark.parametrize(
    ("hidden_states", "router_hidden_states", "error", "message"),
    [
        (torch.ones(4, 16), None, ValueError, r"hidden_states must have 32 columns, got shape \[4, 16\]"),
        (torch.ones(()), None, ValueError, r"hidden_states must have 32 columns, got shape \[\]"),
        (None, None, TypeError, r"hidden_states must be a torch.Tensor, got NoneType"),
        (
            torch.ones(4, 32).int(),
            None,
            TypeError,
            r"hidden_states must be a floating-point tensor of at",
        ),
        (
            torch.ones(4, 32),
            torch.ones(3, 32),
            ValueError,
            r"router_hidden_states must have hidden_states' shape \[4, 32\], got",
        ),
        (
            torch.ones(4, 32),
            torch.ones(2, 2, 32),
            ValueError,
            r"router_hidden_states must have hidden_states' shape \[4, 32\], got \[2, 2, 32\]",
        ),
        (torch.ones(4, 32), [1.0], TypeError, r"router_hidden_states must be a torch.Tensor, got list"),
    ],
)
def test_moe_refuses(hidden_states, router_hidden_states, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Gemma4MoE(CONFIG)(hidden_states, router_hidden_states)


@pytest.mark.parametrize(
    ("hidden_states", "error", "message"),
    [
        (torch.ones(4, 16), ValueError, r"hidden_states must have 32 columns, got shape \[4, 16\]"),
        (torch.ones(32), ValueError, r"hidden_states must have shape \[\*, 32\], got \[32\]"),
        (torch.ones(2, 4, 32), ValueError, r"hidden_states must have shape \[\*, 32\], got \[2, 4, 32\]"),
        (None, TypeError, r"hidden_states must be a torch.Tensor, got NoneType"),
        (torch.ones(4, 32).long(), TypeError, r"hidden_states must be a floating-point .* 16 bits, got torch.int64"),
        (torch.ones(4, 32).to(torch.float8_e4m3fn), TypeError, r"of at least 16 bits, got torch.float8_e4m3fn"),
        (torch.ones(4, 32).double(), TypeError, r"must have proj.weight's dtype torch.float32, got torch.float64"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "route"])
def test_router_refuses(method, hidden_states, error, message):
    with pytest.raises(error, match=message):
        getattr(Gemma4Router(CONFIG), method)(hidden_states)


def test_load_decoder_layer_refuses_the_meta_device():
    state_dict = Gemma4MoE(CONFIG).state_dict()
    with torch.device("meta"):
        moe = Gemma4MoE(CONFIG)
    with pytest.raises(ValueError, match=r"router.scale must not be on the meta device"):
        moe.load_decoder_layer(state_dict)


def test_moe_of_no_tokens(device):
    moe = randomize(Gemma4MoE(CONFIG)).to(device)
    assert moe(torch.empty(2, 0, 32, device=device)).shape == (2, 0, 32)
