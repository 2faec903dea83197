"""Three-dimensional rotary position embedding over (t, h, w).

Every token carries integer patch coordinates. All channels of a head are rotated, in head_dim / 2
pairs; the head_dim / 2 angles are split 4:6:6 between time, row and column. Each axis spans its own
full frequency range. Tables are computed in fp32 from the positions of the pack, once per forward,
and shared by all layers: S * head_dim multiplications. Nothing of them is stored in a checkpoint.

Two pairings exist because public weights were trained with a rule that is not a rotation:

    angles(token)       = [t * inv_t | h * inv_h | w * inv_w]             length head_dim / 2
    legacy:  channel j uses angles[j mod half]     the two members of a pair (2i, 2i+1) get
             different angles
    rotary:  channel j uses angles[j // 2]         a true rotation: scores depend on relative
             positions only
    out = x * cos + swap(x) * sin,   swap((a, b)) = (-b, a) on neighbouring channels

Shape legend: S packed tokens, H heads, d head_dim.
"""

from dataclasses import dataclass

import torch

# sixteenths of half a head for t, h, w: the split that the public weights were trained with
AXIS_SHARES = (4, 6, 6)
ROPE_PAIRINGS = ("legacy", "rotary")


def axis_frequencies(
    head_dim: int, theta: float = 10000.0, device: torch.device | None = None
) -> list[torch.Tensor]:
    """Inverse frequencies of the three axes, fp32, lengths 4u, 6u, 6u with u = head_dim / 32.

    inv_freq[i] = theta ** (-i / n) for an axis with n angles. Raises ValueError when the 4:6:6
    split does not fit.
    """
    if head_dim % 32:
        raise ValueError(
            f"head_dim is {head_dim}; the 4:6:6 rotary split needs a multiple of 32: change "
            "hidden_size or heads"
        )
    unit = head_dim // 32  # two channels for each of the 16 shares
    counts = [share * unit for share in AXIS_SHARES]
    # every axis starts at frequency 1, however many angles it has
    exponents = [-torch.arange(n, dtype=torch.float32, device=device) / n for n in counts]
    return [theta**exponent for exponent in exponents]


@dataclass(frozen=True)
class RopeTables:
    """Rotary factors of a pack, fp32, made once per forward.

    cos, sin: [S, 1, d], one angle per channel. `turn` and `skew`: complex [S, 1, d/2], the same map
    on a pair seen as the number z = a + ib: out = turn * z + skew * conj(z). `skew` is None where
    the two angles of every pair are equal, that is for a true rotation.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    turn: torch.Tensor
    skew: torch.Tensor | None


def rope_tables(
    positions: torch.Tensor,
    head_dim: int,
    pairing: str,
    theta: float = 10000.0,
    position_scale: float = 1.0,
) -> RopeTables:
    """Tables for positions [S, 3] (t, h, w) of any integer or float dtype.

    `position_scale` multiplies the two spatial coordinates (for resolutions beyond training); time
    is left alone.
    """
    if pairing not in ROPE_PAIRINGS:
        raise ValueError(f"rope_pairing is {pairing!r}; choose one of {', '.join(ROPE_PAIRINGS)}")
    scales = (1.0, position_scale, position_scale)
    coordinates = positions.to(torch.float32)
    frequencies = axis_frequencies(head_dim, theta=theta, device=positions.device)
    by_axis = []
    for axis in range(3):
        coordinate = coordinates[:, axis, None] * scales[axis]
        by_axis.append(coordinate * frequencies[axis])
    angles = torch.cat(by_axis, dim=-1)[:, None]  # [S, 1, d/2]
    legacy = pairing == "legacy"
    # one angle per channel. legacy: channel j has angle j mod (d / 2); rotary: angle j // 2
    if legacy:
        angles = torch.cat([angles, angles], dim=-1)
    else:
        angles = angles.repeat_interleave(2, dim=-1)
    cos = angles.cos()
    sin = angles.sin()
    # a pair (a, b) as the number z = a + ib: the map of its two angles is linear in z and conj(z).
    # From a' = a cos_a - b sin_a and b' = b cos_b + a sin_b follow the two factors
    cos_pairs = cos.unflatten(-1, (-1, 2))
    sin_pairs = sin.unflatten(-1, (-1, 2))
    cos_a, cos_b = cos_pairs.unbind(-1)
    sin_a, sin_b = sin_pairs.unbind(-1)
    turn = torch.complex(
        real=(cos_a + cos_b) / 2,
        imag=(sin_a + sin_b) / 2,
    )
    skew = None
    if legacy:
        skew = torch.complex(
            real=(cos_a - cos_b) / 2,
            imag=(sin_b - sin_a) / 2,
        )
    return RopeTables(cos=cos, sin=sin, turn=turn, skew=skew)


def apply_rope(x: torch.Tensor, tables: RopeTables) -> torch.Tensor:
    """Rotate x [S, H, d]; computed in fp32, returned in the dtype of x.

    Uncompiled, the complex form is one kernel where the real one needs seven (measured on a CPU:
    five times faster with its backward); a compiler fuses the real form and has no complex numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        a = pairs[..., 0]
        b = pairs[..., 1]
        swapped = torch.stack((-b, a), dim=-1).flatten(-2)
        # the tables are fp32, so the products are too, whatever the dtype of x
        turned = x * tables.cos + swapped * tables.sin
        return turned.to(x.dtype)
    z = torch.view_as_complex(pairs)
    out = z * tables.turn
    if tables.skew is not None:
        out = out + z.conj() * tables.skew
    return torch.view_as_real(out).flatten(-2).to(x.dtype)
