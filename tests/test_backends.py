"""Who takes a call, and what the others say of it."""

import itertools

import pytest
import torch

from cupymoe import MoEActivation, backends
from cupymoe.backends import (
    DIRECTIONS,
    ExpertsCall,
    check_name,
    gradients_use_gate_up,
    registry,
    select,
    serving,
)
from cupymoe.ops import experts_call
from tests.helpers import random_experts

CALL = ExpertsCall(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    activation=MoEActivation.GELU_TANH,
    num_tokens=16,
    top_k=8,
    num_experts=128,
    hidden_size=2816,
    intermediate_size=704,
    aligned_hidden_states=True,
    aligned_weights=True,
)


@pytest.fixture
def hopper(monkeypatch):
    """What the backends see of the device, where there is none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    select.cache_clear()
    yield
    select.cache_clear()


@pytest.mark.parametrize("name", ["grouped", "simt"])
def test_the_way_says_that_weights_are_dequantised(name):
    way = registry()[name].way
    added = ", weights dequantised a few experts at a time"
    assert way(CALL._replace(weight_format="fp8_g128,plain")) == way(CALL) + added


def test_registry_order_ends_with_the_one_that_serves_everything():
    names = list(registry())
    assert names == ["fused", "grouped", "simt", "reference"]
    assert [backend.is_slow for backend in registry().values()] == [False, False, True, True]
    assert all(backend.name == name for name, backend in registry().items())


@pytest.mark.parametrize("name", registry())
def test_every_backend_serves_or_says_why(hopper, name):
    for activation in MoEActivation:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for device in ("cuda:0", "cpu", "meta"):
                call = CALL._replace(activation=activation, dtype=dtype, device=torch.device(device))
                reason = registry()[name].unsupported_reason(call)
                assert reason is None or len(reason) > 10
                assert reason is None or name != "reference"


def test_grouped_serves_gemma_4(hopper):
    assert registry()["grouped"].unsupported_reason(CALL) is None


@pytest.mark.parametrize("name", ["grouped", "simt"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("adapter_rank", [0, 16])
@pytest.mark.parametrize(
    "activation", [MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str
)
def test_grouped_and_simt_serve_biases_and_transposed_weights(hopper, name, direction, adapter_rank, activation):
    for transposed in itertools.product([False, True], repeat=2):
        kind = dict(zip(("gate_up_transposed", "down_transposed"), transposed, strict=True))
        call = CALL._replace(**kind, has_bias=True, adapter_rank=adapter_rank, activation=activation)
        assert registry()[name].unsupported_reason(call, direction) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, r"runs on CUDA devices of compute capability 8.0 or newer, not on cpu"),
        ({"dtype": torch.float32}, r"bfloat16 only, not in torch.float32"),
        ({"dtype": torch.float16}, r"bfloat16 only, not in torch.float16"),
        ({"hidden_size": 2812}, r"multiples of 8, not 2812 and 704"),
        ({"intermediate_size": 701}, r"multiples of 8, not 2816 and 701"),
        ({"aligned_weights": False}, r"both weights must start on 16 bytes"),
        ({"num_experts": 1025}, r"the sort serves at most 1024 experts, not 1025"),
        ({"num_tokens": 2**28}, r"slots are 32-bit: at most \d+ \(token, k\) pairs, not 2147483648"),
    ],
)
def test_grouped_says_why(hopper, change, reason):
    with pytest.raises(ValueError, match=rf"backend 'grouped' does not serve this call: .*{reason}"):
        select("grouped", CALL._replace(**change))
    assert serving(CALL._replace(**change)).name != "grouped"


@pytest.mark.parametrize(
    "activation", [MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str
)
def test_tiles_serve_biases_and_transposed_weights(hopper, activation):
    for gate_up_transposed, down_transposed, has_bias in itertools.product([False, True], repeat=3):
        call = CALL._replace(
            num_tokens=4096,
            activation=activation,
            gate_up_transposed=gate_up_transposed,
            down_transposed=down_transposed,
            has_bias=has_bias,
        )
        assert select("fused", call).way(call).startswith("tiles")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, r"compute capability 8.0 or newer, not on cpu"),
        ({"dtype": torch.float32}, r"bfloat16 and float16, not torch.float32"),
        ({"hidden_size": 2812}, r"multiples of 8, not 2812 and 704"),
        ({"aligned_hidden_states": False}, r"hidden_states and both weights must start on 16 bytes"),
        ({"aligned_weights": False}, r"hidden_states and both weights must start on 16 bytes"),
        (
            {"num_experts": 1025},
            r"serves at most 1024 experts, not 1025, and the sort serves at most 1024 experts, not 1025",
        ),
        (
            {"num_tokens": 1025, "hidden_size": 2824},
            r"at most 8192 \(token, k\) pairs, not 8200, and its tiles need a hidden size that is a multiple of 16",
        ),
        (
            {"num_tokens": 2731, "top_k": 3, "hidden_size": 2824},
            r"serves at most 8192 \(token, k\) pairs, not 8193, and",
        ),
        ({"num_experts": 1025, "hidden_size": 2824}, r"at most 1024 experts, not 1025, and its tiles"),
        (
            {"num_tokens": 2**28},
            r"8192 \(token, k\) pairs, not 2147483648, and slots are 32-bit: at most \d+ \(token, k\) pairs, not",
        ),
    ],
)
def test_fused_says_why(hopper, change, reason):
    with pytest.raises(ValueError, match=rf"backend 'fused' does not serve this call: .*{reason}"):
        select("fused", CALL._replace(**change))
    assert serving(CALL._replace(**change)).name != "fused"


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": 32768},
        {"num_experts": 1024},
        {"hidden_size": 2824},
        {"num_tokens": 1024, "num_experts": 1024, "hidden_size": 2824},
    ],
)
def test_fused_serves_what_one_of_its_ways_serves(hopper, change):
    assert registry()["fused"].unsupported_reason(CALL._replace(**change)) is None


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 380])
@pytest.mark.parametrize("activation", MoEActivation)
def test_fused_streams_every_kind_of_experts(hopper, activation, num_tokens):
    for gate_up_transposed, down_transposed, has_bias in itertools.product([False, True], repeat=3):
        call = CALL._replace(
            activation=activation,
            num_tokens=num_tokens,
            gate_up_transposed=gate_up_transposed,
            down_transposed=down_transposed,
            has_bias=has_bias,
        )
        assert registry()["fused"].unsupported_reason(call) is None
        assert registry()["fused"].way(call).startswith("weight stream")


@pytest.mark.parametrize("num_tokens", [1, 8, 17, 383, 384, 4096])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fused_goes_the_same_way_with_adapters(hopper, direction, num_tokens):
    call = CALL._replace(num_tokens=num_tokens, adapter_rank=128)
    assert registry()["fused"].unsupported_reason(call, direction) is None
    assert registry()["fused"].way(call, direction) == registry()["fused"].way(
        CALL._replace(num_tokens=num_tokens), direction
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"adapter_rank": 144}, "its kernels take adapters of ranks up to 128, not 144"),
        ({"hidden_size": 2824, "num_tokens": 4096}, "its tiles need a hidden size that is a multiple of 16, not 2824"),
    ],
)
def test_fused_says_which_adapters_it_does_not_serve(hopper, direction, change, reason):
    found = registry()["fused"].unsupported_reason(CALL._replace(**{"adapter_rank": 16, **change}), direction)
    assert reason in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, r"runs on CUDA devices of compute capability 8.0 or newer, not on cpu"),
        ({"dtype": torch.float64}, r"take bfloat16, float16 and float32, not torch.float64"),
        ({"num_experts": 1025}, r"the sort serves at most 1024 experts, not 1025"),
        ({"num_tokens": 2**28}, r"slots are 32-bit: at most \d+ \(token, k\) pairs, not 2147483648"),
    ],
)
def test_simt_says_why(hopper, change, reason):
    with pytest.raises(ValueError, match=rf"backend 'simt' does not serve this call: .*{reason}"):
        select("simt", CALL._replace(**change))
    assert serving(CALL._replace(**change)).name != "simt"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_simt_serves_any_alignment_sizes_dtype_and_activation(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for activation in MoEActivation:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            call = CALL._replace(activation=activation, dtype=dtype, hidden_size=13, intermediate_size=7)
            call = call._replace(aligned_hidden_states=False, aligned_weights=False)
            assert select("simt", call).name == serving(call).name == "simt"


NEWER = [(8, 0), (8, 6), (8, 9), (9, 1), (10, 0), (10, 3), (12, 0), (12, 1)]


@pytest.mark.parametrize("capability", NEWER)
def test_fused_streams_without_wgmma(monkeypatch, capability):
    """Any number of tokens, forward, with adapters or without; gradients need its tiles."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    fused, missing = registry()["fused"], f"its tiles need the wgmma of compute capability 9.0, not {capability[0]}."
    for dtype, num_tokens in itertools.product((torch.bfloat16, torch.float16), (1, 64, 1024, 32768)):
        call = CALL._replace(dtype=dtype, num_tokens=num_tokens)
        assert fused.unsupported_reason(call) is None
        assert fused.way(call).startswith("weight stream")
        assert missing in fused.unsupported_reason(call, "backward")
        assert fused.unsupported_reason(call._replace(adapter_rank=16)) is None
    assert "at most 4194304 (token, k) pairs, not 8388608" in fused.unsupported_reason(CALL._replace(num_tokens=2**20))


