"""Images of a data set: from whatever a cell holds to a file, checks before a model is loaded, and the one way to read
the pixels."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, ImageOps

from vold.config.schema import DataConfig
from vold.io import one_line_errors

MAX_PIXELS = 64_000_000
MAX_ASPECT = 200  # of the longer side to the shorter: Qwen's image processor refuses more
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower than Pillow's limit
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Others are refused: Pillow runs Ghostscript on EPS, and its readers of rare formats are little tested."""
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says. Transparent pixels become white; 16 bits a pixel become 8
    by their upper half (Pillow's own conversions give hidden colours and saturated white).

    size: (width, height) to resize to, as `ImageProcessor.size` gives it. Every consumer of a model's images passes it,
    and none resizes again: trainer, transformers and vLLM read the same pixels.
    """
    with open_picture(path) as opened:
        image = _as_rgb(ImageOps.exif_transpose(opened))
    return image if size is None else resized(image, size)


def open_picture(path: Path) -> Image.Image:
    """The image in a file of one of FORMATS, whatever its name; only its header is read. Raises OSError for others."""
    return Image.open(path, formats=_known_formats())


@lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # builds of Pillow differ


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at (width, height), as transformers' processors resize."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of the image as `read_picture` turns it. Only the file's header is read."""
    with open_picture(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BITS:
        return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        drawn = image.convert("RGBA")
        image = Image.new("RGBA", drawn.size, "white")
        image.alpha_composite(drawn)
    return image.convert("RGB")


def picture_path(value: Any, config: DataConfig, folder: Path) -> Path:
    """The checked image file that a cell names: a path below the root (data.image_root, or `folder`), or the picture
    itself, which is written to a file first: bytes, base64, a data URL, Pillow's image, {"bytes", "path"} as `datasets`
    keeps it, or {"url"} and {"image_url"} as chats do. Raises ValueError for anything else."""
    root = (config.image_root or folder).resolve()
    content = _content(value)
    if isinstance(content, bytes):
        path = store_picture(content, config.image_root or _store(config, folder)).resolve()
    else:
        path = Path(os.path.realpath(root / content))  # `resolve` raises where links lead in a circle
        if not path.is_relative_to(root):
            raise ValueError(f"image {_short(content)} lies outside {root}")
    check_picture(path)
    return path


def _store(config: DataConfig, folder: Path) -> Path:
    """Beside the data: FILE.images, or beside the snapshot of a hub data set."""
    return config.path.with_suffix(".images") if config.path.exists() else folder.with_name(f"{folder.name}.images")


def _content(value: Any) -> str | bytes:
    """A path, or a picture's bytes."""
    if isinstance(value, Mapping):
        names = ("bytes", "path", "image", "url", "image_url", "data", "base64")
        found = next((value[name] for name in names if value.get(name)), None)
        if found is None:
            raise ValueError(f"an image has none of {', '.join(names)}: {_short(dict(value))}")
        return _content(found)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        png = io.BytesIO()
        _as_rgb(ImageOps.exif_transpose(value)).save(png, "PNG")
        return png.getvalue()
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"an image is no path and no picture: {_short(value)}")
    if value.startswith("data:"):
        return decode_base64(value.partition(",")[2])
    if value.startswith(("http://", "https://", "s3://", "gs://")):
        raise ValueError(f"image {_short(value)} is not on this machine; download it and name its path")
    if value.startswith("file://"):
        return unquote(value.removeprefix("file://"))
    return _as_base64(value) or value


def _as_base64(text: str) -> bytes:
    """The picture that base64 text holds; b"" for a path."""
    if len(text) < 64:
        return b""
    try:
        content = decode_base64(text)
    except ValueError:
        return b""
    return content if content.startswith(MAGIC) or content[8:12] == b"WEBP" else b""


@one_line_errors()
def check_picture(path: Path) -> None:
    """Raises ValueError, one line that names the file: missing, empty, too large, no image, cut off, animated, or with
    pixels that have no 8-bit reading."""
    try:
        missing = not path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL: no path, or a picture in its place
        raise ValueError(f"image {_short(str(path))} cannot be opened ({getattr(error, 'strerror', error)})") from None
    if missing:
        raise ValueError(f"image {path} does not exist")
    if not path.stat().st_size:
        raise ValueError(f"image {path} is empty (0 bytes)")
    try:
        with open_picture(path) as image:
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
    """The bytes that base64 text encodes, with lines and in the URL alphabet too. Raises ValueError where it is
    none."""
    packed = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image is not base64: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"
