"""torch.compile, torch.export and, on a GPU, a CUDA graph of the same module."""

import torch

from cupymoe import Gemma4MoE, Gemma4MoEConfig

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)
moe = Gemma4MoE(Gemma4MoEConfig(64, 48, 16, 4, "gelu_pytorch_tanh"))
for parameter in moe.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
moe = moe.to(device, dtype).eval()
states = torch.randn(8, 64, device=device, dtype=dtype)

with torch.no_grad():
    expected = moe(states)

    # Left out, backend is Inductor.
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    print("compiled", torch.equal(compiled(states), expected))

    length = torch.export.Dim("length", min=2)
    program = torch.export.export(moe, (states,), dynamic_shapes={"hidden_states": {0: length}})
    print("exported", torch.equal(program.module()(states), expected))

    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # the calls above compiled the kernels
            output = moe(states)
        graph.replay()
        print("replayed", torch.equal(output, expected))
