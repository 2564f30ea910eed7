r"""The trace of a Jacobian: exactly, or from probes that a few products see at once.

With J the Jacobian of a function of x and z a probe of E[zzᵀ] = I, products zᵀJ from one forward pass give

    tr J = Σ_i e_iᵀ J e_i                     exactly, by the D unit vectors
    tr J = E[zᵀ J z]                          estimated; with S = (J + Jᵀ)/2 the variance of one product is

    2 ‖S‖²                          Gaussian probes
    2 Σ_{i≠j} S_ij²                 Rademacher probes, z_i = ±1
    2 Σ_{i≠j, c_i = c_j} S_ij²      for the mean of a block of b probes  z_p = r ⊙ H_p(c)

where r is Rademacher, c gives each entry of x one of b colours, and H is the Hadamard matrix of order b: two entries of
different colours cancel exactly within the block. A denoiser's Jacobian is largest between neighbours, so that entries
of one colour are put as far apart as they can be: on a lattice, c = Σ_k m_k i_k mod b. With b >= D it is exact.

Sources: Hutchinson 1990 (Commun. Stat. Simul. 19); Tang & Saad 2012 (Numer. Linear Algebra Appl. 19) for the colours;
Stathopoulos, Laeuchli & Orginos 2013 (arXiv:1302.4018) for Hadamard vectors on a lattice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, cast

import torch
from scipy.linalg import hadamard
from torch import Tensor

from sde_diffusion.samplers.noise import Streams

PROBES = ("orthogonal", "rademacher", "gaussian")
LARGEST_BLOCK = 64


def block_size(probe: str, probes: int) -> int:
    """Probes of a block when ``probes`` of them are to be at least two independent blocks, of one size.

    Only "orthogonal" ones are not independent one by one: a block of theirs is a power of two.
    """
    if probe != "orthogonal":
        return 1
    return max(size for size in _SIZES if probes % size == 0 and 2 * size <= max(2, probes))


_SIZES = tuple(2**k for k in range(LARGEST_BLOCK.bit_length()))


def draw_blocks(
    probe: str, blocks: int, size: int, shape: Sequence[int], streams: Streams, dtype: torch.dtype
) -> Tensor:
    """Independent blocks of probes (blocks · size, B, *shape) for examples of ``shape``, each from its own stream."""
    # At once, so that what a stream gives to an example does not depend on those that are drawn together.
    if probe == "gaussian":
        return streams.normal((blocks * size, *shape), dtype).transpose(0, 1)
    is_joint = probe == "orthogonal" and size > 1
    signs = streams.uniform((blocks if is_joint else blocks * size, *shape), dtype).transpose(0, 1)
    signs = torch.where(signs < 0.5, -1.0, 1.0).to(dtype)
    if is_joint:
        return (signs[:, None] * _hadamard(tuple(shape), size).to(signs)[:, None]).flatten(0, 1)
    return signs


def trace_estimates(gradient: Callable[[Tensor], Tensor], probes: Tensor) -> Tensor:
    """zᵀJz (P, B) by each of the probes (P, B, ...), with ``gradient`` the map z -> Jᵀz."""
    return torch.stack([(z * gradient(z)).flatten(1).sum(1) for z in probes])


def exact_trace(gradient: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """tr J (B,) by a product with each of the D unit vectors, ``gradient`` being the map z -> Jᵀz at x (B, ...).

    One after another: each costs what a product with a probe does, and needs no more memory.
    """
    units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
    trace = x.new_zeros(len(x))
    for unit in units:
        trace = trace + trace_estimates(gradient, unit.expand_as(x)[None])[0]
    return trace


def vector_jacobian(
    function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor
) -> tuple[Callable[[Tensor], Tensor], Any]:
    """The map z -> Jᵀz of the first thing that the function returns, and the second, from one forward pass."""
    _, gradient, other = cast(tuple[Any, ...], torch.func.vjp(function, x, has_aux=True))
    return lambda z: gradient(z)[0], other


@lru_cache(maxsize=64)
def _hadamard(shape: tuple[int, ...], size: int) -> Tensor:
    """The Hadamard matrix's signs (size, *shape) at the colours of the entries."""
    return torch.from_numpy(hadamard(size))[:, colours(shape, size)]


def colours(shape: Sequence[int], count: int) -> Tensor:
    """A colour 0…count − 1 (*shape) for each entry: a lattice, of an example's axes, whose points are far apart."""
    if math.prod(shape) <= count:
        return torch.arange(math.prod(shape)).reshape(tuple(shape))
    multipliers: list[int] = []
    # Axis by axis from the last, whose neighbours have colours one apart.
    for size in reversed(shape):
        candidates = range(1, 2) if not multipliers else range(count) if size > 1 else range(1)
        later = shape[len(shape) - len(multipliers) :]
        multipliers.insert(0, max(candidates, key=lambda m: _shortest((size, *later), (m, *multipliers), count)))
    index = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    return sum(
        (m * i for m, i in zip(multipliers, index, strict=True)), torch.zeros(tuple(shape), dtype=torch.int64)
    ) % (count)


def _shortest(shape: Sequence[int], multipliers: Sequence[int], count: int) -> float:
    """Squared length of the shortest step between entries of one colour, or infinity if none is near."""
    reach = math.isqrt(count) + 1
    steps: Any = product(*(range(-min(size - 1, reach), min(size - 1, reach) + 1) for size in shape))
    lengths = (
        sum(i * i for i in step)
        for step in steps
        if any(step) and sum(m * i for m, i in zip(multipliers, step, strict=True)) % count == 0
    )
    return min(lengths, default=math.inf)
