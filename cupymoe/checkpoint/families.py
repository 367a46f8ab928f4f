"""The models whose layers are read: how their checkpoints spell a layer, and what their config.json says of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cupymoe.activation import MoEActivation
from cupymoe.backends import check_name
from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.files import PathLike, read_fields
from cupymoe.checkpoint.layout import Layout, Spelling
from cupymoe.config import Gemma4MoEConfig, check_size
from cupymoe.experts import MoEExperts
from cupymoe.modules import Gemma4MoE

_BY_ROLE = ("gate_proj", "up_proj", "down_proj")
_BY_NUMBER = ("w1", "w3", "w2")
# Behind blk.N., where the other layouts stand behind layers.N.
_GGUF = (
    Layout("ffn_", stacked=("gate_up_exps", "down_exps")),
    Layout("ffn_", stacked=("gate_exps", "up_exps", "down_exps")),
)
_GGUF_ROUTER = "ffn_gate_inp.weight"

GEMMA4 = Spelling(
    layouts=(
        Layout("experts."),
        Layout("moe."),
        Layout("moe.experts."),
        Layout("experts.", _BY_ROLE),
        Layout("moe.experts.", _BY_ROLE),
        *_GGUF,
    ),
    places="{router,experts,moe}.*",
    experts="experts.",
    aliases={
        "moe.per_expert_scale": "router.per_expert_scale",
        "ffn_gate_inp.weight": "router.proj.weight",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_down_exps.scale": "router.per_expert_scale",
    },
)
"""Of a :class:`cupymoe.Gemma4MoE`, router and experts."""


class _Fields(dict[str, Any]):
    """What a config.json says of the text model; what it lacks is not assumed."""

    def __init__(self, file: Path, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.file = file

    def __missing__(self, name: str) -> Any:
        raise CheckpointError(f"{self.file}: {name} must be there, since it has no default; got {dict(self)}")

    def size(self, name: str) -> int:
        check_size(name, self[name])
        size: int = self[name]
        return size


class Family(NamedTuple):
    """Models whose experts are read without their router, into a :class:`cupymoe.MoEExperts`."""

    spelling: Spelling
    num_experts: tuple[str, ...]
    """The names that their config.json may have for it."""
    intermediate_size: str
    activation: Callable[[_Fields], MoEActivation]
    bias: bool = False
    transposed: bool = False


def _hidden_act(fields: _Fields) -> MoEActivation:
    return MoEActivation.from_str(fields["hidden_act"])


def _clamped_swiglu(fields: _Fields) -> MoEActivation:
    """GPT-OSS's activation. Its ``hidden_act`` is ignored, as in transformers; ``swiglu_alpha`` is read if it is there,
    which in published files it is not."""
    alpha = {"alpha": fields["swiglu_alpha"]} if "swiglu_alpha" in fields else {}
    return MoEActivation.SWIGLUOAI.with_parameters(limit=fields["swiglu_limit"], **alpha)


FAMILIES = {
    "qwen3_moe": Family(
        Spelling(
            (Layout("mlp.experts.", _BY_ROLE), Layout("mlp.experts."), *_GGUF),
            "mlp.experts.*",
            foreign=frozenset({_GGUF_ROUTER}),
        ),
        num_experts=("num_experts", "num_local_experts"),
        intermediate_size="moe_intermediate_size",
        activation=_hidden_act,
    ),
    "mixtral": Family(
        Spelling(
            (Layout("block_sparse_moe.experts.", _BY_NUMBER), Layout("mlp.experts."), *_GGUF),
            "{block_sparse_moe,mlp}.experts.*",
            foreign=frozenset({_GGUF_ROUTER}),
        ),
        num_experts=("num_local_experts",),
        intermediate_size="intermediate_size",
        activation=_hidden_act,
    ),
    "gpt_oss": Family(
        Spelling(
            (Layout("mlp.experts."),),
            "mlp.experts.*",
            foreign=frozenset({"mlp.router.weight", "mlp.router.bias"}),
        ),
        num_experts=("num_local_experts",),
        intermediate_size="intermediate_size",
        activation=_clamped_swiglu,
        bias=True,
        transposed=True,
    ),
}
"""By the ``model_type`` of config.json."""


def read_experts(path: PathLike, backend: str) -> tuple[Spelling, MoEExperts]:
    """How the checkpoint at ``path`` spells its experts, and those of a layer, without memory for the parameters.

    Raises:
        CheckpointError: config.json is not there, is of another model, or a field of it is missing or not valid.
        ValueError: there is no such backend.
    """
    check_name(backend)
    file, given = read_fields(path)
    fields = _Fields(file, given)
    model_type = fields["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{file}: model_type must be one of {[*FAMILIES]} (load_layer reads Gemma 4's), got {model_type!r}"
        )
    family = FAMILIES[model_type]
    first, *others = [name for name in family.num_experts if name in fields] or family.num_experts[:1]
    for name in others:
        if fields[name] != fields[first]:
            raise CheckpointError(f"{file}: {name} must be {first}, {fields[first]!r}, got {fields[name]!r}")
    try:
        return family.spelling, MoEExperts(
            fields.size(first),
            fields.size("hidden_size"),
            fields.size(family.intermediate_size),
            family.activation(fields),
            bias=family.bias,
            transposed=family.transposed,
            top_k=fields.size("num_experts_per_tok"),
            backend=backend,
            device="meta",
        )
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_config(path: PathLike) -> Gemma4MoEConfig:
    """Sizes and activation out of the ``config.json`` beside the checkpoint, flat or under ``text_config``.

    Every field of :class:`cupymoe.Gemma4MoEConfig` must be in it, ``hidden_activation`` too: nothing is filled in.

    Raises:
        CheckpointError: the file is not there or not JSON, or a field is missing or not valid.
    """
    file, given = read_fields(path)
    names = Gemma4MoEConfig.__dataclass_fields__
    if missing := [name for name in names if name not in given]:
        raise CheckpointError(f"{file}: {', '.join(missing)} must be there, with no default; got {given}")
    try:
        return Gemma4MoEConfig(**{name: given[name] for name in names})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def gemma4_skeleton(config: Gemma4MoEConfig, backend: str = "auto") -> Gemma4MoE:
    """Router and experts of a layer of Gemma 4, without memory for the parameters."""
    with torch.device("meta"):
        return Gemma4MoE(config, backend)


def layer_of_model(path: PathLike) -> tuple[Spelling, nn.Module]:
    """How the model of a checkpoint spells a layer, and one without memory for its parameters: experts alone, or a
    :class:`cupymoe.Gemma4MoE`.

    Raises:
        CheckpointError: as of :func:`read_experts` and :func:`read_config`.
    """
    model_type = read_fields(path)[1].get("model_type")
    if model_type is None or str(model_type).startswith("gemma4"):
        return GEMMA4, gemma4_skeleton(read_config(path))
    return read_experts(path, "auto")
