"""What select says where only a slow backend serves a call on CUDA, and what CUPYMOE_ON_SLOW makes of it."""

import warnings

import pytest
import torch

from cupymoe import MoEActivation, SlowWarning, fused_experts
from cupymoe.backends import select, serving, slow
from tests.helpers import random_experts
from tests.test_backends import CALL

UNALIGNED = CALL._replace(aligned_weights=False)
ALIGN = "start both weights on 16 bytes"
CAST = "cast hidden_states and both weights to torch.bfloat16"
FILL = "fill the hidden size up with zeros to a multiple of 16"


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    """Sets the compute capability that the backends see, 9.0 at first; nothing has been said yet."""

    def change(value):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: value)
        select.cache_clear()

    change((9, 0))
    monkeypatch.setattr(slow, "_reported", set())
    monkeypatch.delenv(slow.VARIABLE, raising=False)
    yield change
    select.cache_clear()


def said(*calls, name="auto"):
    """The texts of what is warned of while these calls are selected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            select(name, call)
    assert all(warning.category is SlowWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("device", "change", "chosen", "remedy"),
    [
        ((9, 0), {"aligned_weights": False}, "simt", f"To have it fast, {ALIGN}"),
        ((8, 0), {"aligned_weights": False}, "simt", f"To have it fast, {ALIGN}"),
        ((9, 0), {"dtype": torch.float32}, "simt", f"To have it fast, {CAST}"),
        ((8, 0), {"dtype": torch.float32}, "simt", f"To have it fast, {CAST}"),
        ((9, 0), {"dtype": torch.float64}, "reference", f"To have it fast, {CAST}"),
        ((9, 0), {"hidden_size": 2812}, "simt", f"To have it fast, {FILL}"),
        ((9, 0), {"intermediate_size": 701}, "simt", f"To have it fast, {FILL}"),
        (
            (9, 0),
            {"dtype": torch.float16, "aligned_hidden_states": False},
            "simt",
            "To have it fast, start hidden_states on 16 bytes.",
        ),
        ((9, 0), {"dtype": torch.float32, "aligned_weights": False}, "simt", f"padded), and {CAST}"),
        ((9, 0), {"num_experts": 1025}, "reference", "No change of dtype, alignment or padding would"),
        (
            (9, 0),
            {"numerics": "invariant", "adapter_rank": 256},
            "simt",
            "To have it fast, ask for numerics='fast'.",
        ),
        ((7, 5), {}, "reference", "No change of dtype, alignment or padding would"),
    ],
)
def test_says_what_is_slow_and_what_to_do(capability, device, change, chosen, remedy):
    capability(device)
    call = CALL._replace(**change)
    (text,) = said(call)
    assert select("auto", call).name == serving(call).name == chosen
    sizes = f"of hidden size {call.hidden_size} and intermediate size {call.intermediate_size} in {call.dtype}"
    experts = f"{call.num_experts} experts {sizes} on CUDA by the slow backend {chosen!r}"
    assert text.startswith(f"cupymoe computes {experts}: fused: ")
    assert "; grouped: " in text
    assert remedy in text
    assert text.endswith(" CUPYMOE_ON_SLOW=error makes this an error, =silent hushes it.")


@pytest.mark.parametrize("aligned_hidden_states", [True, False])
@pytest.mark.parametrize("aligned_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", [(8, 0), (9, 0)])
def test_what_it_says_to_do_makes_it_fast(capability, device, dtype, aligned_weights, aligned_hidden_states):
    capability(device)
    for activation in MoEActivation:
        for hidden_size, intermediate_size in ((2816, 704), (2824, 704), (13, 7)):
            for num_tokens in (1, 3000):
                call = CALL._replace(
                    dtype=dtype,
                    activation=activation,
                    num_tokens=num_tokens,
                    hidden_size=hidden_size,
                    intermediate_size=intermediate_size,
                    aligned_weights=aligned_weights,
                    aligned_hidden_states=aligned_hidden_states,
                )
                if not serving(call).is_slow:
                    continue
                text = slow.remedy(call)
                to_do = [change for change in slow._CHANGES if change.to_do in text]
                assert to_do
                fields = {name: value for change in to_do for name, value in change.fields(call).items()}
                assert not serving(call._replace(**fields)).is_slow


def test_once_for_each_cause_and_size_whatever_the_number_of_tokens():
    assert len(said(UNALIGNED, UNALIGNED, UNALIGNED._replace(num_tokens=7), UNALIGNED._replace(top_k=2))) == 1
    select.cache_clear()
    assert said(UNALIGNED) == []
    others = (
        {"hidden_size": 2880},
        {"intermediate_size": 1408},
        {"num_experts": 64},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
    )
    assert len(said(*(UNALIGNED._replace(**change) for change in others))) == len(others)
    assert len(said(CALL._replace(dtype=torch.float32))) == 1  # another cause


def test_counts_of_pairs_in_a_reason_are_no_other_cause():
    call = CALL._replace(dtype=torch.float16, hidden_size=2824)
    texts = said(*(call._replace(num_tokens=num_tokens) for num_tokens in (1025, 1026, 2000)))
    assert len(texts) == 1
    assert "8200" in texts[0]


def test_says_nothing_of_what_is_fast_or_was_asked_for():
    assert said(CALL, CALL._replace(dtype=torch.float16), CALL._replace(activation=MoEActivation.SWIGLUOAI)) == []
    assert said(UNALIGNED, name="simt") == said(UNALIGNED, name="reference") == []
    assert said(UNALIGNED._replace(device=torch.device("cpu")), UNALIGNED._replace(device=torch.device("meta"))) == []
    assert said(UNALIGNED._replace(num_tokens=0)) == []


def test_a_warning_that_is_made_an_error_is_one_every_time():
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(SlowWarning, match="slow backend 'simt'"):
                select("auto", UNALIGNED)


def test_on_slow_error_is_one_every_time(monkeypatch):
    monkeypatch.setenv(slow.VARIABLE, "error")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"slow backend 'simt': fused: .*; grouped: .*{ALIGN}"):
            select("auto", UNALIGNED)
    assert select("auto", CALL).name == "fused"
    assert select("simt", UNALIGNED).name == "simt"


def test_on_slow_silent(monkeypatch):
    monkeypatch.setenv(slow.VARIABLE, "silent")
    assert said(UNALIGNED) == []


@pytest.mark.parametrize("value", ["", "warning", "ERROR", "0"])
@pytest.mark.parametrize("call", [CALL, UNALIGNED], ids=["fast", "slow"])
def test_on_slow_must_be_known(monkeypatch, call, value):
    """Also where nothing is slow yet."""
    monkeypatch.setenv(slow.VARIABLE, value)
    with pytest.raises(ValueError, match=f"CUPYMOE_ON_SLOW must be one of warn, error, silent, got '{value}'"):
        select("auto", call)


def test_report_is_for_other_loops_too():
    with pytest.warns(SlowWarning, match=r"^cupymoe computes a thing by a loop: there is no kernel. Do without. CUPY"):
        slow.report("a thing by a loop", "there is no kernel", "Do without.")


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_gradients_of_gradients_are_reported_unless_the_reference_was_asked_for(device, name):
    case = random_experts(5, device=device)
    states = case.hidden_states.requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowWarning)
        output = fused_experts(*case, activation="gelu_tanh", backend=name)
        (gradient,) = torch.autograd.grad(output.square().sum(), states, create_graph=True)
    assert gradient.requires_grad
    reported = any("create_graph=True on CUDA" in str(warning.message) for warning in caught)
    assert reported == (device.type == "cuda" and name == "auto")
