"""A model of transformers on cupymoe's experts is trained as any other: checkpointing, Trainer, TRL's SFTTrainer."""

import copy
import pickle

import pytest
import torch

import cupymoe
from tests.helpers import randomize, shapes_saved, transformers_config, transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers_gemma4()
pytest.importorskip("cupymoe.integrations.transformers")
pytestmark = [
    pytest.mark.usefixtures("gate_up_kept_on_the_cpu_too"),
    pytest.mark.filterwarnings("ignore"),  # of transformers, PEFT and TRL
]

LAYERS, KEEP = 2, ("gate_up", "input")
IDS = torch.randint(2, 64, (4, 10), generator=torch.Generator().manual_seed(3))
GATE_UP = (4 * 10 * 2, 2 * 24)
VOCABULARY = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 64)}}


def new_model(implementation="cupymoe"):
    """The same weights at every call."""
    torch.manual_seed(1)
    config = transformers_config(
        implementation, num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"]
    )
    return randomize(transformers.Gemma4ForCausalLM(config))


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- keep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEP)
def test_experts_of_transformers_keep_what_they_are_told(keep):
    model = new_model()
    assert shapes_saved(lambda: loss_of(model)).count(GATE_UP) == LAYERS
    assert cupymoe.set_keep(model, keep) == LAYERS
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert shapes_saved(lambda each=each: loss_of(each)).count(GATE_UP) == (LAYERS if keep == "gate_up" else 0)


@pytest.mark.parametrize("way", ["merging", "low_rank"])
@pytest.mark.parametrize("before", [False, True])
def test_adapted_experts_keep_what_they_are_told(way, before):
    """Set before the adapters come, or after."""
    peft = pytest.importorskip("peft", minversion="0.21")
    from cupymoe.integrations.peft import use_low_rank

    model = new_model()
    if before:
        cupymoe.set_keep(model, "input")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=targets))
    if way == "low_rank":
        use_low_rank(model)
    if not before:
        assert shapes_saved(lambda: loss_of(model)).count(GATE_UP) == LAYERS
        assert cupymoe.set_keep(model, "input") == LAYERS
    assert GATE_UP not in shapes_saved(lambda: loss_of(model))


def test_experts_that_are_not_set_to_cupymoe_are_refused_by_name():
    with pytest.raises(ValueError, match=r'experts_implementation="cupymoe"\); Gemma4ForCausalLM holds none'):
        cupymoe.set_keep(new_model("eager"), "input")


# --- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        ({"use_reentrant": True}, 2 * LAYERS),
        ({"use_reentrant": False}, 2 * LAYERS),
        ({"use_reentrant": False, "context_fn": cupymoe.selective_checkpoint_contexts}, LAYERS),
    ],
    ids=["reentrant", "not reentrant", "selective"],
)
def test_checkpointed_layers_have_the_same_gradients(computed, settings, forwards):
    model = new_model().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable(settings)
    computed.clear()
    found = gradients(model)
    assert computed.count("forward") == forwards
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


# --- trainers ---------------------------------------------------------------------------------------------------------


def settings(folder, device, **changes):
    """Of transformers' TrainingArguments and what extends them: eight steps of two batches each."""
    return {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        **changes,
    }


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_learns_as_eager(losses):
    assert len(losses["cupymoe"]) == 8
    assert losses["cupymoe"][-1] < 0.9 * losses["cupymoe"][0]
    assert losses["cupymoe"] == pytest.approx(losses["eager"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(device, tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    losses = {}
    for implementation in ("eager", "cupymoe"):
        arguments = transformers.TrainingArguments(**settings(tmp_path, device, gradient_checkpointing=checkpointing))
        data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        model = new_model(implementation)
        losses[implementation] = losses_of(transformers.Trainer(model, arguments, train_dataset=data))
    assert_learns_as_eager(losses)


def word_tokenizer():
    """One word, one token; made here, because nothing is downloaded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_trl_s_sft_trainer(device, tmp_path, adapters):
    """All parameters, or PEFT's adapters on the experts."""
    trl = pytest.importorskip("trl")
    datasets, peft = pytest.importorskip("datasets"), pytest.importorskip("peft", minversion="0.21")
    words = [" ".join(f"w{i}" for i in row) for row in IDS.tolist() * 4]
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=targets) if adapters else None
    losses = {}
    for implementation in ("eager", "cupymoe"):
        torch.manual_seed(2)
        trainer = trl.SFTTrainer(
            new_model(implementation),
            trl.SFTConfig(**settings(tmp_path, device, learning_rate=3e-2 if adapters else 3e-3, bf16=False)),
            train_dataset=datasets.Dataset.from_dict({"text": words}),
            processing_class=word_tokenizer(),
            peft_config=config,
        )
        losses[implementation] = losses_of(trainer)
    assert_learns_as_eager(losses)
