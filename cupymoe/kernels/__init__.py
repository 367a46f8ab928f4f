"""One typed launcher for each source in ``cuda_src/``, under the same name, and what they share.

``jit`` compiles and ``launch`` launches; ``cupy_import`` finds CuPy and NVRTC, ``arch`` says what a GPU's architecture
can do; ``catalog`` lists what there is to compile, ``cuda_sources`` finds the text, ``offline_cache`` keeps for CI what
was compiled without a GPU; ``load`` says how much work a call is, by which ``stream_regimes`` and ``expert_tiles``
choose its tiles; ``expert_stream`` says what the kernels of the weight stream are compiled for, ``stream_workspace``
where they hand results to each other, ``rows`` how rows are shared out; ``tensor_map`` describes tensors to the copy
engine, ``dtypes`` has CUDA's names of torch's dtypes, ``bridge`` streams and DLPack.

Launchers trust their arguments (``cupymoe.functional`` has checked them), allocate through torch, run on torch's
current stream of the current device, and never wait for the GPU.
"""
