"""What test_parallel.py runs in each of its processes: a model split over them, or its batch, against the whole one,
computed by eager."""

import inspect
import os
import sys

import torch
import transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

import cupymoe
import cupymoe.integrations.transformers as integration


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def logits_and_gradients(model, rows=slice(None)):
    """Of all rows of the batch, or some."""
    logits = model(torch.arange(1, 25).reshape(2, 12)[rows]).logits
    logits.square().mean().backward()
    return full(logits.detach()), {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def split(kind):
    if kind == "tensor":
        return DistributedConfig(tp_size=2)
    if "ep_size" in inspect.signature(DistributedConfig).parameters:
        return DistributedConfig(tp_size=2, ep_size=2)
    return DistributedConfig(tp_size=2, enable_expert_parallel=True)


def check(folder, kind, name, replace):
    model_class = getattr(transformers, name)
    logits, gradients = logits_and_gradients(model_class.from_pretrained(folder, experts_implementation="eager"))
    model = model_class.from_pretrained(folder, experts_implementation="cupymoe", distributed_config=split(kind))
    layer = model.model.layers[1]
    experts = (layer if hasattr(layer, "experts") else layer.mlp).experts
    assert experts.gate_up_proj.to_local().numel() * 2 == experts.gate_up_proj.numel()
    if replace:
        integration.replace_routers(model)
    if os.environ["RANK"] == "0":  # alone: it must not wait for the other
        cupymoe.warmup(model, (3,), training=True)
    ours, theirs = logits_and_gradients(model)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(full(model(torch.arange(1, 25).reshape(2, 12)).logits), ours, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def check_batch(folder, kind, name, checkpointing):
    """Each process takes one row of the batch; the gradients are averages over the processes."""
    model_class, rank = getattr(transformers, name), int(os.environ["RANK"])
    logits, gradients = logits_and_gradients(model_class.from_pretrained(folder, experts_implementation="eager"))
    model = model_class.from_pretrained(folder, experts_implementation="cupymoe").train()
    if checkpointing:
        contexts = {"use_reentrant": False, "context_fn": cupymoe.selective_checkpoint_contexts}
        model.gradient_checkpointing_enable(contexts)
    if kind == "ddp":
        parallel = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        parallel = fully_shard(model)
        weight = next(p for name, p in model.named_parameters() if name.endswith("gate_up_proj"))
        assert weight.to_local().numel() * 2 == weight.numel()
    ours, theirs = logits_and_gradients(parallel, slice(rank, rank + 1))
    torch.testing.assert_close(ours, logits[rank : rank + 1], rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    for name, gradient in gradients.items():
        found = theirs[f"module.{name}" if kind == "ddp" else name]
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


if __name__ == "__main__":
    folder, kind, name = sys.argv[1:]
    if kind in ("ddp", "fsdp2"):
        torch.distributed.init_process_group("gloo")
        cupymoe.calls._may_keep_gate_up = lambda *_: torch.is_grad_enabled()  # as on CUDA
        cupymoe.ops.keeps_gate_up = lambda *_: True
        for checkpointing in (False, True):
            check_batch(folder, kind, name, checkpointing)
    else:
        for replace in (False, True) if name == "Gemma4ForCausalLM" else (False,):
            check(folder, kind, name, replace)
    print(f"rank {os.environ['RANK']} agrees", flush=True)
    torch.distributed.destroy_process_group()
