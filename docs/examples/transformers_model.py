"""A Gemma 4 model of transformers on cupymoe's experts; here a tiny one with random weights."""

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from cupymoe.integrations.transformers import replace_routers

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
model = Gemma4ForCausalLM(config).to(device, dtype).eval()
prompt = torch.randint(2, 256, (1, 12), device=device)


def generate():
    """Eight greedy tokens."""
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)


# From a checkpoint: AutoModelForCausalLM.from_pretrained(path, experts_implementation="cupymoe")
model.set_experts_implementation("cupymoe")
print("tokens", generate()[0, 12:].tolist())

# Optional: the router's softmax, top k and scaling in one kernel.
print("routers replaced", replace_routers(model))
print("tokens", generate()[0, 12:].tolist())
