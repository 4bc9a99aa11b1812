"""Images of tables: what is read, what is refused, and the sources that are made here."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from dp_federated_lora.data import (
    Examples,
    ImageFormat,
    Table,
    labelled_images,
    read_table,
    resolve,
    tokenize_image_text,
)
from dp_federated_lora.errors import ConfigError, DataError, ModelError, SourceError

GREY = ImageFormat(channels=1, height=2, width=2, token=0, positions=5, mean=(0.5,), std=(0.25,))
COLOUR = ImageFormat(channels=3, height=2, width=2, token=9, positions=3)


def png(size: tuple[int, int], colour: int | tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def table(folder: Path, *cells: str) -> Table:
    return Table({"image": list(cells)}, folder / "table.csv")


def test_paths_beside_the_table_and_data_uris_become_pixels_of_the_models_shape(tmp_path: Path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.png").write_bytes(png((7, 3), 51))
    uri = f"data:image/png;base64,{base64.b64encode(png((2, 2), (255, 0, 0))).decode()}"
    images = table(tmp_path, "scans/a.png", uri)
    assert GREY.read(images, "image") == (bytes([51] * 4), bytes([76] * 4))  # red is 0.299 of the brightness
    first, second = COLOUR.pixels(COLOUR.read(images, "image"))
    assert first.shape == (3, 2, 2)
    assert torch.allclose(first, torch.full((3, 2, 2), (51 / 255 - 0.5) / 0.5))
    assert second[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert torch.allclose(GREY.pixels([bytes([0, 51, 102, 255])]), torch.tensor([[[[-2.0, -1.2], [-0.4, 2.0]]]]))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("nowhere.png", "No such file"),
        ("text.png", "cannot identify"),
        ("half.png", "truncated"),
        ("data:image/png,abc", "must be base64"),
        ("data:image/png;base64,?", "base64"),
        ("", "directory"),
    ],
)
def test_a_cell_that_is_no_image_is_refused_with_its_row(tmp_path: Path, cell: str, reason: str):
    (tmp_path / "good.png").write_bytes(png((2, 2), 0))
    (tmp_path / "text.png").write_text("hello")
    noise = Image.frombytes("L", (64, 64), bytes(range(256)) * 16)
    noise.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-40])
    with pytest.raises(DataError, match=f"row 1: column 'image' has .*{reason}"):
        GREY.read(table(tmp_path, "good.png", cell), "image")
    with pytest.raises(DataError, match="no column 'photo'"):
        GREY.read(table(tmp_path, "good.png"), "photo")


def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path: Path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="9000 x 9000 pixels are more than 64,000,000"):
        GREY.read(table(tmp_path, "bomb.png"), "image")


@pytest.mark.parametrize("nested", [False, True])
def test_normalisation_comes_from_the_models_own_file(tmp_path: Path, nested: bool):
    shape = {"channels": 3, "height": 4, "width": 4, "token": 0, "positions": 2}
    assert ImageFormat.of(tmp_path, **shape).mean == (0.5, 0.5, 0.5)
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 3}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": facts} if nested else facts))
    found = ImageFormat.of(tmp_path, **shape)
    assert (found.mean, found.std, found.resample) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 3)


@pytest.mark.parametrize(
    "facts", ["[]", "{", '{"image_std": [0, 1, 1]}', '{"image_mean": [1]}', '{"image_mean": "x"}', '{"image_std": [NaN, 1, 1]}']
)
def test_normalisation_that_cannot_be_is_refused(tmp_path: Path, facts: str):
    (tmp_path / "preprocessor_config.json").write_text(facts)
    with pytest.raises(ModelError):
        ImageFormat.of(tmp_path, channels=3, height=4, width=4, token=0, positions=2)


class Letters:
    """A tokenizer with one token for each letter."""

    eos_token_id = 1

    def __call__(self, text: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - ord("a") + 2 for letter in body] for body in text]}


def test_the_text_of_an_image_ends_is_cut_and_asks_for_no_other_image():
    image = bytes(12)
    options = {"tokenizer": Letters(), "image_format": COLOUR}
    examples = tokenize_image_text(["ab", "h", "abcdef"], [image] * 3, max_tokens=7, **options)  # h is the image's token
    assert examples.tokens == ((9, 9, 9, 2, 3, 1), (9, 9, 9, 1), (9, 9, 9, 2, 3, 4, 5))
    assert examples.images == (image,) * 3
    with pytest.raises(ConfigError, match="more than the 3"):
        tokenize_image_text(["a"], [image], max_tokens=3, **options)


def test_images_stay_with_their_examples():
    examples = labelled_images([b"0000", b"1111", b"2222"], ["x", "y", "x"], label_names=["x", "y"], image_format=GREY)
    part = examples.subset([2, 0])
    assert (part.images, part.labels, part.units) == ((b"2222", b"0000"), (0, 0), (2, 0))
    assert part.content(0) == ((0,) * 5, b"2222")
    with pytest.raises(DataError, match="one image each"):
        Examples(((1,), (2,)), images=(b"0",))


def test_an_image_decides_by_itself_whether_it_is_held_out():
    images = [bytes([number % 256, number // 256, 0, 0]) for number in range(600)]
    examples = labelled_images(images, ["x"] * 600, label_names=["x"], image_format=GREY)
    rest, out = examples.split(0.25, 7)
    assert 80 < len(out) < 220  # 150 expected; a hash decides, so always the same ones
    fewer, same_out = examples.subset(range(1, 600)).split(0.25, 7)
    assert set(fewer.images) | set(same_out.images) == set(images[1:])
    assert set(same_out.images) == set(out.images) - {images[0]}
    assert set(fewer.images) == set(rest.images) - {images[0]}


def test_digits_are_those_of_scikit_learn_split_in_two_and_always_the_same(tmp_path: Path):
    from sklearn.datasets import load_digits

    format_ = ImageFormat(channels=1, height=8, width=8, token=0, positions=5, mean=(0.0,), std=(1.0,))
    train, test = (read_table(resolve(f"builtin:digits/{part}", cache=tmp_path)) for part in ("train", "test"))
    digits = load_digits()
    assert (len(train), len(test)) == (1438, 359)
    assert test.column("digit") == [str(digit) for digit in digits.target[4::5]]
    assert set(train.column("digit")) == set("0123456789")
    pixels = format_.pixels(format_.read(test, "image"))[:, 0]
    assert torch.allclose(pixels, torch.from_numpy(digits.images[4::5]).float() / 16, atol=1 / 255)
    assert not set(train.column("image")) & set(test.column("image"))


def test_the_random_vit_is_always_the_same_model(tmp_path: Path):
    first, second = (resolve("builtin:random-vit", cache=tmp_path / name) for name in "ab")
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_other_builtins_and_hashes_of_them_are_refused(tmp_path: Path):
    with pytest.raises(SourceError, match="choose one of"):
        resolve("builtin:mnist", cache=tmp_path)
    with pytest.raises(SourceError, match="builtin:NAME"):
        resolve("builtin:", cache=tmp_path)
    with pytest.raises(SourceError, match="leave sha256 out"):
        resolve("builtin:random-vit", sha256="0" * 64, cache=tmp_path)
