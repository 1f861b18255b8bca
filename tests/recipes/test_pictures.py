"""Reading folders of pictures: captions, pixels, sizes, batches; and every way in which such a folder can be wrong."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fallow.core.errors import ConfigError, DataError
from fallow.recipes.pictures import Batches, Picture, buckets, fit, open_picture, read_pictures, to_pixels


def save(folder: Path, name: str, size=(32, 32), colour=(200, 30, 60), **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 30, (size[1], size[0], 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / name, **options)
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("c.png", "a.jpg", "b.png"):
        save(tmp_path / "set", name)
    return tmp_path / "set"


def describe(folder: Path, *entries: dict | str) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# -- captions ---------------------------------------------------------------------------------------------------------


def test_a_caption_comes_from_metadata_else_from_the_text_beside_else_from_the_prompt(folder):
    describe(folder, {"file_name": "a.jpg", "text": " a red square "}, "")
    (folder / "a.txt").write_text("not this one")
    (folder / "b.txt").write_text("from the\nfile beside\n")
    found = read_pictures(folder, "for all")
    assert [(p.path.name, p.caption) for p in found] == [
        ("a.jpg", "a red square"), ("b.png", "from the file beside"), ("c.png", "for all"),
    ]  # fmt: skip
    assert (found[0].width, found[0].height) == (32, 32)


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_metadata_may_name_the_caption_as_the_world_does_and_files_in_folders(folder, key):
    save(folder / "more", "d.png")
    describe(folder, *({"file_name": name, key: name} for name in ("a.jpg", "b.png", "c.png", "more/d.png")))
    assert [p.caption for p in read_pictures(folder)] == ["a.jpg", "b.png", "c.png", "more/d.png"]


def test_an_empty_prompt_is_enough_where_captions_do_not_matter(folder):
    assert {p.caption for p in read_pictures(folder, prompt="")} == {""}


def test_a_missing_caption_names_the_picture_and_the_three_ways(folder):
    describe(folder, {"file_name": "a.jpg", "text": "x"}, {"file_name": "b.png", "text": ""})
    with pytest.raises(DataError, match=r"b\.png has no caption; .*metadata\.jsonl, a \.txt file.*one prompt"):
        read_pictures(folder)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "b.png", "text": ', "line 2 is no JSON"),
        ('["b.png"]', "line 2 has no file_name"),
        ('{"text": "x"}', "line 2 has no file_name"),
        ('{"file_name": "z.png", "text": "x"}', "line 2 names z.png, which is not there"),
        ('{"file_name": "a.jpg", "text": "x"}', "line 2 names a.jpg again"),
        ('{"file_name": "b.png", "text": 7}', "line 2: the caption 7 is no text"),
    ],
)
def test_a_broken_line_of_metadata_is_told_by_its_number(folder, line, says):
    describe(folder, {"file_name": "a.jpg", "text": "x"}, line)
    with pytest.raises(DataError, match=rf"metadata\.jsonl, {says}"):
        read_pictures(folder, "p")


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt"])
def test_text_that_is_no_utf8_is_told(folder, name):
    (folder / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=rf"{name} cannot be read: it is no UTF-8"):
        read_pictures(folder, "p")


# -- folders and files ------------------------------------------------------------------------------------------------


def test_a_folder_that_is_missing_a_file_or_empty_is_told(folder, tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist; give a folder"):
        read_pictures(tmp_path / "nowhere", "p")
    with pytest.raises(DataError, match=r"a\.jpg is a file; give the folder"):
        read_pictures(folder / "a.jpg", "p")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no picture")
    save(tmp_path / "empty", ".hidden.png")
    with pytest.raises(DataError, match=r"empty holds no picture \(\.png"):
        read_pictures(tmp_path / "empty", "p")


def test_pictures_only_in_folders_within_are_pointed_to(tmp_path):
    save(tmp_path / "set" / "train", "a.png")
    with pytest.raises(DataError, match=r"set holds no picture.*there are some in .*train: give that folder"):
        read_pictures(tmp_path / "set", "p")


def test_a_folder_without_permission_is_told(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # a real one would not stop a test that runs as root
    with pytest.raises(DataError, match=r"set cannot be read \(Permission denied\)"):
        read_pictures(folder, "p")


@pytest.mark.parametrize("name", ["broken.png", "broken.jpg"])
def test_a_truncated_picture_is_named(folder, name):
    file = save(folder, name, (64, 64))
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(DataError, match=rf"{name} cannot be read as a picture \(.*truncated"):
        read_pictures(folder, "p")
    with pytest.raises(DataError, match=name):
        open_picture(file)


@pytest.mark.parametrize("content", [b"", b"this is a text", bytes(5000)])
def test_a_file_that_is_no_picture_is_named(folder, content):
    (folder / "fake.png").write_bytes(content)
    with pytest.raises(DataError, match=r"fake\.png cannot be read as a picture"):
        read_pictures(folder, "p")


def test_damage_in_the_middle_of_a_picture_is_found(folder):
    file = save(folder, "damaged.png", (64, 64))
    content = bytearray(file.read_bytes())
    content[300:340] = os.urandom(40)
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"damaged\.png cannot be read"):
        read_pictures(folder, "p")


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7)])
def test_a_picture_of_a_pixel_is_refused_with_the_minimum(folder, size):
    save(folder, "dot.png", size)
    with pytest.raises(DataError, match=rf"dot\.png is {size[0]}x{size[1]} pixels; give pictures of at least 8x8"):
        read_pictures(folder, "p")


# -- pixels -----------------------------------------------------------------------------------------------------------


def test_exif_orientation_is_honoured_in_size_and_pixels(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10] = (255, 0, 0)  # red at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: red is at the top
    tmp_path.joinpath("set").mkdir()
    Image.fromarray(pixels).save(tmp_path / "set" / "a.png", exif=exif)
    found = read_pictures(tmp_path / "set", "p")[0]
    opened = open_picture(found.path)
    assert (found.width, found.height) == opened.size == (20, 40)
    assert opened.getpixel((10, 3)) == (255, 0, 0)
    assert opened.getpixel((10, 30)) == (0, 0, 0)


def test_transparency_is_composed_on_white(tmp_path):
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 16))
    picture.paste((0, 0, 0, 127), (0, 0, 4, 16))
    picture.save(tmp_path / "a.png")
    opened = open_picture(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert opened.getpixel((6, 5)) == (255, 255, 255)
    assert opened.getpixel((12, 5)) == (255, 0, 0)
    assert opened.getpixel((2, 5)) == (128, 128, 128)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (8, 0, 16, 16))
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_picture(tmp_path / "p.png").getpixel((3, 3)) == (255, 255, 255)
    assert open_picture(tmp_path / "p.png").getpixel((12, 3)) == (40, 50, 60)


def test_grey_palette_and_sixteen_bits_become_rgb(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.tif")
    found = {p.path.stem: open_picture(p.path).getpixel((4, 4)) for p in read_pictures(tmp_path, "p")}
    assert found == {"grey": (77,) * 3, "bit": (255,) * 3, "deep": (117,) * 3, "print": (255, 0, 0)}


def test_pixels_are_in_minus_one_to_one_the_centre_of_what_covers_the_size():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :20] = 255  # cut off at the left
    picture[:, 20:60] = (0, 127, 255)
    found = to_pixels(Image.fromarray(picture), (20, 20))
    assert (found.shape, found.dtype) == ((3, 20, 20), torch.float32)
    torch.testing.assert_close(found[:, :, 5:15].mean((1, 2)), torch.tensor([-1.0, -1 / 255, 1.0]), atol=1e-5, rtol=0)
    same = to_pixels(Image.fromarray(picture), (80, 40))
    assert torch.equal(same, torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_buckets_have_about_the_area_and_sides_that_are_multiples():
    for resolution, multiple in ((512, 8), (512, 64), (32, 4), (768, 8)):
        shapes = buckets(resolution, multiple)
        assert (resolution, resolution) in shapes
        assert all(w % multiple == h % multiple == 0 for w, h in shapes)
        assert all(abs(w * h / resolution**2 - 1) < multiple / resolution * 2 for w, h in shapes)
        assert all(0.5 <= w / h <= 2 for w, h in shapes)
        assert {(h, w) for w, h in shapes} == set(shapes)
    with pytest.raises(ConfigError, match=r"resolution=500 is not a multiple of 8.*give 496 or 504"):
        buckets(500, 8)


def shaped(*sizes: tuple[int, int]) -> list[Picture]:
    return [Picture(Path(f"{i}.png"), "", w, h) for i, (w, h) in enumerate(sizes)]


def test_a_picture_goes_into_the_bucket_of_its_shape_or_into_the_square():
    pictures = shaped((1000, 1000), (3000, 2000), (600, 1100), (5000, 1000))
    sizes = fit(pictures, 512, 64)
    assert sizes[0] == (512, 512)
    assert sizes[1] == (640, 384)
    assert sizes[2] == (384, 704)
    assert sizes[3] == (704, 384)  # the longest there is; the ends are cut off
    assert fit(pictures, 512, 64, bucket=False) == [(512, 512)] * 4


def test_it_is_said_where_most_pictures_must_be_enlarged_and_only_there():
    with pytest.warns(UserWarning, match=r"2 of 3 pictures are smaller than resolution=64 \(such as 1\.png, 32x32\)"):
        fit(shaped((64, 64), (32, 32), (40, 60)), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(shaped((64, 64), (32, 32), (100, 100), (640, 480)), 64)


# -- batches ----------------------------------------------------------------------------------------------------------

SIZES = [(32, 32)] * 21 + [(24, 40)] * 10 + [(40, 24)] * 5 + [(16, 64)]


def test_a_batch_is_full_and_has_one_size():
    batches = Batches(SIZES, batch_size=4, seed=3)
    for _ in range(100):
        batch = next(batches)
        assert len(batch) == 4
        assert len({SIZES[i] for i in batch}) == 1


def test_every_picture_is_seen_equally_often_whatever_its_bucket():
    batches = Batches(SIZES, batch_size=4, seed=3)
    rounds = 40
    seen = Counter(i for _ in range(rounds * len(SIZES) // 4) for i in next(batches))
    assert sum(seen.values()) == rounds * len(SIZES)
    assert len(seen) == len(SIZES)
    assert max(abs(count - rounds) for count in seen.values()) <= 4


def test_one_bucket_is_seen_once_a_round_in_an_order_that_changes():
    batches = Batches([(8, 8)] * 12, batch_size=4, seed=0)
    rounds = [[i for _ in range(len(batches)) for i in next(batches)] for _ in range(3)]
    assert all(sorted(order) == list(range(12)) for order in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != list(range(12))


def test_fewer_pictures_than_a_batch_still_fill_it():
    batches = Batches([(8, 8)] * 3, batch_size=8, seed=0)
    assert Counter(i for _ in range(3) for i in next(batches)) == {0: 8, 1: 8, 2: 8}
    assert len(batches) == 1


def test_the_order_is_the_seeds_and_goes_on_exactly_after_a_restart():
    def drawn(batches: Batches, count: int) -> list[list[int]]:
        return [next(batches) for _ in range(count)]

    whole = drawn(Batches(SIZES, 4, seed=5), 60)
    assert drawn(Batches(SIZES, 4, seed=5), 60) == whole
    assert drawn(Batches(SIZES, 4, seed=6), 60) != whole
    for stop in (0, 1, 17, 59):
        first = Batches(SIZES, 4, seed=5)
        drawn(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        second = Batches(SIZES, 4, seed=5)
        drawn(second, 3)  # forgotten when the state is loaded
        second.load_state_dict(state)
        assert drawn(second, 60 - stop) == whole[stop:]


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"seed": 1}, {"sizes": SIZES[:-1]}])
def test_other_pictures_or_settings_cannot_go_on(change):
    state = Batches(SIZES, 4, seed=5).state_dict()
    with pytest.raises(ConfigError, match="start a new run"):
        Batches(**{"sizes": SIZES, "batch_size": 4, "seed": 5, **change}).load_state_dict(state)


def test_no_batch_and_no_picture_are_refused():
    with pytest.raises(ConfigError, match="batch_size=0"):
        Batches(SIZES, 0)
    with pytest.raises(ConfigError, match="no picture"):
        Batches([], 4)
