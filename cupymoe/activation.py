"""The activation contract: one enum that every backend, kernel and check obeys.

Names and string values follow vLLM's ``MoEActivation``, which are the field's.
"""

from __future__ import annotations

from enum import Enum

from cupymoe.activation_math import FUNCTIONS, Function, Values

# Spellings in model configs that mean one of the members, and nothing else.
_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}

_NO_MUL = "_no_mul"


class MoEActivation(Enum):
    """What an expert does between its two projections.

    Gated members read ``[gate | up]`` and give ``act(gate) * up``; ``*_NO_MUL`` members give ``act(x)``.
    ``GELU`` is always the exact (erf) form and ``GELU_TANH`` always the tanh approximation.
    ``SWIGLUOAI`` reads gate and up interleaved (gate, up, gate, up, ...).
    """

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SWIGLUSTEP = "swiglustep"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    __hash__ = object.__hash__  # Enum's is Python, and a call hashes its activation three times

    @classmethod
    def from_str(cls, name: str) -> MoEActivation:
        """The member that a config's spelling means.

        ``"gelu"`` is erf; ``"gelu_tanh"`` and transformers' other spellings of the tanh form (``"gelu_pytorch_tanh"``,
        ``"gelu_new"``, ``"gelu_fast"``, ``"gelu_accurate"``, ``"gelu_python_tanh"``) are GELU_TANH; ``"gelu_python"``
        is GELU, ``"swish"`` SILU.

        Raises:
            TypeError: ``name`` is no string.
            ValueError: the name is not known; the message lists those that are.
        """
        if not isinstance(name, str):
            raise TypeError(f"activation must be a MoEActivation or its name, got {name!r}")
        try:
            return cls(_ALIASES.get(name, name))
        except ValueError:
            valid = sorted([member.value for member in cls] + list(_ALIASES))
            raise ValueError(f"Unknown MoE activation: {name!r}. Valid activations: {valid}") from None

    @property
    def is_gated(self) -> bool:
        """Whether the input holds gate and up, and so is twice as wide as the output."""
        return not self.value.endswith(_NO_MUL)

    @property
    def is_interleaved(self) -> bool:
        """Whether gate and up alternate, instead of gate being the first half."""
        return self is MoEActivation.SWIGLUOAI

    def without_mul(self) -> MoEActivation:
        """The ungated member with the same function; members that have none return themselves."""
        return MoEActivation.__members__.get(f"{self.function}_NO_MUL", self)

    @property
    def function(self) -> str:
        """Name of the elementwise function, the same for a member and its ungated form: ``"GELU_TANH"``."""
        return self.name.removesuffix(_NO_MUL.upper())

    @property
    def definition(self) -> Function:
        """The function itself: value, slope, and what parameters it has."""
        return FUNCTIONS[self.function]

    @property
    def parameters(self) -> Values:
        """The values of the function's parameters, by name."""
        return self.definition.parameters

    @property
    def custom_op_name(self) -> str:
        """Name of the registered op that computes this member: ``torch.ops.cupymoe.<name>(input)``."""
        return f"{self.value}_and_mul" if self.is_gated else self.function.lower()

    def input_size(self, output_size: int) -> int:
        """Width of the input for an output of the given width."""
        return output_size * (2 if self.is_gated else 1)

    def output_size(self, input_size: int) -> int:
        """Width of the output for an input of the given width."""
        return input_size // 2 if self.is_gated else input_size
