"""Image files of a data set: checks before a model is loaded, and the one way to read the pixels."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

from PIL import Image

from vold.io import one_line_errors

MAX_PIXELS = 64_000_000
MAX_ASPECT = 200  # of the longer side to the shorter: Qwen's image processor refuses more
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower than Pillow's limit
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def read_picture(path: Path) -> Image.Image:
    """The image as RGB. Transparent pixels become white; 16 bits a pixel become 8 by their upper half (Pillow's own
    conversions give hidden colours and saturated white)."""
    with Image.open(path) as image:
        if image.mode in SIXTEEN_BITS:
            return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            drawn = image.convert("RGBA")
            image = Image.new("RGBA", drawn.size, "white")
            image.alpha_composite(drawn)
        return image.convert("RGB")


@one_line_errors()
def check_picture(path: Path) -> None:
    """Raises ValueError, one line that names the file: missing, empty, too large, no image, cut off, animated, or with
    pixels that have no 8-bit reading."""
    try:
        missing = not path.is_file()
    except OSError as error:  # a name too long: a picture where its path belongs
        raise ValueError(f"image {path} cannot be opened ({error.strerror})") from None
    if missing:
        raise ValueError(f"image {path} does not exist")
    if not path.stat().st_size:
        raise ValueError(f"image {path} is empty (0 bytes)")
    try:
        with Image.open(path) as image:
            problem = _header_problem(image)
            if not problem:
                image.draft("L", (1, 1))  # a JPEG is read to its end, at an eighth of its size
                image.load()
    except Exception as error:  # Pillow's decoders raise what they like
        problem = f"cannot be decoded: {' '.join(str(error).split())}"
    if problem:
        raise ValueError(f"image {path} {problem}")


def _header_problem(image: Image.Image) -> str:
    """The reason to refuse an image, by its header; "" where there is none."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"has {width}x{height} pixels, over {MAX_PIXELS}; scale it down"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"has {width}x{height} pixels, a side over {MAX_ASPECT} times the other; crop it"
    if getattr(image, "n_frames", 1) > 1:
        return f"is animated ({image.n_frames} frames); save the frame that is meant"
    if image.mode in ("I", "F"):
        return f"has pixels of mode {image.mode}, of no fixed range; save it with 8 bits a channel"
    return ""


@one_line_errors()
def store_picture(content: bytes, folder: Path) -> Path:
    """Write a picture to a file in `folder`, named by its content. Raises ValueError where that cannot be written."""
    if not content:
        raise ValueError("image is empty (0 bytes)")
    path = folder / hashlib.sha256(content).hexdigest()[:32]
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=folder)  # ranks and threads may hold the same picture
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(partial, path)
        except OSError as error:
            raise ValueError(f"{error}; set data.image_root to a folder for the pictures that the file holds") from None
    return path


def decode_base64(text: str) -> bytes:
    """The bytes that base64 text encodes. Raises ValueError where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image is not base64: {error}") from None
