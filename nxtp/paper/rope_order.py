"""The published RoPE order and Hugging Face's.

The published decoder rotates channels 2i and 2i + 1 of a head together (interleaved pairs); Hugging Face's LLaMA
rotates channels i and i + d/2 together (halves). So the rows of the q and k projections change places, head by head.
"""

from __future__ import annotations

from torch import Tensor


def rotated_heads(name: str, heads: int, key_heads: int) -> int | None:
    """The number of heads in the rows of our parameter ``name`` if RoPE rotates them (q and k), else None."""
    return {"q_proj": heads, "k_proj": key_heads}.get(name.removesuffix(".weight").rpartition(".")[2])


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """A q or k projection [heads · d, D] in the published order → the same in Hugging Face's."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`halves_from_pairs`."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
