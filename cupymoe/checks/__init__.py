"""What the public functions check of their arguments, before anything is launched.

Each error names the argument, what was given and what is allowed.

- :mod:`.tensors`: what is asked of any tensor: its shape, dtype, device and kind;
- :mod:`.weights`: both weights of the experts, quantised or not;
- :mod:`.experts`, :mod:`.batched`: all arguments of a call of the experts, and of one on a batch of rows for each;
- :mod:`.adapters`: an adapter of a weight;
- :mod:`.settings`: what is no tensor.
"""
