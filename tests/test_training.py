"""Training with the experts: what is kept and recomputed, and that torch's own tools find nothing unusual in it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cupymoe
from cupymoe import Gemma4Experts, Gemma4MoE, Gemma4MoEConfig, MoEExperts, accumulate_in_float32, integrations, set_keep
from tests.helpers import randomize, relative_error, shapes_saved, transformers_config, transformers_gemma4

E, H, I, K, T = 6, 32, 24, 2, 12  # noqa: E741
CONFIG = Gemma4MoEConfig(H, I, E, K, "gelu_pytorch_tanh")
GATE_UP = (T * K, 2 * I)
KEEP = ("gate_up", "input")


pytestmark = pytest.mark.usefixtures("gate_up_kept_on_the_cpu_too")


def dtype_on(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def new_moe(device, **settings):
    return randomize(Gemma4MoE(CONFIG, **settings)).to(device, dtype_on(device))


def states(device, num_tokens=T):
    return torch.randn(num_tokens, H, device=device, dtype=dtype_on(device))


def gradients(module, call, *, backward=torch.Tensor.backward):
    """Of every parameter, and of the input, for which ``call`` gets a leaf."""
    module.zero_grad()
    leaf = states(torch.device("cpu")).to(module.router.scale).requires_grad_()
    backward(call(leaf).float().square().mean())
    return {"input": leaf.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def same_input():
    torch.manual_seed(5)


def rounding_of(name, device):
    """How far apart two computations of a gradient may be: on the CPU the forward that keeps sums in another order, and
    on CUDA torch adds up the gradient of the router's scale in any."""
    if device.type == "cpu":
        return 1e-5
    return 1e-2 if name == "router.per_expert_scale" else 0


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        rounding = rounding_of(name, gradient.device)
        torch.testing.assert_close(found[name], gradient, rtol=rounding, atol=rounding * gradient.abs().max().item())


# --- keep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEP)
def test_modules_keep_what_they_are_told(device, keep):
    index, weights = torch.arange(T * K, device=device).view(T, K) % E, torch.rand(T, K, device=device)
    for experts in (Gemma4Experts(CONFIG, keep=keep), MoEExperts(E, H, I, "silu", keep=keep)):
        randomize(experts).to(device, dtype_on(device))
        saved = shapes_saved(lambda experts=experts: experts(states(device), index, weights))
        assert (GATE_UP in saved) == (keep == "gate_up")
    moe = new_moe(device, keep=keep)
    assert (GATE_UP in shapes_saved(lambda: moe(states(device)))) == (keep == "gate_up")
    with torch.no_grad():
        assert GATE_UP not in shapes_saved(lambda: moe(states(device)))


@pytest.mark.parametrize("keep", KEEP)
def test_a_shared_layer_keeps_what_it_is_told(keep):
    layer = randomize(transformers_gemma4().Gemma4TextDecoderLayer(transformers_config(), layer_idx=0))
    assert Gemma4MoE.from_transformers(layer, keep=keep).experts.keep == keep


def test_keep_can_be_set_later(device):
    moe, hidden = new_moe(device), states(device)
    for keep in KEEP:
        assert set_keep(moe, keep) == 1
        assert moe.experts.keep == keep
        assert (GATE_UP in shapes_saved(lambda: moe(hidden))) == (keep == "gate_up")


@pytest.mark.parametrize(
    "make",
    [
        lambda keep: Gemma4Experts(CONFIG, keep=keep),
        lambda keep: Gemma4MoE(CONFIG, keep=keep),
        lambda keep: MoEExperts(E, H, I, "silu", keep=keep),
        lambda keep: set_keep(Gemma4MoE(CONFIG), keep),
    ],
)
def test_another_keep_is_refused_by_name(make):
    with pytest.raises(ValueError, match="keep must be 'gate_up' or 'input', got 'all'"):
        make("all")


def test_nothing_to_set_keep_of_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model must hold .* experts set to cupymoe .*; Linear holds none"):
        set_keep(torch.nn.Linear(2, 2), "input")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        set_keep([], "input")


# --- checkpointing ----------------------------------------------------------------------------------------------------

WAYS = {
    "reentrant": ({"use_reentrant": True}, 2),
    "not reentrant": ({"use_reentrant": False}, 2),
    "selective": ({"use_reentrant": False, "context_fn": cupymoe.selective_checkpoint_contexts}, 1),
}
"""Of checkpointing, and how often it computes the experts' forward."""


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_gives_the_same_gradients(device, computed, way, keep):
    moe = new_moe(device, keep=keep)
    settings, forwards = WAYS[way]
    same_input()
    expected = gradients(moe, moe)
    assert computed == ["forward", "backward"]
    computed.clear()
    same_input()
    found = gradients(moe, lambda hidden: checkpoint(moe, hidden, **settings))
    assert computed == ["forward"] * forwards + ["backward"]
    assert_same(found, expected)