@pytest.mark.parametrize("capability", NEWER)
def test_auto_streams_without_wgmma_where_that_was_faster(monkeypatch, capability):
    """Grouped serves bfloat16 alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for dtype, many in ((torch.bfloat16, "grouped"), (torch.float16, "fused")):
        assert serving(CALL._replace(dtype=dtype)).name == "fused"
        assert serving(CALL._replace(dtype=dtype, num_tokens=16384)).name == many
    assert select("fused", CALL._replace(num_tokens=16384)).name == "fused"


def test_one_line_says_that_a_card_was_never_seen(monkeypatch, caplog):
    backends._warn_that_it_was_never_run.cache_clear()
    for capability in ((9, 0), (8, 6), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, its=capability: its)
        select.cache_clear()
        for num_tokens in (1, 64):
            select("auto", CALL._replace(num_tokens=num_tokens))
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "never been run on a card of compute capability 8.6" in warning
    assert "`cupymoe verify`" in warning


@pytest.mark.parametrize("name", ["fused", "grouped", "simt"])
def test_an_older_card_is_told_what_it_lacks(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    reason = registry()[name].unsupported_reason(CALL)
    assert reason.startswith("it needs compute capability 8.0 or newer, which began bfloat16 products and copies")
    assert reason.endswith("this device has 7.5")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_grouped_serves_ampere_and_what_came_since(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert registry()["grouped"].unsupported_reason(CALL) is None


def test_auto_takes_the_first_that_serves(hopper):
    serving = [name for name, backend in registry().items() if backend.unsupported_reason(CALL) is None]
    assert select("auto", CALL).name == serving[0]
    assert select("auto", CALL._replace(device=torch.device("cpu"))).name == "reference"
    assert select("reference", CALL).name == "reference"


@pytest.mark.parametrize(("name", "shown"), [(["auto"], r"\['auto'\]"), (None, "None")])
def test_a_backend_s_name_is_a_string(name, shown):
    with pytest.raises(ValueError, match=rf"backend must be one of .* got {shown}"):
        check_name(name)


@pytest.mark.parametrize("name", ["", "Grouped", "fastest"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=rf"backend must be one of \['auto', .*'reference'\], got '{name}'"):
        check_name(name)
    with pytest.raises(ValueError, match="backend must be one of"):
        select(name, CALL)


def test_who_computes_gradients_from_what_a_forward_keeps():
    """Where none does, a forward keeps nothing."""
    uses = {name: backend.uses_gate_up for name, backend in registry().items()}
    assert uses == {"fused": True, "grouped": True, "simt": False, "reference": False}
    case = random_experts(dtype=torch.bfloat16)
    call = experts_call(*case[:4], MoEActivation.GELU_TANH)
    assert not any(gradients_use_gate_up(name, call) for name in ("auto", "fused", "reference"))
