"""The H&E transforms that keep a cached target valid, on the batch, on the device.

Two kinds are safe. The dihedral group D4 (turns and flips) moves the stored grids and maps with the image,
and a store with eight views holds the teacher's latent of each element: `d4(ihc, k)` is view k. Jitter
of stain and light changes the H&E's colour only, which no stored target depends on. Anything else, such as a random
crop, would train the student towards what the IHC shows elsewhere.

Random numbers are a hash of (seed, epoch, sample, purpose): no state, and the same for any
split into batches.

Shapes: B batch, C channels, H and W pixels.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lgd.config import Data
from lgd.stain.deconvolve import H_E, rgb_to_od
from lgd.stream.plan import GOLDEN, splitmix64

D4_ORDER = 8

# Two standard deviations: with a sigma below 0.5 no stain changes its sign.
_LIMIT = 2.0


def d4(x_BCHW: Tensor, k_B: Tensor | np.ndarray) -> Tensor:
    """Element k of the dihedral group on each image.

    k % 4 quarter turns counter-clockwise, then, where k is 4 or more, a left-right flip. Takes
    (B, ..., H, W) with H = W, of any dtype, and integers 0..7 of shape (B,). `k_B` is
    best on the CPU, where reading it makes no device wait.
    """
    return _by_element(x_BCHW, k_B, (-2, -1))


def d4_grid(x_BHWC: Tensor, k_B: Tensor | np.ndarray) -> Tensor:
    """`d4` for grids with the channels last: (B, H, W) or (B, H, W, C)."""
    return _by_element(x_BHWC, k_B, (1, 2))


def _by_element(x: Tensor, k_B: Tensor | np.ndarray, dims: tuple[int, int]) -> Tensor:
    """Turn all images that share a k at once."""
    if x.shape[dims[0]] != x.shape[dims[1]]:
        raise ValueError(f"only squares can be turned, not {x.shape[dims[0]]} x {x.shape[dims[1]]}")
    k_B = torch.as_tensor(k_B).cpu()
    if not k_B.any():
        return x
    turned = torch.empty_like(x)
    for k in sorted(set(k_B.tolist())):
        rows = (k_B == k).nonzero().flatten().to(x.device)
        part = torch.rot90(x[rows], k % 4, dims)
        turned[rows] = part.flip(dims[1]) if k >= 4 else part
    return turned


def draw(seed: int, epoch_B: np.ndarray, sample_B: np.ndarray, purpose: str, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (B, n), a function of (seed, epoch, sample, purpose) alone.

    `epoch_B` and `sample_B` (the sample's number over all shards) are int64 (B,); `purpose` keeps the draws
    for different uses apart. The hash is SplitMix64, applied to each key in turn.
    """
    name = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    key_B = np.full(len(sample_B), int.from_bytes(name[:8], "little"), np.uint64)
    for part_B in (epoch_B, sample_B):
        key_B = splitmix64(key_B + np.asarray(part_B, np.int64).view(np.uint64))
    bits_Bn = splitmix64(key_B[:, None] + GOLDEN * np.arange(n, dtype=np.uint64))
    return (bits_Bn >> np.uint64(11)) * 2.0**-53


def drawn_views(seed: int, epoch_B: np.ndarray, sample_B: np.ndarray) -> np.ndarray:
    """The element of D4 by which training turns each sample, int64 (B,); the arguments are those of `draw`."""
    view_B: np.ndarray = np.floor(8 * draw(seed, epoch_B, sample_B, "view", 1)[:, 0])
    return view_B.astype(np.int64)


def stain_jitter(rgb_B3HW: Tensor, u_B6: Tensor | np.ndarray, sigma: float) -> Tensor:
    """Scale the amounts of hematoxylin, eosin and residual in each H&E by 1 + sigma * normal.

    `rgb_B3HW` is uint8 or float in 0..255, `u_B6` holds uniforms in [0, 1) from `draw`; gives float32 in
    0..255. Normals are cut at two standard deviations. With sigma 0 the image comes back unchanged.
    """
    normal_B3 = _normal(u_B6)
    # unmix, scale, mix and subtract the old OD are one matrix an image: pixels are touched once, and a
    # change of zero leaves them exactly as they were.
    change_B33 = torch.linalg.inv(H_E) @ torch.diag_embed(sigma * normal_B3).to(H_E.device) @ H_E
    od_B3HW = rgb_to_od(rgb_B3HW)
    added_B3HW = torch.einsum("bchw,bcs->bshw", od_B3HW, change_B33.to(od_B3HW))
    return (rgb_B3HW * torch.pow(10.0, -added_B3HW)).clamp(0.0, 255.0)


def light_jitter(rgb_B3HW: Tensor, u_B2: Tensor | np.ndarray, sigma: float) -> Tensor:
    """Multiply the light of each H&E by exp(sigma * normal): another exposure, or glass that is white or grey.

    Arguments and result as of `stain_jitter`; what passes 255 is overexposed. With sigma 0 the image comes back
    unchanged.
    """
    gain_B1 = torch.exp(sigma * _normal(u_B2))
    return (rgb_B3HW * gain_B1[:, :, None, None].to(rgb_B3HW.device, torch.float32)).clamp(0.0, 255.0)


def jitter_he(rgb_B3HW: Tensor, epoch_B: np.ndarray, sample_B: np.ndarray, data: Data, seed: int) -> Tensor:
    """The stain and light of H&E images changed as `data` says; without that they come back as they are."""
    if data.augment != "d4+stain":
        return rgb_B3HW
    rgb_B3HW = stain_jitter(rgb_B3HW.float(), draw(seed, epoch_B, sample_B, "stain", 6), data.stain_jitter)
    if data.light_jitter:
        rgb_B3HW = light_jitter(rgb_B3HW, draw(seed, epoch_B, sample_B, "light", 2), data.light_jitter)
    return rgb_B3HW


def turn_stored(stored: Mapping[str, Tensor], k_B: Tensor, views: int) -> dict[str, Tensor]:
    """The stored grids and maps of images that are turned by `k_B`.

    With eight cached views the map is that of the right view already; with one it is turned, which is approximate since
    a network is not exactly equivariant.
    """
    turned = dict(stored)
    if views == 1 and "map" in turned:
        turned["map"] = d4(turned["map"], k_B)
    for name in ("nuclei", "membrane"):
        if name in turned:
            turned[name] = d4_grid(turned[name], k_B)
    return turned


def _normal(u_B2n: Tensor | np.ndarray) -> Tensor:
    """2 n uniforms -> n normals, float64 (B, n), cut at `_LIMIT` (Box and Muller, 1958)."""
    u_B2n = torch.as_tensor(u_B2n, dtype=torch.float64)
    n = u_B2n.shape[1] // 2
    radius_Bn = torch.sqrt(-2 * torch.log1p(-u_B2n[:, :n]))
    return (radius_Bn * torch.cos(2 * torch.pi * u_B2n[:, n:])).clamp(-_LIMIT, _LIMIT)
