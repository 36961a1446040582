"""Every way that a row can hold an image, and every way that it can fail to."""

import base64
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from graphtune.data import images
from graphtune.data.fields import BadRow
from graphtune.data.images import open_image
from graphtune.data.rows import read_rows


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def png(picture: Image.Image) -> bytes:
    return encoded(picture)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode == "RGB" and np.array_equal(np.asarray(one), np.asarray(other))


REFERENCES: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, path: data,
    "bytearray": lambda data, path: bytearray(data),
    "memoryview": lambda data, path: memoryview(data),
    "Path": lambda data, path: path,
    "path": lambda data, path: str(path),
    "file URL": lambda data, path: path.as_uri(),
    "base64": lambda data, path: base64.b64encode(data).decode(),
    "base64 in lines": lambda data, path: base64.encodebytes(data).decode(),
    "base64 for URLs": lambda data, path: base64.urlsafe_b64encode(data).decode().rstrip("="),
    "data URL": lambda data, path: "data:image/png;base64," + base64.b64encode(data).decode(),
    "data URL, percent": lambda data, path: "data:image/png," + quote(data),
    "datasets, bytes": lambda data, path: {"bytes": data, "path": None},
    "datasets, path": lambda data, path: {"bytes": None, "path": str(path)},
    "PIL": lambda data, path: Image.open(BytesIO(data)),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_every_kind_of_reference(
    kind: str, picture: Image.Image, png: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a picture #1.png"
    path.write_bytes(png)
    assert same(open_image(REFERENCES[kind](png, path)), picture)


def test_relative_paths_start_from_the_image_folder(
    picture: Image.Image, png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(png)
    assert same(open_image("train/1.png", image_dir=tmp_path), picture)
    assert same(open_image({"path": "1.png"}, image_dir=tmp_path / "train"), picture)
    with pytest.raises(BadRow, match="`train/1.png` does not exist; set `image_dir`"):
        open_image("train/1.png")
    monkeypatch.chdir(tmp_path)
    assert same(open_image("train/1.png"), picture)


def test_a_file_whose_name_could_be_base64_is_a_file(
    picture: Image.Image, png: bytes, tmp_path: Path
) -> None:
    name = "abcd" * 20
    (tmp_path / name).write_bytes(png)
    assert same(open_image(name, image_dir=tmp_path), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(picture: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {  # what undoes each orientation
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    upright = picture if turn is None else picture.transpose(turn)
    assert same(open_image(encoded(picture, exif=exif)), upright)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_all_modes_become_rgb(mode: str) -> None:
    grey = np.array([[0, 255], [255, 0]], np.uint8)
    image = Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 256)
    image = image if image.mode == mode else image.convert(mode)
    opened = open_image(image)
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened)[..., 0].astype(int) - grey).max() <= 1


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 128 * 256, 65535]], np.uint16))
    assert np.asarray(open_image(encoded(deep)))[0, :, 0].tolist() == [0, 128, 255]


