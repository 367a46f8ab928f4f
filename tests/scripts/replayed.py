"""What stands for a CUDA graph where there is no GPU."""


class Replayed:
    """Stands for the CUDA graph of some calls."""

    def __init__(self, calls):
        self.calls, self.graph = calls, self
        self.outputs = [call() for call in calls]

    def replay(self):
        for output, call in zip(self.outputs, self.calls, strict=True):
            output.copy_(call())
