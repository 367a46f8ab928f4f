"""How codes lie in memory: rows of 4-byte words, as the kernels read them; every layout is undone exactly."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.weights.format import Codec, WeightFormat


class _Piece(NamedTuple):
    """Of a :class:`Field` what lies in one byte of the word."""

    code: int
    first_bit: int
    bits: int
    byte: int
    place: int
    """Of the first bit in the byte."""


@functools.cache
def _pieces(codec: Codec) -> tuple[_Piece, ...]:
    pieces = []
    for code, first_bit, bits, place in codec.fields:
        done = 0
        while done < bits:
            byte, place_of_piece = divmod(place + done, 8)
            bits_of_piece = min(bits - done, 8 - place_of_piece)
            pieces.append(_Piece(code, first_bit + done, bits_of_piece, byte, place_of_piece))
            done += bits_of_piece
    return tuple(pieces)


def _moved(bytes: torch.Tensor, bits: int, place: int, to: int) -> torch.Tensor:
    """Some bits of each byte, from ``place`` on, alone and from ``to`` on."""
    # Of a large weight each of these takes a while.
    if place:
        bytes = bytes >> place
    if place + bits < 8:
        bytes = bytes & ((1 << bits) - 1)
    return bytes << to if to else bytes


def _packed_rows(codec: Codec, codes: torch.Tensor) -> torch.Tensor:
    of_words = codes.unflatten(-1, (-1, codec.codes_of_word))
    rows = codes.new_zeros((*of_words.shape[:-1], 4))
    for code, first_bit, bits, byte, place in _pieces(codec):
        rows[..., byte] |= _moved(of_words[..., code], bits, first_bit, place)
    return rows.flatten(-2)


def _unpacked_rows(codec: Codec, rows: torch.Tensor) -> torch.Tensor:
    of_words = rows.unflatten(-1, (-1, 4))
    codes = rows.new_zeros((*of_words.shape[:-1], codec.codes_of_word))
    for code, first_bit, bits, byte, place in _pieces(codec):
        codes[..., code] |= _moved(of_words[..., byte], bits, place, first_bit)
    return codes.flatten(-2)


def pack_codes(format: WeightFormat, codes: torch.Tensor) -> torch.Tensor:
    """Codes as the kernels read them.

    Args:
        format: of the weight.
        codes: ``[E, n, k]`` uint8, one code a byte, in their natural order.

    Returns:
        ``[E, n, format.row_bytes(k)]`` uint8; the depth is padded with ``format.padding_code``.

    Raises:
        TypeError, ValueError: naming what ``codes`` is and must be. That they are below ``2 ** format.bits`` is not
            looked at here: :meth:`cupymoe.QuantizedWeight.of` does that.
    """
    _check("codes", codes)
    padding = format.row_bytes(codes.shape[-1]) * 8 // format.bits - codes.shape[-1]
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding), value=format.padding_code)
    return _packed_rows(format.codec, codes)


def unpack_codes(format: WeightFormat, rows: torch.Tensor, k: int) -> torch.Tensor:
    """What :func:`pack_codes` was given: ``[E, n, k]`` uint8, one code a byte.

    Args:
        format: of the weight.
        rows: ``[E, n, format.row_bytes(k)]`` uint8.
        k: the depth, without its padding.

    Raises:
        TypeError, ValueError: naming what ``rows`` is and must be.
    """
    _check("rows", rows)
    if rows.shape[-1] != format.row_bytes(k):
        raise ValueError(f"rows must have {format.row_bytes(k)} bytes for a depth of {k}, got {rows.shape[-1]}")
    return _unpacked_rows(format.codec, rows)[..., :k].contiguous()


def _check(name: str, bytes: torch.Tensor) -> None:
    if not isinstance(bytes, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(bytes).__name__}")
    if bytes.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {bytes.dtype}")
    if bytes.ndim != 3:
        raise ValueError(f"{name} must have three dimensions, [E, n, k], got shape {list(bytes.shape)}")
