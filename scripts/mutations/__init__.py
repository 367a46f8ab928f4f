"""The faults that ``mutate.py`` makes, one line each: in the kernels, in what they share, in the launchers."""

from scripts.mutations import adapters, backends, gradients, routing, rows, stream, tiles
from scripts.mutations.mutation import Mutation

MUTATIONS = (
    *rows.FAULTS,
    *routing.FAULTS,
    *adapters.FAULTS,
    *stream.FAULTS,
    *tiles.FAULTS,
    *gradients.FAULTS,
    *backends.FAULTS,
)

__all__ = ["MUTATIONS", "Mutation"]
