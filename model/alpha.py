"""Colours under full transparency: nobody sees them, so what is enlarged must not take them for neighbours."""

from typing import Any

from numpy.typing import NDArray
from scipy import ndimage


def has_alpha(channels: int) -> bool:
    """Whether an image of so many channels has an alpha channel, its last one."""
    return channels in (2, 4)


def spread_colour(image: NDArray[Any]) -> NDArray[Any]:
    """An image (H, W, C) whose wholly transparent pixels have the colour of the nearest pixel that is seen.

    Alpha stays as it is; so does an image without alpha, one without such pixels, and one of nothing else.
    """
    if not has_alpha(image.shape[2]):
        return image
    hidden = image[..., -1] == 0
    if not hidden.any() or hidden.all():
        return image
    rows, columns = ndimage.distance_transform_edt(hidden, return_distances=False, return_indices=True)
    spread = image.copy()
    spread[hidden, :-1] = image[rows[hidden], columns[hidden], :-1]
    return spread
