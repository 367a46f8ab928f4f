"""What is raised for a checkpoint that is not what it must be."""


class CheckpointError(ValueError):
    """A checkpoint is not what it must be; the text names the key, the file, what was found and what is allowed."""
