"""One image to one training pair: crop, degrade, flip, rotate; each choice is drawn from the sample's name."""

import functools
import hashlib
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.bicubic import Rounding
from data_prep.degrade import Crop, Degradation, Kind, check, degradation
from data_prep.image import Picture

OnDamage = Literal["stop", "skip"]


class PairSettings(BaseModel):
    """How samples become pairs, and in which order; how they are read changes nothing of either."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: int = Field(ge=1, description="high-resolution side over low-resolution side")
    patch_px: int = Field(ge=1, description="side of the low-resolution crop")
    seed: int = Field(0, ge=0, description="decides the order and every crop, flip and rotation")
    num_streams: int = Field(64, ge=1, description="streams of the order; divisible by world size x workers")
    shuffle_block: int = Field(256, ge=1, description="samples that are mixed inside a stream")
    degradation: Kind = Field("bicubic", description="how the low-resolution side is made")
    rounding: Rounding = Field("float", description="float: not rounded; uint8: as MATLAB rounds image files")
    flip: bool = Field(True, description="mirror half of the pairs")
    rotate: bool = Field(True, description="turn the pairs by 0, 90, 180 or 270 degrees")
    crops_per_image: int = Field(1, ge=1, description="crops of each image per epoch, for one decoding")
    on_damage: OnDamage = Field("stop", description="skip: a damaged sample's neighbour takes its place, and is named")
    cache_decoded_bytes: int = Field(0, ge=0, description="decoded images kept per reader; 0 keeps none")
    cache_dir: str | None = Field(
        None, description="local folder for shards from S3; default: the user's, in the temporary folder"
    )
    cache_bytes: int = Field(20 * 2**30, ge=0, description="size of cache_dir; the longest unused shards go")

    @model_validator(mode="after")
    def _arrives(self) -> "PairSettings":
        check(self.degradation, self.scale)
        return self

    @functools.cached_property
    def way(self) -> Degradation:
        """How the low-resolution side is made."""
        return degradation(self.degradation)

    @property
    def min_side_px(self) -> int:
        """The shortest side an image must have to hold a crop."""
        return self.scale * self.patch_px


class Pair(NamedTuple):
    """low_res (3, p, p) float32, about 0..1; high_res (3, p * scale, p * scale) uint8."""

    low_res: np.ndarray
    high_res: np.ndarray


def make_pair(picture: Picture, key: str, epoch: int, settings: PairSettings, crop: int = 0) -> Pair:
    """The pair of an image in an epoch; `crop` tells several of the same epoch apart.

    The image is cut to a multiple of the scale, and the low-resolution crop is a crop of the whole image's
    low-resolution version: the crop's border sees the pixels beyond it.
    """
    scale, patch = settings.scale, settings.patch_px
    height, width = picture.size[0] // scale, picture.size[1] // scale
    name = _name(settings.seed, epoch, key, crop)
    rows, columns, turns, mirror = _draws(name)
    top, left = rows % (height - patch + 1), columns % (width - patch + 1)
    size, place = (height * scale, width * scale), Crop(top, left, patch)
    box = settings.way.needs(size, scale, place)
    pixels = picture.region(box)
    seed = hashlib.sha256(f"{name}/degradation".encode()).digest()
    low_res = settings.way.make(pixels, size, scale, place, settings.rounding, seed)
    y, x, side = top * scale - box.top, left * scale - box.left, patch * scale
    high_res = pixels[:, y : y + side, x : x + side]
    if settings.rotate:
        low_res, high_res = _turned(low_res, turns % 4), _turned(high_res, turns % 4)
    if settings.flip and mirror % 2:
        low_res, high_res = low_res[:, :, ::-1], high_res[:, :, ::-1]
    return Pair(low_res, high_res)


def _turned(planes: np.ndarray, quarters: int) -> np.ndarray:
    """(c, h, w) turned counter-clockwise, as a view."""
    if quarters == 1:
        return planes.transpose(0, 2, 1)[:, ::-1]
    if quarters == 2:
        return planes[:, ::-1, ::-1]
    return planes.transpose(0, 2, 1)[:, :, ::-1] if quarters == 3 else planes


def _name(seed: int, epoch: int, key: str, crop: int) -> str:
    """What a pair is called, and all that is drawn for it follows from."""
    return f"{seed}/{epoch}/{key}" + (f"#{crop}" if crop else "")  # no key holds a "#": it would be quoted


def _draws(name: str) -> tuple[int, ...]:
    """Four numbers below 2**64 that follow from the pair's name and nothing else."""
    digest = hashlib.sha256(name.encode()).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, 32, 8))
