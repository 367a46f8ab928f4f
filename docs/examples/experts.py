"""The experts of another model, here of GPT-OSS's kind and tiny: called, differentiated, and read from a checkpoint."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from cupymoe import MoEExperts, checkpoint, route

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)

# Clamped SwiGLU on interleaved rows, biases on both projections, weights as [E, in, out].
experts = MoEExperts(16, 64, 48, "swigluoai", bias=True, transposed=True, dtype=dtype, device=device)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.1)

# The router is the model's own; this one is Mixtral's.
tokens = torch.randn(8, 64, device=device, dtype=dtype)
router = torch.nn.Linear(64, 16, bias=False, device=device, dtype=dtype)
weights, index = route(router(tokens), top_k=4)
output = experts(tokens, index, weights)
output.sum().backward()
print("shape", tuple(output.shape), "gradient of gate_up_proj", tuple(experts.gate_up_proj.grad.shape))

config = {
    "model_type": "gpt_oss",
    "num_local_experts": 16,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
}
with tempfile.TemporaryDirectory() as name:
    # Stands for a downloaded model: names, layouts and config.json are those of a published one.
    folder = Path(name)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"model.layers.0.mlp.experts.{key}": value for key, value in experts.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    read = checkpoint.load_experts(folder, 0, device=device)
    print("read", read.activation.value, torch.equal(read(tokens, index, weights), output))
