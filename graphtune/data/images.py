"""Images of rows: where messages hold them, and how each is opened."""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

import fsspec
from PIL import Image, ImageOps

from graphtune.data.fields import BadRow
from graphtune.data.messages import Conversation, Message

MAX_BYTES = 100 * 2**20
"""Largest download. How many pixels an image may have is `PIL.Image.MAX_IMAGE_PIXELS`."""

_TIMEOUT_S = 20
_WAITS_S = (1, 4)  # between the attempts at a download
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses that another attempt may not meet
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_SHORTEST_BASE64 = 64  # characters; no image is as small, while names of files are


def open_image(
    reference: Any, *, image_dir: str | Path | None = None, field: str = "image"
) -> Image.Image:
    """The image that `reference` stands for, upright as its EXIF data say, in RGB.

    Args:
        reference: a path, an `http`, `https`, `file` or `data` URL, one that fsspec knows (`hf://`,
            `s3://`), base64 text, the bytes of an
            image file, the `{"bytes": ..., "path": ...}` of `datasets.Image(decode=False)`, or a
            `PIL.Image`. Of an animation the first frame counts.
        image_dir: folder that relative paths start from; None: the working directory.
        field: where in the row `reference` is, for errors.

    Raises:
        BadRow: there is no such file, it cannot be downloaded, or it is no whole image of at
            most `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    if isinstance(reference, Mapping):
        data = reference.get("bytes")
        reference = reference.get("path") if data is None else data
    if isinstance(reference, Image.Image):
        return _decode(reference, "the PIL image", field)
    if isinstance(reference, bytes | bytearray | memoryview):
        return _decode(BytesIO(reference), f"{len(reference)} bytes", field)
    if isinstance(reference, Path):
        return _open_path(reference, image_dir, field)
    if isinstance(reference, str) and reference:
        return _open_text(reference, image_dir, field)
    raise BadRow(
        field,
        "an image must be a path, a URL, base64 text, bytes, or a PIL image, "
        f"not {_short(repr(reference))}",
    )


def _open_text(text: str, image_dir: str | Path | None, field: str) -> Image.Image:
    scheme = text[:6].partition(":")[0].lower()
    if scheme == "data":
        return _decode(BytesIO(_data_url(text, field)), f"{_short(text)!r}", field)
    if scheme in ("http", "https"):
        return _decode(BytesIO(_download(text, field)), f"{_short(text)!r}", field)
    if scheme == "file":
        return _open_path(Path(url2pathname(urlsplit(text).path)), image_dir, field)
    if "://" in text:
        return _open_remote(text, field)
    data = _base64(text)
    if data is not None and not _is_file(text, image_dir):
        return _decode(BytesIO(data), f"base64 text {_short(text)!r}", field)
    return _open_path(Path(text), image_dir, field)


def _open_path(path: Path, image_dir: str | Path | None, field: str) -> Image.Image:
    full = _full(path, image_dir)
    try:
        with full.open("rb") as file:
            return _decode(file, f"`{full}`", field)
    except FileNotFoundError:
        hint = "" if path.is_absolute() or image_dir is not None else "; set `image_dir`"
        raise BadRow(field, f"image `{full}` does not exist{hint}") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a name with a null byte
        if isinstance(error, BadRow):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BadRow(field, f"image `{_short(str(full))}` cannot be read: {reason}") from error


def _open_remote(url: str, field: str) -> Image.Image:
    """A file of any system that fsspec knows, as `datasets` names those of a stream."""
    try:
        with fsspec.open(url, "rb") as file:
            return _decode(file, f"{_short(url)!r}", field)
    except BadRow:
        raise
    except Exception as error:  # of whatever library the system's protocol needs
        raise BadRow(field, f"image {_short(url)!r} cannot be read: {error}") from error


def _full(path: Path, image_dir: str | Path | None) -> Path:
    with suppress(RuntimeError):  # `~somebody` who is no user: a file may be called so
        path = path.expanduser()
    return Path(image_dir or ".").expanduser() / path


def _is_file(text: str, image_dir: str | Path | None) -> bool:
    try:
        return _full(Path(text), image_dir).is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def _decode(source: Image.Image | IO[bytes], what: str, field: str) -> Image.Image:
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        width, height = image.size
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise BadRow(
                field,
                f"{what} is too large: {width} x {height} pixels; at most {limit} in all "
                "(PIL.Image.MAX_IMAGE_PIXELS)",
            )
        return _to_rgb(ImageOps.exif_transpose(image))
    except BadRow:
        raise
    except Image.UnidentifiedImageError:
        raise BadRow(field, f"{what} is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise BadRow(field, f"{what} is too large: {error}") from error
    except Exception as error:  # decoders raise whatever their format's damage leads them to
        raise BadRow(field, f"{what} cannot be decoded, it may be truncated: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel; Pillow's own conversion clips what has more, to white."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256)
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}); save it with 8")
    return image.convert("RGB")


def _data_url(url: str, field: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise BadRow(field, f"{_short(url)!r} is no data URL: it has no comma before its data")
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    decoded = _base64(data.decode("latin-1"), shortest=1)
    if decoded is None:
        raise BadRow(field, f"the data of {_short(url)!r} are not base64")
    return decoded


def _base64(text: str, shortest: int = _SHORTEST_BASE64) -> bytes | None:
    """The bytes that `text` encodes in either alphabet; None if it is not base64."""
    if len(text) < shortest or not _BASE64.fullmatch(text):
        return None
    text = "".join(text.split()).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None


def _download(url: str, field: str) -> bytes:
    """What lies at `url`; tried again after failures that may pass."""
    waits = iter(_WAITS_S)
    while True:
        try:
            request = Request(url, headers={"User-Agent": "graphtune"})
            with urlopen(request, timeout=_TIMEOUT_S) as response:
                data: bytes = response.read(MAX_BYTES + 1)
            break
        except (OSError, HTTPException, ValueError) as error:
            status = error.code if isinstance(error, HTTPError) else None
            wait = None if isinstance(error, ValueError) else next(waits, None)
            if wait is None or (status is not None and status not in _PASSING):
                reason = error.reason if isinstance(error, URLError) else error
                code = f"{status} " if status is not None else ""
                raise BadRow(
                    field, f"image {_short(url)!r} cannot be downloaded: {code}{reason}"
                ) from error
            time.sleep(wait)
    if len(data) > MAX_BYTES:
        raise BadRow(
            field, f"image {_short(url)!r} is too large: more than {MAX_BYTES // 2**20} MiB"
        )
    return data


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def split_images(messages: Conversation) -> tuple[list[Message], list[tuple[str, Any]]]:
    """Messages as chat templates take them, and their images in order.

    Returns:
        The messages, whose images have become `{"type": "image"}`; and of each image its place
        among them (`messages[0].content[1]`) and what `open_image` takes.

    Raises:
        BadRow: an image part without an image.
    """
    turns: list[Message] = []
    references: list[tuple[str, Any]] = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = []
            for index, part in enumerate(content):
                if not isinstance(part, Mapping) or part.get("type") != "image":
                    parts.append(part)
                    continue
                field = f"messages[{number}].content[{index}]"
                if part.get("image") is None:
                    raise BadRow(f"{field}.image", "it is missing")
                parts.append({"type": "image"})
                references.append((field, part["image"]))
            message = {**message, "content": parts}
        turns.append(message)
    return turns, references
