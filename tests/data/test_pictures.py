"""Bad pictures are one line each, at load; the others are read as a person sees them."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from vold.config.schema import DataConfig
from vold.data.pictures import read_picture
from vold.data.problems import load_problems


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def animation(kind: str) -> bytes:
    return encoded(noise(), kind, save_all=True, append_images=[Image.new("RGB", (64, 48), "red")])


BAD = {
    "cut.jpg": (lambda: encoded(noise(), "JPEG")[:-900], "cannot be decoded: .*truncated"),
    "cut.png": (lambda: encoded(noise())[:-900], "cannot be decoded: "),
    "cut.webp": (lambda: encoded(noise(), "WEBP", lossless=True)[:-900], "cannot be decoded: "),
    "empty.png": (lambda: b"", "is empty \\(0 bytes\\)"),
    "text.png": (lambda: b"hello", "cannot be decoded: cannot identify image file"),
    "huge.png": (lambda: encoded(Image.new("1", (9000, 8000))), "has 9000x8000 pixels, over 64000000; scale it down"),
    "bomb.png": (lambda: encoded(Image.new("1", (20_000, 10_000))), "cannot be decoded: Image size .* exceeds limit"),
    "thin.png": (lambda: encoded(Image.new("L", (2010, 10))), "has 2010x10 pixels, a side over 200 times the other"),
    "moving.gif": (lambda: animation("GIF"), "is animated \\(2 frames\\)"),
    "moving.webp": (lambda: animation("WEBP"), "is animated \\(2 frames\\)"),
    "moving.png": (lambda: animation("PNG"), "is animated \\(2 frames\\)"),
    "float.tiff": (lambda: encoded(Image.new("F", (4, 4)), "TIFF"), "has pixels of mode F, of no fixed range"),
}


def load(tmp_path, image, **row):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"question": "what is it?", "answer": "4", "image": image, **row}) + "\n")
    return load_problems(DataConfig(path=path, layout="vqa"))


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(tmp_path, name, recwarn):
    content, says = BAD[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=f"set.jsonl row 1: image .*{name} {says}") as error:
        load(tmp_path, name)
    assert "\n" not in str(error.value) and not recwarn.list


def test_pictures_outside_the_root_or_nowhere(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(noise()))
    (tmp_path / "inside" / "link.png").symlink_to(tmp_path / "secret.png")
    for image, says in {
        "../secret.png": "lies outside",
        str(tmp_path / "secret.png"): "lies outside",
        "link.png": "lies outside",
        "none.png": "does not exist",
        ".": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=f"row 1: image .*{says}"):
            load(tmp_path / "inside", image)


def pixels(path) -> list:
    image = read_picture(path)
    assert image.mode == "RGB"
    return [image.getpixel((0, 0)), image.getpixel((1, 0))]


def test_every_mode_is_read_as_it_looks(tmp_path):
    """Black on nothing is black on white; 16 bits keep their shades; a palette and CMYK their colours."""
    white, black, red = (255, 255, 255), (0, 0, 0), (255, 0, 0)
    for mode, clear in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        image = Image.new(mode, (2, 1), clear)
        image.putpixel((1, 0), (0, 0, 0, 255)[4 - len(mode) :] if mode == "RGBA" else (0, 255))
        image.save(tmp_path / f"{mode}.png")
        assert pixels(tmp_path / f"{mode}.png") == [white, black]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    assert pixels(tmp_path / "p.png") == [red, black]
    palette.save(tmp_path / "pt.png", transparency=1)
    assert pixels(tmp_path / "pt.png") == [red, white]
    Image.new("CMYK", (2, 1), (0, 255, 255, 0)).save(tmp_path / "c.tiff")
    assert pixels(tmp_path / "c.tiff") == [red, red]
    Image.fromarray(np.array([[0x8000, 0xFFFF]], dtype=np.uint16)).save(tmp_path / "i.png")
    assert pixels(tmp_path / "i.png") == [(128,) * 3, white]
    Image.new("L", (2, 1), 7).save(tmp_path / "l.png")
    assert pixels(tmp_path / "l.png") == [(7,) * 3] * 2
    for path in tmp_path.iterdir():
        assert load(tmp_path, path.name) if path.suffix != ".jsonl" else True


# -- layouts -------------------------------------------------------------------------------------------------------


def test_own_sets(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    (problem,) = load(tmp_path, "a.png", answer="12 cm", choices=["7 cm", "12 cm"], skill="counting")
    assert problem.question == (
        "<image>\nwhat is it?\nOptions:\nA. 7 cm\nB. 12 cm\nAnswer with the letter of the right option."
    )
    assert (problem.gold, problem.choices, problem.category) == ("B", ("7 cm", "12 cm"), "counting")
    with pytest.raises(ValueError, match="answer '3 cm' is not one of the options A, B"):
        load(tmp_path, "a.png", answer="3 cm", choices=["7 cm", "12 cm"])
    with pytest.raises(ValueError, match="2 <image> marks but 1 images"):
        load(tmp_path, "a.png", question="<image><image>?")


def test_virl39k_and_vlaa(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(noise()))
    rows = [{"question": "<image>x?", "answer": r"\boxed{\frac{1}{2}}", "image": ["images/a.png"], "category": "STEM"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "virl.parquet")
    (virl,) = load_problems(DataConfig(path=tmp_path / "virl.parquet", layout="virl39k"))
    assert (virl.question, virl.gold, virl.category) == ("<image>x?", r"\frac{1}{2}", "STEM")
    assert virl.images == ((tmp_path / "images" / "a.png").resolve(),)
    row = {"id": 1, "question": "x?", "gt": "7", "image": "images/a.png", "dataset": "clevr_math"}
    (tmp_path / "vlaa.json").write_text(json.dumps([row]))
    (vlaa,) = load_problems(DataConfig(path=tmp_path / "vlaa.json", layout="vlaa"))
    assert (vlaa.question, vlaa.gold, vlaa.category) == ("<image>\nx?", "7", "clevr_math")


def test_geometry3k_as_the_hub_has_it(tmp_path):
    rows = [{"problem": "<image>x", "answer": "4", "images": [{"bytes": encoded(noise()), "path": None}]}] * 2
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    first, second = load_problems(DataConfig(path=tmp_path / "test.parquet", layout="geometry3k"))
    assert first.images == second.images and first.images[0].parent == (tmp_path / "test.images").resolve()
    assert np.array_equal(np.asarray(read_picture(first.images[0])), np.asarray(noise()))


def test_vlmevalkit_tables(tmp_path):
    """The kit's columns: a picture, a list of pictures, the index of the row that holds it, and options."""
    one, two = (base64.b64encode(encoded(noise(40, n))).decode() for n in (30, 50))
    lines = [
        ["index", "question", "hint", "A", "B", "C", "answer", "category", "image"],
        ["0", "how many?", "", "one", "two", "", "B", "math", one],
        ["1", "and\there?", "look", "", "", "", "Yes", "color", "0"],
        ["2", "is <image 2> like <image 1>?", "", "", "", "", "No", "", str([one, two])],
    ]
    import csv

    with (tmp_path / "Kit.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(lines)
    first, second, third = load_problems(DataConfig(path=tmp_path / "Kit.tsv", layout="vlmevalkit"))
    assert first.question.startswith("<image>\nhow many?\nOptions:\nA. one\nB. two\n")
    assert (first.gold, first.choices, first.category) == ("B", ("one", "two"), "math")
    assert second.question == "<image>\nHint: look\nQuestion: and\there?" and second.images == first.images
    assert third.question == "is <image> like <image>?"
    assert [read_picture(path).size for path in third.images] == [(40, 50), (40, 30)]
    (tmp_path / "Bad.tsv").write_text("index\tquestion\tanswer\timage\n0\tx\ty\tno base 64!\n")
    with pytest.raises(ValueError, match=r"Bad.tsv row 1: image is not base64"):
        load_problems(DataConfig(path=tmp_path / "Bad.tsv", layout="vlmevalkit"))
