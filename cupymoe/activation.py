"""The activation contract: one enum that every backend, kernel and check obeys.

Names and string values follow vLLM's ``MoEActivation``, which are the field's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import torch

from cupymoe.activation_math import FUNCTIONS, Function

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


def _read_parameters(spelling: str, text: str) -> dict[str, float]:
    """The values in ``limit=10.0,alpha=1.5)``, the end of a spelling."""
    pairs = [pair.partition("=") for pair in text.removesuffix(")").split(",")]
    try:
        values = {name.strip(): float(number) for name, _, number in pairs}
    except ValueError:
        values = {}
    if len(values) != len(pairs) or not text.endswith(")"):
        raise ValueError(f"activation must be spelled like 'swigluoai(limit=10.0,alpha=1.5)', got {spelling!r}")
    return values


class MoEActivation(Enum):
    """What an expert does between its two projections.

    Gated members read ``[gate | up]`` and give ``act(gate) * up``; ``*_NO_MUL`` members give ``act(x)``.
    ``GELU`` is always the exact (erf) form and ``GELU_TANH`` always the tanh approximation.
    ``SWIGLUOAI`` reads gate and up interleaved (gate, up, gate, up, ...), ``SWIGLUOAI_UNINTERLEAVE`` as the others do.

    A member with other parameters than its own, ``SWIGLUOAI.with_parameters(limit=10.0)``, is an instance too, though
    none of those that are listed, as a combination of flags is one of ``enum.Flag``. It has a member's properties, its
    value is the spelling ``"swigluoai(limit=10.0)"``, and there is one object of each.
    """

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SITU = "situ"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    _value_: str

    __hash__ = object.__hash__  # Enum's is Python, and a call hashes its activation three times

    def __init__(self, _: str) -> None:
        self.member = self
        """The listed member: itself, or what it is with other parameters."""
        own = {name: parameter.default for name, parameter in self.definition.parameters.items()}
        self.parameters: Mapping[str, float] = own  # type: ignore[misc]
        """The values of the function's parameters, by name."""

    @classmethod
    def _missing_(cls, value: object) -> MoEActivation | None:
        return cls.from_str(value) if isinstance(value, str) and "(" in value else None

    @classmethod
    def from_str(cls, name: str) -> MoEActivation:
        """The member that a config's spelling means.

        ``"gelu"`` is erf; ``"gelu_tanh"`` and transformers' other spellings of the tanh form (``"gelu_pytorch_tanh"``,
        ``"gelu_new"``, ``"gelu_fast"``, ``"gelu_accurate"``, ``"gelu_python_tanh"``) are GELU_TANH; ``"gelu_python"``
        is GELU, ``"swish"`` SILU. Parameters follow in brackets: ``"swigluoai(limit=10.0,alpha=1.5)"``.

        Raises:
            TypeError: ``name`` is no string.
            ValueError: the name is not known; the message lists those that are. Or of the parameters, as
                :meth:`with_parameters`.
        """
        if not isinstance(name, str):
            raise TypeError(f"activation must be a MoEActivation or its name, got {name!r}")
        if "(" in name:
            value = _with_parameters(name)
            known = _BY_VALUE.get(value) or _WITH_PARAMETERS.get(value)
            return cls(value) if known is None else known
        found = _BY_VALUE.get(_ALIASES.get(name, name))
        if found is None:
            valid = sorted([*_BY_VALUE, *_ALIASES])
            raise ValueError(f"Unknown MoE activation: {name!r}. Valid activations: {valid}")
        return found

    def with_parameters(self, /, **values: float) -> MoEActivation:
        """The same function with other values of the parameters that are named.

        SILU and SWIGLUOAI have ``limit`` (gate at most that, up within plus or minus that; infinity clamps nothing) and
        ``alpha`` (``gate * sigmoid(alpha * gate)``), SWIGLUSTEP has ``limit``, SITU has ``beta`` and ``linear_beta``
        (bounds that gate and up approach).

        Raises:
            TypeError: a value is no number.
            ValueError: there is no such parameter, or it can't have that value; the message says what is allowed.
        """
        allowed = self.definition.parameters if self.is_gated else {}
        for name, value in values.items():
            if name not in allowed:
                has = f"it has {', '.join(allowed)}" if allowed else "it has none"
                raise ValueError(f"{self.member.value} has no parameter {name!r}: {has}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} of {self.member.value} must be a number, got {value!r}")
            _, least, greatest = allowed[name]
            if not least <= value <= greatest:
                raise ValueError(f"{name} of {self.member.value} must be from {least} to {greatest}, got {value}")
        parameters = {**self.parameters, **{name: float(value) for name, value in values.items()}}
        changed = [f"{name}={value}" for name, value in parameters.items() if value != self.member.parameters[name]]
        if not changed:
            return self.member
        suffix = f"({','.join(changed)})"
        known = _WITH_PARAMETERS.get(self.member.value + suffix)
        if known is not None:
            return known
        new = object.__new__(MoEActivation)
        names = {"_name_": self.member.name + suffix, "_value_": self.member.value + suffix}
        vars(new).update(names, member=self.member, parameters=parameters)
        return _WITH_PARAMETERS.setdefault(new.value, new)

    @property
    def is_gated(self) -> bool:
        """Whether the input holds gate and up, and so is twice as wide as the output."""
        return not self.member.value.endswith(_NO_MUL)

    @property
    def is_interleaved(self) -> bool:
        """Whether gate and up alternate, instead of gate being the first half."""
        return self.member is MoEActivation.SWIGLUOAI

    def without_mul(self) -> MoEActivation:
        """The ungated member with the same function; members that have none return themselves."""
        if self is not self.member:
            return self
        return MoEActivation.__members__.get(f"{self.function}_NO_MUL", self)

    @property
    def function(self) -> str:
        """Name of the elementwise function, the same however gate and up lie and without an up: ``"GELU_TANH"``."""
        return self.member.name.removesuffix(_NO_MUL.upper()).removesuffix("_UNINTERLEAVE")

    @property
    def definition(self) -> Function:
        """The function itself: value, slope, and what parameters it has."""
        return FUNCTIONS[self.function]

    @property
    def custom_op_name(self) -> str:
        """Name of the registered op that computes this member: ``torch.ops.cupymoe.<name>(input)``.

        Raises:
            ValueError: a member with other parameters than its own has none.
        """
        if self is not self.member:
            raise ValueError(f"{self.value} has no op of its own: torch.ops.cupymoe.moe_activation takes its value")
        return f"{self.value}_and_mul" if self.is_gated else self.function.lower()

    def input_size(self, output_size: int) -> int:
        """Width of the input for an output of the given width."""
        return output_size * (2 if self.is_gated else 1)

    def output_size(self, input_size: int) -> int:
        """Width of the output for an input of the given width."""
        return input_size // 2 if self.is_gated else input_size


# The listed ones. A look-up, because torch.compile of torch 2.11 can't trace MoEActivation(value).
_BY_VALUE = {member.value: member for member in MoEActivation}
# Those with parameters that have been asked for, by value.
_WITH_PARAMETERS: dict[str, MoEActivation] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _with_parameters(spelling: str) -> str:
    """The value of the activation that is spelled with parameters, which exists from then on.

    torch.compile calls it instead of tracing it, because what traces can't add to :data:`_WITH_PARAMETERS`.
    """
    name, _, text = spelling.partition("(")
    return MoEActivation.from_str(name).with_parameters(**_read_parameters(spelling, text)).value
