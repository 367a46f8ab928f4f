"""How the experts of one layer are stored: what config.json says, once the files are seen not to contradict it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.files import DTYPES, PathLike, open_file
from cupymoe.checkpoint.layout import Place, Spelling, Stored, layer_keys, places
from cupymoe.checkpoint.quantised.scheme import Scheme, read_scheme
from cupymoe.checkpoint.quantised.storage import Storage


class _Held(NamedTuple):
    """A key of a weight: what the weight's module is called, its place, and what the key's name ends with."""

    key: str
    weight: str
    place: Place
    ending: str

    @property
    def is_plain(self) -> bool:
        """Whether an unquantised weight has this key."""
        return self.ending == self.place.layouts[0].ending


def resolve(path: PathLike, files: Mapping[str, Path], layer: int, spelling: Spelling, module: nn.Module) -> Stored:
    """How the experts are stored.

    Arguments are as of :func:`cupymoe.checkpoint.layout.match`.

    Raises:
        CheckpointError: config.json can't be understood; weights of one parameter are stored in different ways; or one
            that config.json promises to be quantised is not.
    """
    stored = Stored({}, {})
    scheme = read_scheme(path, files)
    if scheme is None:
        return stored
    held = list(_held(files, layer, spelling, module))
    for parameter in dict.fromkeys(each.place.parameter for each in held):
        of_parameter = [each for each in held if each.place.parameter == parameter]
        storage = _common_storage(scheme, of_parameter)
        if storage is None:
            continue
        if _is_left_plain(scheme, storage, files, of_parameter):
            stored.left_plain[parameter] = storage
            continue
        experts: Any = module.get_submodule(spelling.experts.removesuffix("."))
        if experts.has_bias or experts.is_transposed:
            raise CheckpointError(
                f"{scheme.file}: experts with biases or transposed weights must be unquantised, got {storage}"
            )
        stored.quantised[parameter] = storage
    return stored


def _held(files: Mapping[str, Path], layer: int, spelling: Spelling, module: nn.Module) -> Iterator[_Held]:
    """The keys of a layer that belong to weights of experts."""
    known = places(spelling, module)
    for key, prefix, name in layer_keys(files, layer, spelling):
        for cut in range(len(name), 0, -1):
            stem, ending = name[:cut], name[cut:]
            if ending[:1] in ("", ".", "_") and stem in known:
                yield _Held(key, prefix + stem, known[stem], ending)
                break


def _common_storage(scheme: Scheme, held: list[_Held]) -> Storage | None:
    """The one way in which all weights of a parameter are stored."""
    by_weight = {each.weight: scheme.storage(each.weight) for each in held}
    (first, storage), *others = by_weight.items()
    for weight, other in others:
        if other != storage:
            raise CheckpointError(
                f"{scheme.file}: {weight} must be stored like {first}, of the same layer: "
                f"{storage or 'unquantised'}, got {other or 'unquantised'}"
            )
    return storage


def _is_left_plain(scheme: Scheme, storage: Storage, files: Mapping[str, Path], held: list[_Held]) -> bool:
    """Whether a parameter that should be quantised is not, and may be so."""
    plain = next((each for each in held if each.is_plain), None)
    if plain is None:
        return False
    file = files[plain.key]
    with open_file(file) as handle:
        if plain.key not in set(handle.keys()):
            return False  # which is named when the headers are compared
        dtype = handle.get_slice(plain.key).get_dtype()
    if dtype not in DTYPES:
        return False
    if storage.leaves_plain(plain.place.shape):
        return True
    raise CheckpointError(
        f"{file}: {plain.key} is unquantised ({dtype}), and {scheme.file} says {storage}: the file must hold that, or "
        "the config must list the experts among the modules that are not quantised"
    )
