"""Small images as PNG data URIs, written with zlib and struct alone (no imaging library).

Eight-bit grey or RGB, unfiltered: right for the thumbnails of a report, wasteful for photographs.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def png(image: NDArray[np.float64]) -> bytes:
    """PNG file of an image (channels, height, width); 3 channels are RGB, of others the first is grey.

    Values are 0..1; an image that leaves this range is stretched from its own minimum and maximum.
    """
    if image.shape[0] != 3:
        image = image[:1]
    image = np.nan_to_num(image)
    low, high = float(image.min(initial=0)), float(image.max(initial=0))
    if low < 0 or high > 1:
        image = (image - low) / ((high - low) or 1.0)
    pixels = np.rint(255 * image).astype(np.uint8).transpose(1, 2, 0)  # (height, width, channels)
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def data_uri(image: NDArray[np.float64]) -> str:
    """The image as something that `src=` takes."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
