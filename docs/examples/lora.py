"""LoRA on the experts with PEFT: trained unmerged, saved, loaded, merged."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cupymoe import Gemma4MoE, Gemma4MoEConfig
from cupymoe.integrations.peft import use_low_rank

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def base_model():
    """Stands for a loaded model: the same weights at every call."""
    torch.manual_seed(0)
    moe = Gemma4MoE(Gemma4MoEConfig(64, 48, 16, 4, "gelu_pytorch_tanh"))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return moe.to(device, dtype)


states = torch.randn(32, 64, device=device, dtype=dtype)
target = torch.randn(32, 64, device=device, dtype=dtype) / 4

config = LoraConfig(r=16, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
model = get_peft_model(base_model(), config)
use_low_rank(model)  # without it, each call merges a copy of the weights
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
losses = []
for _ in range(20):
    loss = (model(states) - target).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base_model(), folder)
    use_low_rank(loaded)
    output = loaded(states)
    print("reloaded equals trained", torch.equal(output, model(states)))
    merged = loaded.merge_and_unload()
    print(f"merged differs by {((merged(states) - output).float().norm() / output.float().norm()).item():.1e}")
