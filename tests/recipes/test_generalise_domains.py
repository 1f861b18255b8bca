"""Domains, what is drawn from them, and the augmentation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fallow.core.errors import ConfigError
from fallow.recipes.generalise_domains import ANGLES, DomainBatches, _cropped, _hue, augmented, domain_set
from fallow.recipes.labelled import held


def test_a_batch_holds_as_many_pictures_of_each_source_and_small_ones_come_round_more_often() -> None:
    sources = [
        held(torch.full((size, 1, 2, 2), float(at)), torch.full((size,), at)) for at, size in enumerate((5, 40, 9))
    ]
    batches = DomainBatches(sources, each=4, seed=0)
    counts = torch.zeros(3)
    for _ in range(10):
        pixels, labels = next(batches)
        assert labels.bincount().tolist() == [4, 4, 4]
        assert torch.equal(pixels[:, 0, 0, 0].long(), labels)
        counts += labels.bincount()
    assert counts.tolist() == [40, 40, 40]
    again = DomainBatches(sources, each=4, seed=0)
    assert torch.equal(next(again)[1], next(DomainBatches(sources, each=4, seed=0))[1])


def test_turned_digits_share_pictures_between_angles_and_none_between_learning_and_judging() -> None:
    found = domain_set("turned-digits", seed=0)
    assert found.names == [str(angle) for angle in ANGLES]
    upright, turned = found["0"].group, found["180"].group
    assert len(upright.train) == 300
    assert set(upright.train.labels.tolist()) == {0, 1, 2}
    index = torch.arange(6)
    assert torch.equal(turned.train.read(index), upright.train.read(index).rot90(2, (2, 3)))
    assert found["180"].unseen is turned.test
    assert (found.known_classes, len(found.known)) == (10, 1078)
    angles = [found.change(torch.ones(1, 1, 8, 8), torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert not any(torch.equal(a, b) for a, b in pairwise(angles))


def test_styles_and_wanted_domains() -> None:
    found = domain_set("styles", seed=0, names=["mosaic", "bronze"])
    assert found.names == ["mosaic", "bronze"]
    assert found.classes[:2] == ["t-shirt", "trousers"]
    assert (found.side, found.channels, found.known) == (32, 3, None)


def test_folders_judge_by_all_pictures_of_a_domain_that_is_left_out(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for domain in ("art", "photo"):
        for name in ("cat", "dog"):
            (tmp_path / domain / name).mkdir(parents=True)
            for at in range(10):
                Image.fromarray(np.full((9, 9, 3), 20 * at, np.uint8)).save(tmp_path / domain / name / f"{at}.png")
    found = domain_set(str(tmp_path), seed=0, side=8)
    group = found["art"].group
    assert [len(part) for part in (group.train, group.held_out, group.test)] == [14, 4, 2]
    assert len(found["art"].unseen) == 20
    assert sorted(found["art"].unseen.labels.tolist()) == [0] * 10 + [1] * 10


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        ("turned-digit", [], r"data=turned-digit is neither a folder .*did you mean 'turned-digits'"),
        ("turned-digits", ["45"], "domains names '45', which is none"),
        ("turned-digits", ["0"], "has one domain, 0; two are needed"),
        ("styles", ["bronce"], r"domains names 'bronce', which is none \(did you mean 'bronze'"),
    ],
)
def test_domains_that_are_not_there_are_refused_by_name(data: str, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        domain_set(data, 0, names=names)


def test_the_augmentation_keeps_shape_and_range_and_gives_each_picture_another_one() -> None:
    picture = torch.rand(1, 3, 16, 16).expand(20, -1, -1, -1)
    found = augmented(picture, torch.Generator().manual_seed(0))
    assert found.shape == picture.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert not any(torch.equal(a, b) for a, b in pairwise(found))
    grey = (found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 0 < int(grey.sum()) < 10
    assert torch.equal(found, augmented(picture, torch.Generator().manual_seed(0)))


def test_a_whole_crop_is_the_picture_or_its_mirror_and_a_whole_turn_of_the_hue_is_none() -> None:
    pixels, one = torch.rand(2, 3, 8, 8), torch.ones(2, 1, 1, 1)
    flip = torch.tensor([0.9, 0.1]).view(2, 1, 1, 1)
    found = _cropped(pixels, one, 0 * one, 0 * one, 0 * one, flip)
    torch.testing.assert_close(found[0], pixels[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], pixels[1].flip(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_hue(pixels, torch.tensor([0.0, 2 * torch.pi])), pixels, rtol=1e-4, atol=1e-4)
    turned = _hue(pixels, torch.full((2,), 1.0))
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close((turned * luma).sum(1), (pixels * luma).sum(1), rtol=1e-2, atol=1e-2)
    assert float((turned - pixels).abs().max()) > 0.1
