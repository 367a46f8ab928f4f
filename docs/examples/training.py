"""A few steps of training all parameters of a Gemma 4 model of transformers, here a tiny one: its layers are recomputed
but for the experts, gradients add up in float32, and the optimizer has float32 copies of the parameters."""

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import cupymoe
import cupymoe.integrations.transformers  # registers "cupymoe"

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)

config = Gemma4TextConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    global_head_dim=16,
    hidden_size_per_layer_input=0,
    enable_moe_block=True,
    num_experts=16,
    top_k_experts=4,
    moe_intermediate_size=48,
)
model = Gemma4ForCausalLM(config).to(device, dtype)
model.set_experts_implementation("cupymoe")

# The experts keep their input alone, and the checkpointed layers their output: the least memory.
print("experts set", cupymoe.set_keep(model, "input"))
model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": cupymoe.selective_checkpoint_contexts})
model.train()

cupymoe.accumulate_in_float32(model)
parameters = [*model.parameters()]
masters = [parameter.detach().float().clone() for parameter in parameters]
optimizer = torch.optim.AdamW(masters, lr=3e-3)
batches = torch.randint(2, 256, (2, 1, 32), device=device)
losses = []
for _ in range(10):
    losses.append(0.0)
    for batch in batches:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss / len(batches)
        loss.backward()
        losses[-1] += loss.item()
    for master, parameter in zip(masters, parameters, strict=True):
        master.grad, parameter.main_grad = parameter.main_grad, None
    optimizer.step()
    with torch.no_grad():
        for master, parameter in zip(masters, parameters, strict=True):
            parameter.copy_(master)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
