"""What test_parallel.py runs in each of its processes: a split model against the whole one, computed by eager."""

import inspect
import os
import sys

import torch
import transformers
from transformers.distributed import DistributedConfig

import cupymoe
import cupymoe.integrations.transformers as integration


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def logits_and_gradients(model):
    logits = model(torch.arange(1, 25).reshape(2, 12)).logits
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
        cupymoe.warmup(model, (3,))
    ours, theirs = logits_and_gradients(model)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(full(model(torch.arange(1, 25).reshape(2, 12)).logits), ours, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


if __name__ == "__main__":
    folder, kind, name = sys.argv[1:]
    for replace in (False, True) if name == "Gemma4ForCausalLM" else (False,):
        check(folder, kind, name, replace)
    print(f"rank {os.environ['RANK']} agrees", flush=True)
    torch.distributed.destroy_process_group()