def test_selective_checkpointing_recomputes_the_rest(device):
    """Or it would save memory nowhere."""
    moe, calls = new_moe(device), []
    moe.router.register_forward_hook(lambda *_: calls.append("router"))
    output = checkpoint(moe, states(device), use_reentrant=False, context_fn=cupymoe.selective_checkpoint_contexts)
    output.sum().backward()
    assert len(calls) == 2


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_gradients_of_two_batches_add_up(device):
    moe = new_moe(device)
    batches = [states(device) for _ in range(2)]
    each = []
    for batch in batches:
        moe.zero_grad()
        moe(batch).sum().backward()
        each.append([parameter.grad.clone() for parameter in moe.experts.parameters()])
    moe.zero_grad()
    for batch in batches:
        moe(batch).sum().backward()
    for parameter, *parts in zip(moe.experts.parameters(), *each, strict=True):
        assert torch.equal(parameter.grad, sum(parts))


@pytest.mark.parametrize("keep", KEEP)
def test_gradients_asked_for_twice_are_the_same(device, keep):
    moe = new_moe(device, keep=keep)
    loss = moe(states(device)).float().square().mean()
    first, second = (torch.autograd.grad(loss, [*moe.experts.parameters()], retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("keep", KEEP)
def test_what_is_saved_is_torch_s_and_never_overwritten(device, keep):
    """Hooks that watch it see plain tensors, that hold the same bits when the backward asks for them."""
    moe = new_moe(device, keep=keep)
    unpacked = []

    def pack(tensor):
        assert type(tensor) in (torch.Tensor, torch.nn.Parameter)
        return tensor, tensor._version, tensor.detach().clone()

    def unpack(packed):
        tensor, version, bits = packed
        assert tensor._version == version
        assert torch.equal(tensor, bits)
        unpacked.append(tuple(tensor.shape))
        return tensor

    same_input()
    expected = gradients(moe, moe)
    same_input()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert_same(gradients(moe, moe), expected)
    assert (GATE_UP in unpacked) == (keep == "gate_up")


@pytest.mark.parametrize("keep", KEEP)
def test_what_is_saved_can_wait_on_the_cpu(device, keep):
    moe = new_moe(device, keep=keep)
    same_input()
    expected = gradients(moe, moe)
    same_input()
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(moe, moe), expected)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
def test_compiled_with_its_backward(device, computed, keep):
    """The partitioner, which chooses what is saved for the backward, takes our op for one that is not repeated."""
    torch._dynamo.reset()
    moe = new_moe(device, keep=keep)
    same_input()
    expected = gradients(moe, moe)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager_decomp_partition")
    computed.clear()
    same_input()
    found = gradients(moe, compiled)
    assert computed == ["forward", "backward"]
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient.double()) < (2e-2 if device.type == "cuda" else 1e-5), name


# --- main_grad --------------------------------------------------------------------------------------------------------


def test_small_gradients_are_not_lost_in_float32(device):
    """In bfloat16 a sum stops growing at 256 times the size of what is added."""
    experts = randomize(Gemma4Experts(CONFIG)).to(device, torch.bfloat16)
    index, weights = torch.arange(T * K, device=device).view(T, K) % E, torch.rand(T, K, device=device)
    hidden = states(device).bfloat16()

    def backward():
        experts(hidden, index, weights).sum().backward()

    backward()
    one = [parameter.grad.double() for parameter in experts.parameters()]
    experts.zero_grad()
    handles = accumulate_in_float32(experts)
    for _ in range(400):
        backward()
    for parameter, grad in zip(experts.parameters(), one, strict=True):
        assert parameter.grad is None
        assert parameter.main_grad.dtype == torch.float32
        torch.testing.assert_close(parameter.main_grad.double(), 400 * grad, rtol=1e-4, atol=0)
    for handle in handles:
        handle.remove()
    backward()
    assert experts.down_proj.grad is not None


def test_main_grad_is_the_gradient(device):
    """Of one backward pass, of every parameter; asked for twice, the hooks add it once."""
    moe = new_moe(device)
    same_input()
    expected = gradients(moe, moe)
    accumulate_in_float32(moe)
    accumulate_in_float32(moe.experts)
    same_input()
    gradients(moe, moe)
    assert all(parameter.grad is None for parameter in moe.parameters())
    assert all(parameter.main_grad.dtype == torch.float32 for parameter in moe.parameters())
    found = {name: parameter.main_grad.to(parameter.dtype) for name, parameter in moe.named_parameters()}
    assert_same({"input": expected["input"], **found}, expected)


def test_nothing_to_accumulate_is_refused_by_name():
    with pytest.raises(ValueError, match="module must have a parameter that requires a gradient; Gemma4MoE has none"):
        accumulate_in_float32(Gemma4MoE(CONFIG).requires_grad_(False))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got Parameter"):
        accumulate_in_float32(torch.nn.Parameter(torch.zeros(1)))


def test_a_compiled_module_sees_what_it_is_set_to_keep():
    """Also one whose code was compiled for another instance."""

    class Experts(torch.nn.Module):
        def forward(self, x):
            return x + (integrations.keep_of(self) == "input")

    torch._dynamo.reset()
    one, other = Experts(), Experts()
    setattr(other, integrations.KEEP, "input")
    compiled = [torch.compile(module, fullgraph=True, backend="eager") for module in (one, other)]
    zero = torch.zeros(1)
    assert [int(call(zero)) for call in compiled] == [0, 1]
    setattr(one, integrations.KEEP, "input")
    assert int(compiled[0](zero)) == 1
