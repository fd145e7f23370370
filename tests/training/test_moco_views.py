"""Views of a contrastive training: exact, in range, from the seed alone."""

import pytest
import torch
from moco_pictures import generator, pictures

from training.moco_views import ViewConfig, apply_views, draw_views

STILL = ViewConfig(
    min_area=1.0,
    rotation=0,
    mirror=0,
    upend=0,
    brightness=0,
    contrast=0,
    saturation=0,
    hue=0,
    blur=0,
)


def test_views_that_change_nothing():
    img = pictures()
    views = draw_views(8, STILL, generator())
    # The aspect ratio is drawn too; whole pictures have none to give away.
    views['grid'] = torch.eye(2, 3).expand(8, 2, 3)
    assert (apply_views(img, views) - img).abs().max() < 1e-4


def test_views_stay_in_range_and_depend_on_the_seed_alone():
    img = pictures()
    one = apply_views(img, draw_views(8, ViewConfig(), generator(3)))
    assert one.shape == img.shape and one.min() >= -1 and one.max() <= 1
    assert torch.equal(one, apply_views(img, draw_views(8, ViewConfig(), generator(3))))
    assert not torch.equal(one, apply_views(img, draw_views(8, ViewConfig(), generator(4))))


def test_flips_are_exact():
    img = pictures()
    for options, axis in (({'mirror': 1.0}, 3), ({'upend': 1.0}, 2)):
        views = draw_views(8, ViewConfig(**{**vars(STILL), **options}), generator())
        sign = views['grid'][:, [0, 1], [0, 1]].sign()
        views['grid'] = torch.diag_embed(sign)
        views['grid'] = torch.cat([views['grid'], torch.zeros(8, 2, 1)], 2)
        assert (apply_views(img, views) - img.flip(axis)).abs().max() < 1e-4


def test_crops_keep_their_share_of_the_area():
    views = draw_views(2000, ViewConfig(min_area=0.5), generator())
    area = torch.linalg.det(views['grid'][:, :, :2]).abs()
    assert area.min() >= 0.49 and area.max() <= 1 and area.std() > 0.1
    corners = views['grid'] @ torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    straight = draw_views(2000, ViewConfig(rotation=0), generator())['grid']
    inside = straight @ torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    assert inside.abs().max() <= 1 + 1e-5 < corners.abs().max()


def test_colour_survives_and_grey_stays_grey():
    red = torch.full((64, 3, 16, 16), -0.6)
    red[:, 0] = 0.2
    img = apply_views(red, {**draw_views(64, ViewConfig(rotation=0), generator())})
    mean = img.mean((2, 3))
    assert (mean[:, 0] > mean[:, 1] + 0.25).all() and (mean[:, 0] > mean[:, 2] + 0.25).all()
    grey = apply_views(
        torch.full_like(red, 0.1), draw_views(64, ViewConfig(rotation=0), generator())
    )
    assert (grey.amax(1) - grey.amin(1)).max() < 1e-5


def test_small_lesions_survive_the_blur():
    img = torch.zeros(1, 3, 64, 64)
    img[:, 1:, 31:33, 31:33] = -0.5
    views = draw_views(1, STILL, generator())
    views['grid'] = torch.eye(2, 3)[None]
    views['blur'] = torch.tensor([ViewConfig().blur])
    seen = apply_views(img, views)
    assert seen[0, 1].min() < -0.2
    assert seen[0, 1].sum() == pytest.approx(img[0, 1].sum().item(), abs=1e-2)
