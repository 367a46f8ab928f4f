"""A layer's quantised weights: the parameters that vLLM loads a checkpoint into, and the codes that are made of them.

The parameters have the names, shapes and dtypes of the checkpoint's tensors, with gate above up and a dimension of
experts before. So the checkpoints' own readers (:mod:`cupymoe.checkpoint.quantised`) read what vLLM has loaded, or what
a rank has of it: every slice of a row in whole groups, or of whole rows, is again such a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.quantised.compressed_tensors import Floats8
from cupymoe.checkpoint.quantised.finegrained_fp8 import FineGrainedFp8
from cupymoe.checkpoint.quantised.fp8 import BLOCK, Fp8Storage
from cupymoe.checkpoint.quantised.scheme import compressed_storage
from cupymoe.checkpoint.quantised.storage import NaturalWeight, Storage
from cupymoe.checkpoint.quantised.weights import allocate, put
from cupymoe.integrations.vllm.served import FP8_ENVIRONMENT, sizes, takes_fp8
from cupymoe.weights.checks import check_range
from cupymoe.weights.format import FORMATS, join_formats
from cupymoe.weights.quantized import QuantizedWeight

_DTYPES = {"I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}
_CONFIG = "config.json"
_INPUT_SCALE = "input_scale"
_SHAPE = "weight_shape"


class Parameter(NamedTuple):
    """Of one projection of each expert, or of gate above up."""

    shape: tuple[int, ...]
    """Without the dimension of experts."""
    dtype: torch.dtype


class Stored(NamedTuple):
    """How a layer's checkpoint stores both of its weights."""

    storage: Storage
    slicing: str
    """What has one scale, a value of vLLM's ``FusedMoeWeightScaleSupported``: its loader cuts scales by that."""
    has_input_scales: bool = False
    """Whether there are scales for hidden states, which are loaded and not read."""
    is_finer: bool = False
    """Whether vLLM would round hidden states to FP8, where cupymoe does not."""

    def __str__(self) -> str:
        kept = ", hidden states kept in 16 bits where vLLM rounds them to FP8" if self.is_finer else ""
        return f", weights in {self.storage.format.name}{kept}"

    @property
    def weight_format(self) -> str:
        """Of both weights, as a call has it."""
        return join_formats(self.storage.format, self.storage.format)

    def cut_reason(self, moe: Any) -> str | None:
        """Why the weights that a rank has are none of these; None if they are.

        Args:
            moe: vLLM's ``FusedMoEConfig``.
        """
        *_, hidden_size, intermediate_size = sizes(moe)
        if self.slicing == "block" and moe.tp_size > 1 and intermediate_size % BLOCK:
            return f"tensor parallelism cuts blocks of {BLOCK} rows: the intermediate size here is {intermediate_size}"
        for name, depth in (("hidden", hidden_size), ("intermediate", intermediate_size)):
            try:
                self.storage.format.groups(depth)
            except ValueError as error:
                return f"{error} as the {name} size here"
        return None

    def parameters(self, shape: tuple[int, int], parts: int, scale_dtype: torch.dtype) -> dict[str, Parameter]:
        """What is loaded, by the end of its name.

        Args:
            shape: ``[n, k]`` of one projection.
            parts: how many projections lie above each other.
            scale_dtype: of the scales of int4 groups; others are float32.
        """
        parameters: dict[str, Parameter] = {}
        for name, rule in self.storage.rules(shape).items():
            if rule.whole:
                parameters[name] = Parameter((2,), torch.int64)
            elif not rule.optional:
                of_groups = scale_dtype if self.slicing == "group" else torch.float32
                rows, *others = rule.shapes[0] or (1,)
                parameters[name] = Parameter((parts * rows, *others), _DTYPES.get(rule.dtypes[0], of_groups))
        if self.has_input_scales:
            parameters[_INPUT_SCALE] = Parameter((parts,), torch.float32)
        return parameters

    def read(self, loaded: Mapping[str, torch.Tensor], shape: tuple[int, int], parts: int) -> QuantizedWeight:
        """The weight ``[E, parts * n, k]`` of loaded parameters, made of one expert's projection after the other.

        Args:
            loaded: each ``[E, ...]``, by the end of its name.
            shape, parts: as of :meth:`parameters`.

        Raises:
            ValueError: they hold what they must not.
        """
        n, k = shape
        num_experts = len(next(iter(loaded.values())))
        weight: QuantizedWeight | None = None
        for expert in range(num_experts):
            for part, tensors in enumerate(self._projections(loaded, expert, parts)):
                try:
                    natural = self._read(tensors, shape)
                except ValueError as error:
                    raise ValueError(f"expert {expert} of {num_experts} here: {error}") from None
                if weight is None:
                    device = natural.codes.device
                    weight = allocate(self.storage.format, (num_experts, parts * n, k), natural, device)
                put(weight, expert, slice(part * n, (part + 1) * n), natural)
        assert weight is not None
        return weight

    def _projections(
        self, loaded: Mapping[str, torch.Tensor], expert: int, parts: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of each, without those that only files have a use for: ``weight_shape`` is not a rank's."""
        of_weight = {name: each[expert] for name, each in loaded.items() if name not in (_INPUT_SCALE, _SHAPE)}
        for part in range(parts):
            yield {name: each.chunk(parts)[part] for name, each in of_weight.items()}

    def _read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        natural = self.storage.read(tensors, shape)
        if natural.scales is not None:
            check_range(self.storage.format, natural.scales)
        return natural


def stored_by(method: Any) -> Stored | str:
    """How the weights of a layer are stored that vLLM has made a quantised method for; or why cupymoe takes none such.

    Args:
        method: vLLM's own, of whatever kind.
    """
    name = type(method).__name__
    reader = _READERS.get(name)
    if reader is None:
        return f"vLLM's {name} has weights that it doesn't take over"
    try:
        stored = reader(method)
    except (CheckpointError, ValueError) as error:
        return str(error)
    # Of its FP8 backends this one alone multiplies hidden states as they are, on cards before Ada.
    if not isinstance(stored.storage, Fp8Storage) or method.fp8_backend.name == "MARLIN":
        return stored
    if not takes_fp8():
        return (
            f"vLLM's {method.fp8_backend.name} rounds hidden states to FP8 as well; {FP8_ENVIRONMENT}=1 has cupymoe "
            "compute the layer with hidden states in 16 bits"
        )
    return stored._replace(is_finer=True)


def _integers(method: Any) -> Stored:
    weights = method.weight_quant.model_dump(mode="json")
    storage = compressed_storage("pack-quantized", weights, _CONFIG)
    return Stored(storage, weights["strategy"])


def _compressed_floats(method: Any) -> Stored:
    weights = method.weight_quant.model_dump(mode="json")
    storage = compressed_storage("float-quantized", weights, _CONFIG)
    return Stored(storage, weights["strategy"], method.static_input_scales)


def _floats(method: Any) -> Stored:
    config = method.quant_config
    if (blocks := config.weight_block_size) is None:
        storage = Floats8(FORMATS["fp8"], "tensor")  # which vLLM's fp8 has under the same names
        return Stored(storage, "tensor", config.activation_scheme == "static")
    if list(blocks) != [BLOCK, BLOCK]:
        raise ValueError(f"weight_block_size must be {[BLOCK, BLOCK]}, got {[*blocks]}")
    return Stored(FineGrainedFp8(FORMATS["fp8_g128"], "block"), "block")


_READERS = {
    "CompressedTensorsWNA16MoEMethod": _integers,
    "CompressedTensorsWNA16MarlinMoEMethod": _integers,  # of vLLM up to 0.26, at least
    "CompressedTensorsW8A8Fp8MoEMethod": _compressed_floats,
    "Fp8MoEMethod": _floats,
}
"""By the name of vLLM's method."""
