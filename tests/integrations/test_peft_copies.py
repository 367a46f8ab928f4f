"""Packed copies of PEFT's adapters, kept between calls: which calls read them, and when they are packed again."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from cupymoe import MoEExperts, refresh_adapters
from tests.helpers import randomize, transformers_gemma4
from tests.test_customised_modules import one_process

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers", minversion="5.0")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.peft")
# PEFT 0.21 reads a property under the name that transformers 5.24 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK, EXPERTS = 5, 6
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
FACTORS = ("gate_up a", "gate_up b", "down a", "down b")


def lora(**changes):
    return peft.LoraConfig(
        **{"target_modules": [], "target_parameters": TARGETS, "r": RANK, "lora_alpha": 6, **changes}
    )


def adapted(device="cpu", dtype=torch.bfloat16, autocast_adapter_dtype=True, transposed=False, **changes):
    """Experts alone with an adapter of numbers that are not zero, in float32 unless PEFT is told otherwise."""
    torch.manual_seed(1)
    experts = randomize(MoEExperts(EXPERTS, 32, 24, "gelu_tanh", transposed=transposed)).to(device, dtype)
    model = peft.get_peft_model(
        torch.nn.ModuleDict({"experts": experts}), lora(**changes), autocast_adapter_dtype=autocast_adapter_dtype
    )
    integration.use_low_rank(model)
    return drawn(model)


def drawn(model):
    for parameter in factors_of(model):
        torch.nn.init.normal_(parameter, std=0.25)
    return model


def factors_of(model, adapter="default"):
    return [parameter for name, parameter in model.named_parameters() if f".{adapter}." in name]


def inputs(device="cpu", dtype=torch.bfloat16, num_tokens=9):
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(num_tokens, 32, generator=generator).to(device, dtype)
    index = torch.randint(0, EXPERTS, (num_tokens, 2), generator=generator).to(device)
    return states, index, torch.rand(num_tokens, 2, generator=generator).to(device)


def call(model, **placed):
    """Of the wrapper; no gradient is recorded."""
    with torch.no_grad():
        return model.get_base_model()["experts"](*inputs(**placed))


@pytest.fixture
def seen(monkeypatch):
    """Of each unmerged call, both adapters as they were handed on."""
    calls, kept = [], integration.lora_experts

    def spy(*arguments, **settings):
        calls.append(arguments[5:7])
        return kept(*arguments, **settings)

    monkeypatch.setattr(integration, "lora_experts", spy)
    return calls


def addresses(pair):
    return [factor.data_ptr() for adapter in pair for factor in adapter[:2]]


def given(model):
    """What the parameters hold now, as views of them."""
    wrapper, names = model.get_base_model()["experts"], model.active_adapters
    pair = {each.parameter_name: each for each in (wrapper, wrapper.base_layer)}
    weights = wrapper.get_base_layer().projections()[:2]
    return [
        (integration._Adapted(weight, pair[name], tuple(names), weight.dtype).given(), weight)
        for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True)
    ]


def assert_up_to_date(pair, model):
    for adapter, (plain, weight) in zip(pair, given(model), strict=True):
        expected = plain.packed(weight)
        assert adapter.scaling == 1.0
        assert torch.equal(adapter.a, expected.a)
        assert torch.equal(adapter.b, expected.b)
        for factor in adapter[:2]:
            assert factor.dtype == weight.dtype
            assert (factor if weight.is_contiguous() else factor.mT).is_contiguous()


def assert_copied(pair, model):
    parameters = {parameter.untyped_storage().data_ptr() for parameter in factors_of(model)}
    assert parameters.isdisjoint(addresses(pair))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_copy_is_made_once_and_taken_as_it_is(dtype, transposed, seen):
    model = adapted(dtype=dtype, transposed=transposed)
    first, second = call(model, dtype=dtype), call(model, dtype=dtype)
    assert torch.equal(first, second)
    assert addresses(seen[0]) == addresses(seen[1])
    assert_up_to_date(seen[1], model)
    assert_copied(seen[1], model)
    for adapter, (_, weight) in zip(seen[1], given(model), strict=True):
        packed = adapter.packed(weight)
        assert (packed.a, packed.b) == (adapter.a, adapter.b) or addresses([packed]) == addresses([adapter])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_changes_no_bit(transposed, device, monkeypatch):
    model = adapted(device, transposed=transposed)
    with_copies = call(model, device=device)
    monkeypatch.setattr(integration, "are_stand_ins_about", lambda: True)
    assert torch.equal(call(model, device=device), with_copies)


CHANGES = {
    "copy_": lambda model: factors_of(model)[0].copy_(torch.ones(())),
    "a view of it": lambda model: factors_of(model)[1].view(-1)[3:].zero_(),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items() if "lora_" in name}, strict=False
    ),
    "assigned": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items() if "lora_" in name}, strict=False, assign=True
    ),
    "other data": lambda model: setattr(factors_of(model)[2], "data", factors_of(model)[2] + 1),
    "scaling": lambda model: model.get_base_model()["experts"].scaling.update(default=3.0),
    "random": lambda model: drawn(model),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_packed_in_place(change, mode, seen):
    if change in ("assigned", "other data") and mode is torch.inference_mode:
        pytest.skip("the parameters would be inference tensors")
    model = adapted()
    before = call(model)
    with mode():
        CHANGES[change](model)
    after = call(model)
    assert not torch.equal(after, before)
    assert addresses(seen[0]) == addresses(seen[1])
    assert_up_to_date(seen[1], model)


@pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_a_step_of_the_optimizer_is_seen(settings, seen):
    """Torch counts no write of a fused one."""
    model = adapted()
    call(model)
    optimizer = torch.optim.AdamW(factors_of(model), lr=0.1, **settings)
    for parameter in factors_of(model):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    call(model)
    assert addresses(seen[0]) == addresses(seen[1])
    assert_up_to_date(seen[1], model)


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=str)
def test_a_step_that_is_compiled_is_seen_and_compiled_once(settings, seen):
    model = adapted()
    call(model)
    optimizer = torch.optim.SGD(factors_of(model), lr=0.1, **settings)
    compiler = CompileCounter()
    step = torch.compile(optimizer.step, backend=compiler)
    for _ in range(3):
        for parameter in factors_of(model):
            parameter.grad = torch.randn_like(parameter)
        step()
        call(model)
        assert_up_to_date(seen[-1], model)
    assert compiler.frame_count == (0 if settings else 1)  # torch compiles no fused step


def test_other_memory_at_the_same_address_is_not_taken_for_the_same(seen):
    """As an allocator gives it, when what was there is gone; that ``.data`` is replaced counts as no write."""
    model = adapted()
    parameter = model.get_base_model()["experts"].base_layer.lora_A["default"].weight  # of gate_up_proj
    memory = np.ones((RANK * EXPERTS, 32), np.float32)
    parameter.data = torch.from_numpy(memory)
    call(model)
    version = parameter._version
    memory[:] = 2
    parameter.data = torch.from_numpy(memory)
    assert (parameter.data_ptr(), parameter._version) == (memory.ctypes.data, version)
    call(model)
    assert addresses(seen[0]) == addresses(seen[1])
    assert_up_to_date(seen[1], model)


def test_a_write_through_data_is_stale_until_it_is_refreshed(seen):
    """Torch counts none: this is what ``refresh_adapters`` is for."""
    model = adapted()
    before = call(model)
    for parameter in factors_of(model):
        parameter.data.mul_(2)
    assert torch.equal(call(model), before)
    assert refresh_adapters(model) == 2
    assert not torch.equal(call(model), before)
    assert addresses(seen[0]) == addresses(seen[2])
    assert_up_to_date(seen[2], model)


def test_peft_s_hotswap_is_such_a_write(tmp_path, seen):
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = call(model)
    with torch.no_grad():
        drawn(model)
    before = call(model)
    assert not torch.equal(before, expected)
    hotswap = pytest.importorskip("peft.utils.hotswap")
    hotswap.hotswap_adapter(model, str(tmp_path), "default")
    refresh_adapters(model)
    assert torch.equal(call(model), expected)


def test_a_differentiated_call_reads_the_parameters(seen):
    model = adapted()
    call(model)
    model.get_base_model()["experts"](*inputs())
    assert addresses(seen[1]) == addresses([plain for plain, _ in given(model)])
    frozen = factors_of(model)
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.get_base_model()["experts"](*inputs())  # nothing requires a gradient
    assert addresses(seen[2]) == addresses(seen[0])
    states, *others = inputs()
    model.get_base_model()["experts"](states.requires_grad_(), *others).sum().backward()
    assert states.grad.any()
    assert addresses(seen[3]) == addresses(seen[1])


def test_training_alone_keeps_nothing():
    model = adapted()
    model.get_base_model()["experts"](*inputs()).sum().backward()
    assert model.get_base_model()["experts"] not in integration._copies


def test_a_step_that_torch_does_not_count_is_seen_after_a_differentiated_call(seen):
    """As optimizers take that hold all parameters in one flat buffer."""
    model = adapted()
    call(model)
    model.get_base_model()["experts"](*inputs()).sum().backward()
    for parameter in factors_of(model):
        parameter.data.sub_(parameter.grad)
    call(model)
    assert addresses(seen[2]) == addresses(seen[0])
    assert_up_to_date(seen[2], model)


def test_the_sum_of_adapters_has_a_copy_of_its_own(seen):
    model = adapted()
    model.add_adapter("second", lora(r=3))
    for parameter in factors_of(model, "second"):
        torch.nn.init.normal_(parameter, std=0.25)
    sets = ["default"], ["default", "second"], ["second"]
    for names in (*sets, *sets):
        model.base_model.set_adapter(names)
        call(model)
        assert model.active_adapters == names
        assert_up_to_date(seen[-1], model)
    assert [addresses(pair) for pair in seen[:3]] == [addresses(pair) for pair in seen[3:]]
    assert len({address for pair in seen for address in addresses(pair)}) == 12
    for adapter in ("default", "second"):
        for parameter in factors_of(model, adapter):
            parameter.data.mul_(2)
    assert refresh_adapters(model) == 6
    for pair, names in zip(seen[:3], sets, strict=True):
        model.base_model.set_adapter(names)
        assert_up_to_date(pair, model)
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert refresh_adapters(model) == 2


def test_a_sum_as_wide_as_before_but_of_other_ranks(seen):
    model = adapted()
    call(model)
    model.delete_adapter("default")
    model.add_adapter("default", lora(r=3))
    model.base_model.set_adapter("default")
    with torch.no_grad():
        drawn(model)
    call(model)
    assert_up_to_date(seen[1], model)


def test_a_factor_that_is_packed_already_is_not_copied(seen):
    model = adapted(autocast_adapter_dtype=False, r=16)
    call(model)
    refresh_adapters(model)
    for adapter, (plain, _) in zip(seen[0], given(model), strict=True):
        assert adapter.a.data_ptr() == plain.a.data_ptr()
        assert adapter.b.data_ptr() != plain.b.data_ptr()
    assert_up_to_date(seen[0], model)


def test_another_dtype_of_the_weights(seen):
    model = adapted()
    call(model)
    model.get_base_model()["experts"].get_base_layer().half()
    call(model, dtype=torch.float16)
    assert_up_to_date(seen[1], model)


def test_inference_mode_first_and_last(seen):
    """What it allocates is an ordinary tensor, which is packed again in and out of it."""
    model = adapted()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            model.get_base_model()["experts"](*inputs())
        assert not any(factor.is_inference() for adapter in seen[-1] for factor in adapter[:2])
        assert_up_to_date(seen[-1], model)
        with torch.no_grad():
            drawn(model)
    assert len({tuple(addresses(pair)) for pair in seen}) == 1


def test_inference_tensors_are_packed_in_each_call(seen):
    """Torch counts no writes to them."""
    with torch.inference_mode():
        model = adapted()
        for _ in range(2):
            model.get_base_model()["experts"](*inputs())
            assert addresses(seen[-1]) == addresses([plain for plain, _ in given(model)])
        assert refresh_adapters(model) == 0


def test_parameters_that_fsdp_gathers_are_packed_in_each_call(seen):
    model = adapted(dtype=torch.float32)
    expected = call(model, dtype=torch.float32)
    with one_process() as mesh:
        torch.distributed.fsdp.fully_shard(model.get_base_model()["experts"], mesh=mesh)
        torch.testing.assert_close(call(model, dtype=torch.float32), expected)
        assert refresh_adapters(model) == 0
    assert seen[1][0].scaling == 6 / RANK


def test_modes_and_transforms_see_the_parameters(seen):
    model = adapted(r=16)
    call(model)
    with FlopCounterMode(display=False) as counter:
        call(model)
    assert counter.get_total_flops() > 0
    wrapper = model.get_base_model()["experts"]
    states, index, weights = inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        torch.func.vmap(lambda x: wrapper(x, index, weights))(states[None])
        changed = {name: value + 1 for name, value in model.named_parameters() if "lora_" in name}
        changed = {name.partition("experts.")[2]: value for name, value in changed.items()}
        plain = wrapper(states, index, weights)
        other = torch.func.functional_call(wrapper, changed, (states, index, weights))
        assert torch.equal(wrapper(states, index, weights), plain)
    assert not torch.equal(other, plain)
    parameters = addresses([adapter for adapter, _ in given(model)])
    assert addresses(seen[1]) == parameters
    assert addresses(seen[0]) == addresses(seen[-1]) != parameters


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
def test_a_compiled_call_reads_the_parameters(device):
    model = adapted(device)
    compiled = torch.compile(model.get_base_model()["experts"], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            for parameter in factors_of(model):
                parameter.data.mul_(1.5)
            output = compiled(*inputs(device))
        refresh_adapters(model)
        assert torch.equal(output, call(model, device=device))


def test_adapters_that_do_not_fit_are_named_as_before():
    model = adapted()
    with torch.no_grad():
        wrapper = model.get_base_model()["experts"]
        wrapper.lora_A["default"].weight = torch.nn.Parameter(torch.randn(RANK * EXPERTS, 16))
    with pytest.raises(ValueError, match=r"_adapter\.a must have shape"):
        call(model)


def test_no_trace_in_the_model():
    """What is saved, moved, copied and pickled knows nothing of the copies."""
    model, fresh = adapted(), adapted()
    output = call(model)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert dict(model.named_buffers()).keys() == dict(fresh.named_buffers()).keys()
    ours, theirs = (
        [vars(module).keys() for module in each.modules() if isinstance(module, integration.ParamWrapper)]
        for each in (model, fresh)
    )
    assert ours == theirs
    file = io.BytesIO()
    torch.save(model, file)
    sizes = [len(pickle.dumps(each.get_base_model().state_dict())) for each in (model, fresh)]
    assert sizes[0] == sizes[1]
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in factors_of(other):
                parameter.zero_()
        assert not torch.equal(call(other), output)
        assert torch.equal(call(model), output)


def test_copies_go_with_the_model(seen):
    model = adapted()
    call(model)
    storages = [weakref.ref(factor) for adapter in seen[0] for factor in adapter[:2]]
    seen.clear()
    del model
    gc.collect()
    assert [storage() for storage in storages] == [None] * 4


def test_refresh_makes_what_is_missing(seen):
    model = adapted()
    wrapper = model.get_base_model()["experts"]
    assert refresh_adapters(model) == 2
    kept = [integration._copies[each][("default",)]._factors for each in (wrapper.base_layer, wrapper)]
    call(model)
    assert addresses(seen[0]) == [factor.data_ptr() for factors in kept for factor in factors]


def test_refresh_without_anything_to_refresh():
    merging = peft.get_peft_model(torch.nn.ModuleDict({"experts": MoEExperts(2, 8, 8, "silu")}), lora())
    with pytest.raises(
        ValueError, match=r"model must have adapters that are .*, and PeftModel has none: call .*use_low_rank"
    ):
        refresh_adapters(merging)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        refresh_adapters({})
    model = adapted()
    model.get_base_model()["experts"].get_base_layer().backend = "reference"
    assert refresh_adapters(model) == 0  # PEFT merges there


def test_threads_that_call_while_another_packs():
    """Every one of them gets what belongs to the parameters."""
    model = adapted()
    expected = call(model)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            integration._copies.clear()
            outputs = list(pool.map(lambda _: call(model), range(8)))
            assert all(torch.equal(output, expected) for output in outputs)


def on_gpu(**changes):
    """An adapted model, its inputs, and its output by parameters that are packed in the call."""
    return adapted("cuda", **changes), inputs("cuda")


def captured(function):
    """A CUDA graph of a call that was made before, and its output."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = function()
    return graph, output


