"""One mixture of experts as a torch module: routed, computed, differentiated."""

import torch

from cupymoe import Gemma4MoE, Gemma4MoEConfig, fused_experts, route

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)

config = Gemma4MoEConfig(
    hidden_size=64,
    moe_intermediate_size=48,
    num_experts=16,
    top_k_experts=4,
    hidden_activation="gelu_pytorch_tanh",
)
moe = Gemma4MoE(config).to(device, dtype)
for parameter in moe.parameters():
    torch.nn.init.normal_(parameter, std=0.1)

# Gemma 4 routes on the residual and feeds the experts the normalised residual.
residual = torch.randn(2, 8, 64, device=device, dtype=dtype)
normalised = torch.nn.functional.rms_norm(residual, (64,))
output = moe(normalised, router_hidden_states=residual)

# The same from the functions behind the module.
router, experts = moe.router, moe.experts
logits = router.logits(residual.reshape(-1, 64))
weights, index = route(logits, top_k=4, per_expert_scale=router.per_expert_scale)
tokens = normalised.reshape(-1, 64)
by_hand = fused_experts(tokens, experts.gate_up_proj, experts.down_proj, index, weights, activation="gelu_pytorch_tanh")
print("shape", tuple(output.shape), "same", torch.equal(output.reshape(-1, 64), by_hand))

output.sum().backward()
print("gradient of gate_up_proj", tuple(experts.gate_up_proj.grad.shape))
