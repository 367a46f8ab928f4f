"""One typed launcher for each source in ``cuda_src/``, under the same name, and what they share.

``jit`` compiles and ``launch`` launches; ``catalog`` lists what there is to compile, ``cuda_sources`` finds the text,
``offline_cache`` keeps for CI what was compiled without a GPU;
``expert_stream`` and ``expert_tiles`` choose the tiles of a call, ``rows`` how whole rows are cut; ``tensor_map``
describes tensors to the copy engine, ``dtypes`` has CUDA's names of torch's dtypes, ``bridge`` streams and DLPack.

Launchers trust their arguments (``cupymoe.functional`` has checked them), allocate through torch, run on torch's
current stream of the current device, and never wait for the GPU.
"""
