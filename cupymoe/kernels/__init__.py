"""One typed launcher for each source in ``cuda_src/``, under the same name.

Launchers trust their arguments (``cupymoe.functional`` has checked them), allocate through torch, run on torch's
current stream of the current device, and never wait for the GPU.
"""