def packing_in_the_call(model, arguments, monkeypatch):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(integration, "are_stand_ins_about", lambda: True)
        return model.get_base_model()["experts"](*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 9, 600])
@pytest.mark.parametrize("settings", [{}, {"r": 16}, {"autocast_adapter_dtype": False, "r": 16}, {"r": 130}], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_compute_the_same_bits(settings, transposed, num_tokens, monkeypatch):
    model = adapted("cuda", transposed=transposed, **settings)
    model.add_adapter("second", lora(r=3))
    arguments = inputs("cuda", num_tokens=num_tokens)
    for names in (["default"], ["default", "second"]):
        model.base_model.set_adapter(names)
        with torch.no_grad():
            for name in names:
                for parameter in factors_of(model, name):
                    torch.nn.init.normal_(parameter, std=0.25)
            outputs = [model.get_base_model()["experts"](*arguments) for _ in range(2)]
        expected = packing_in_the_call(model, arguments, monkeypatch)
        assert expected.any()
        assert torch.equal(outputs[0], expected)
        assert torch.equal(outputs[1], expected)


@pytest.mark.gpu
def test_a_copy_on_the_gpu_takes_neither_memory_nor_time_again(seen):
    """A second call packs nothing: its only new memory is what the experts use."""
    model, arguments = on_gpu()
    with torch.no_grad():
        model.get_base_model()["experts"](*arguments)
        before = torch.cuda.memory_allocated()
        model.get_base_model()["experts"](*arguments)
    assert torch.cuda.memory_allocated() == before
    assert addresses(seen[0]) == addresses(seen[1])
    assert_up_to_date(seen[1], model)


@pytest.mark.gpu
def test_a_replay_reads_the_copies_as_they_are(monkeypatch):
    model, arguments = on_gpu()
    wrapper = model.get_base_model()["experts"]
    with torch.no_grad():
        wrapper(*arguments)
    graph, output = captured(lambda: wrapper(*arguments))
    graph.replay()
    before = packing_in_the_call(model, arguments, monkeypatch)
    assert torch.equal(output, before)
    optimizer = torch.optim.AdamW(factors_of(model), lr=0.1, fused=True)
    wrapper(*arguments).float().square().mean().backward()
    optimizer.step()
    graph.replay()
    assert torch.equal(output, before)
    assert refresh_adapters(model) == 2
    graph.replay()
    after = packing_in_the_call(model, arguments, monkeypatch)
    assert torch.equal(output, after)
    assert not torch.equal(after, before)


@pytest.mark.gpu
@pytest.mark.parametrize("is_stale", [False, True])
def test_a_capture_without_an_up_to_date_copy_packs_in_each_replay(is_stale, seen, monkeypatch):
    model, arguments = on_gpu()
    wrapper = model.get_base_model()["experts"]
    packing_in_the_call(model, arguments, monkeypatch)  # compiles
    with torch.no_grad():
        if is_stale:
            wrapper(*arguments)
            drawn(model)
    graph, output = captured(lambda: wrapper(*arguments))
    assert addresses(seen[-1]) == addresses([plain for plain, _ in given(model)])
    for _ in range(2):
        for parameter in factors_of(model):
            parameter.data.mul_(1.5)
        graph.replay()
        assert torch.equal(output, packing_in_the_call(model, arguments, monkeypatch))
    with torch.no_grad():
        assert torch.equal(wrapper(*arguments), output)  # and nothing of the graph's was kept


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_refresh_is_refused_in_a_capture():
    model, arguments = on_gpu()
    with torch.no_grad():
        model.get_base_model()["experts"](*arguments)
    with pytest.raises(RuntimeError, match="refresh_adapters must be called before a CUDA graph is captured"):
        captured(lambda: refresh_adapters(model))
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_a_captured_training_step_ends_the_trust_in_versions(seen):
    """Its replays change the parameters, and Python sees nothing of it."""
    model, arguments = on_gpu()
    wrapper, factors = model.get_base_model()["experts"], factors_of(model)

    def step():
        for parameter in factors:
            parameter.grad = None
        wrapper(*arguments).float().square().mean().backward()
        with torch.no_grad():
            for parameter in factors:
                parameter.sub_(parameter.grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    call(model, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(2):
        graph.replay()
        with torch.no_grad():
            drawn(model)
        call(model, device="cuda")
        assert addresses(seen[-1]) == addresses([plain for plain, _ in given(model)])
    assert refresh_adapters(model) == 2
    call(model, device="cuda")
    assert_up_to_date(seen[-1], model)
    assert_copied(seen[-1], model)


@pytest.mark.gpu
def test_two_streams(seen, monkeypatch):
    """The second one reads what the first one packs, when it is packed; that is packed again when it has read."""
    model, arguments = on_gpu()
    wrapper = model.get_base_model()["experts"]
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    before = packing_in_the_call(model, arguments, monkeypatch)
    with torch.no_grad():
        wrapper(*arguments)
        torch.cuda.synchronize()
        integration._copies.clear()
        with torch.cuda.stream(first):
            torch.cuda._sleep(50_000_000)
            wrapper(*arguments)
        with torch.cuda.stream(second):
            output = wrapper(*arguments)
            second.synchronize()
            assert torch.equal(output, before)
            torch.cuda._sleep(50_000_000)
            late = wrapper(*arguments)
        kept = integration._copies[wrapper][("default",)]._streams
        assert {first.cuda_stream, second.cuda_stream} <= kept.keys()
        with torch.cuda.stream(first):  # in place, while the second one has yet to read
            for parameter in factors_of(model):
                parameter.data = parameter * 2
            wrapper(*arguments)
        torch.cuda.synchronize()
    assert torch.equal(late, before)
    assert len({tuple(addresses(pair)) for pair in seen[-4:]}) == 1