def test_the_callers_image_is_left_alone(picture: Image.Image) -> None:
    opened = open_image(picture)
    opened.putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        (None, "must be a path, .* not None"),
        (3, "must be a path, .* not 3"),
        ("", "must be a path"),
        ([], "must be a path"),
        ({}, "must be a path"),
        ({"bytes": None, "path": None}, "must be a path"),
        (b"", "0 bytes is not an image"),
        (b"not an image at all", "19 bytes is not an image"),
        ("missing.png", "`missing.png` does not exist"),
        ("/missing/missing.png", "`/missing/missing.png` does not exist$"),
        ("file:///missing.png", "`/missing.png` does not exist$"),
        ("/", "cannot be read: Is a directory"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "does not exist|cannot be read|not an image"),
        ("~nobody-of-this-name/x.png", "cannot be read|does not exist"),
        ("QUJD" * 40, "base64 text 'QUJD.*' is not an image"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,!!", "are not base64"),
        ("data:image/png;base64,QUJD", "is not an image"),
        ("data:,", "is not an image"),
    ],
)
def test_what_is_no_image_is_refused(reference: Any, problem: str) -> None:
    with pytest.raises(BadRow, match=problem) as caught:
        open_image(reference, field="messages[0].content[1]")
    assert caught.value.field == "messages[0].content[1]"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_images_are_refused(format: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadRow, match="half` .*(truncated|is not an image)"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_would_fill_memory_are_refused(
    png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    open_image(png)
    for limit in (34, 10):  # above it Pillow warns; above twice the limit it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadRow, match="too large"):
            open_image(png)


class _Pages(BaseHTTPRequestHandler):
    """Serves `pages`: status, or bytes; `flaky` fails the first time."""

    def __init__(self, pages: dict[str, Any], *rest: Any) -> None:
        self.pages = pages
        super().__init__(*rest)

    def do_GET(self) -> None:
        page = self.pages.get(self.path, 404)
        if isinstance(page, list):
            page = page.pop(0)
        self.send_response(page if isinstance(page, int) else 200)
        body = b"" if isinstance(page, int) else page
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    monkeypatch.setattr(images, "_WAITS_S", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pages: dict[str, Any] = {}
    server = HTTPServer(("127.0.0.1", 0), partial(_Pages, pages))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", pages
    server.shutdown()
    server.server_close()
    thread.join()


def test_downloads(served: tuple[str, dict[str, Any]], picture: Image.Image, png: bytes) -> None:
    url, pages = served
    pages |= {"/a.png": png, "/flaky.png": [503, 429, png], "/down.png": 503, "/page": b"<html>"}
    assert same(open_image(f"{url}/a.png"), picture)
    assert same(open_image(f"{url}/flaky.png"), picture)
    with pytest.raises(BadRow, match="/b.png' cannot be downloaded: 404 Not Found"):
        open_image(f"{url}/b.png")
    with pytest.raises(BadRow, match="cannot be downloaded: 503"):
        open_image(f"{url}/down.png")
    with pytest.raises(BadRow, match="/page' is not an image"):
        open_image(f"{url}/page")


def test_downloads_have_a_limit(
    served: tuple[str, dict[str, Any]], png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pages = served
    pages["/a.png"] = png
    monkeypatch.setattr(images, "MAX_BYTES", len(png) - 1)
    with pytest.raises(BadRow, match="/a.png' is too large"):
        open_image(f"{url}/a.png")


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_WAITS_S", ())
    for url in ("http://127.0.0.1:9/a.png", "http://", "http://[::1/a.png", "https://a b/c"):
        with pytest.raises(BadRow, match="cannot be downloaded"):
            open_image(url)


def test_images_of_tables_stay_files(png: bytes, picture: Image.Image) -> None:
    image = datasets.Image()
    features = datasets.Features(
        {
            "image": image,
            "images": [image],
            "messages": [{"content": [{"type": datasets.Value("string"), "image": image}]}],
        }
    )
    good, broken = ({"bytes": data, "path": None} for data in (png, b"nothing"))
    rows = [
        {"image": file, "images": [file], "messages": [{"content": [{"type": "a", "image": file}]}]}
        for file in (good, broken)
    ]
    table = datasets.Dataset.from_list(rows, features=features)
    files = read_rows(table).data
    assert isinstance(files, datasets.Dataset)
    assert list(files) == list(files.select([0, 1])) == rows
    assert same(open_image(files[0]["messages"][0]["content"][0]["image"]), picture)
    with pytest.raises(BadRow, match="7 bytes is not an image"):
        open_image(files[1]["images"][0])
    assert table.features == features  # the caller's table is left alone
    assert list(read_rows(table, streaming=True).data) == rows


def test_files_of_other_systems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    memory.pipe("/a.png", (tmp_path / "a.png").read_bytes())
    memory.pipe("/b.png", b"nothing")
    assert open_image("memory://a.png").size == (3, 2)
    with pytest.raises(BadRow, match="b.png' is not an image"):
        open_image("memory://b.png")
    with pytest.raises(BadRow, match="image 'memory://c.png' cannot be read"):
        open_image("memory://c.png")
    with pytest.raises(BadRow, match="image 'nowhere://c.png' cannot be read: .*nowhere"):
        open_image("nowhere://c.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_image_in_a_table_names_its_row(streaming: bool) -> None:
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    rows = [{"image": {"bytes": b"nothing", "path": None}, "prompt": "a"}]
    for data in (
        (table := datasets.Dataset.from_list(rows, features=features)),
        table.to_iterable_dataset(),
    ):
        (row,) = read_rows(data, streaming=streaming).data
        with pytest.raises(BadRow, match="image: 7 bytes is not an image"):
            open_image(row["image"])
