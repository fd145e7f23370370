"""Finding the field of view in drawn fundus photographs whose disc is known."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from datasets.fov import UnusableFrame, crop_fov, find_fov, fov_mask

SIZE = 400


def photograph(
    cx=200,
    cy=200,
    rx=180,
    ry=None,
    *,
    width=SIZE,
    height=SIZE,
    level=150,
    margin=4,
    seed=0,
    shade=None,
):
    """A disc of uneven retina colour with an optic disc, on a noisy dark margin."""
    ry = ry or rx
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    rho = np.hypot((x - cx) / rx, (y - cy) / ry)
    light = level * (1 - 0.45 * rho**2) * (1 + 0.1 * np.sin(x / 40) * np.cos(y / 30))
    light += level * 0.6 * np.exp(-((x - cx - 0.5 * rx) ** 2 + (y - cy) ** 2) / (0.12 * rx) ** 2)
    if shade is not None:
        light = light * shade(x, y)
    colour = light[..., None] * np.array([1, 0.55, 0.3])
    picture = np.where((rho < 1)[..., None], colour, margin * np.ones(3))
    picture = picture + rng.normal(0, 1.5, picture.shape)
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def assert_disc(fov, cx, cy, rx, ry=None, tolerance=3.0):
    assert fov.kind == 'disc'
    got = np.array([fov.cx, fov.cy, fov.rx, fov.ry])
    assert np.abs(got - [cx, cy, rx, ry or rx]).max() < tolerance, got


@pytest.mark.parametrize('where', [(200, 200, 180), (230, 180, 150), (120, 260, 110)])
def test_whole_disc(where):
    fov = find_fov(photograph(*where))
    assert_disc(fov, *where)
    cx, cy, r = where
    assert np.abs(np.array(fov.box) - [cx - r, cy - r, cx + r, cy + r]).max() <= 3


@pytest.mark.parametrize('level', [30, 60, 240])
def test_dark_and_bright_pictures(level):
    assert_disc(find_fov(photograph(level=level, margin=2)), 200, 200, 180)


def test_half_of_the_retina_in_the_dark():
    picture = photograph(level=160, shade=lambda x, y: 0.02 + 0.98 / (1 + np.exp((x - 190) / 8)))
    assert_disc(find_fov(picture), 200, 200, 180, tolerance=8)


def test_dark_hole_and_overexposed_crescent():
    picture = photograph(
        shade=lambda x, y: np.where(
            np.hypot(x - 190, y - 210) < 70, 0.02, np.where(y > 330, 2.5, 1)
        )
    )
    assert_disc(find_fov(picture), 200, 200, 180)


def test_flat_cut_top_and_bottom_inside_the_frame():
    picture = photograph()
    draw = ImageDraw.Draw(picture)
    draw.rectangle([0, 0, SIZE, 59], fill=(3, 3, 3))
    draw.rectangle([0, 350, SIZE, SIZE], fill=(3, 3, 3))
    fov = find_fov(picture)
    assert_disc(fov, 200, 200, 180)
    assert abs(fov.box[1] - 60) <= 2 and abs(fov.box[3] - 350) <= 2
    square = np.asarray(crop_fov(picture, fov))
    side = len(square)
    assert square.shape[0] == square.shape[1] and abs(side - 360) <= 4
    # Centred on the disc, not on what is left of it: 40 dark rows on top, 30 below.
    bright = np.nonzero(square.max(2).mean(1) > 20)[0]
    assert abs(bright[0] - 40) <= 4 and abs(side - 1 - bright[-1] - 30) <= 4


def test_disc_larger_than_the_frame():
    fov = find_fov(photograph(200, 200, 250))
    assert_disc(fov, 200, 200, 250, tolerance=5)
    assert fov.box == (0, 0, SIZE, SIZE)
    assert crop_fov(photograph(200, 200, 250), fov).size == (SIZE, SIZE)


def test_wide_frame_and_disc_cut_by_the_frame():
    picture = photograph(300, 170, 200, width=600, height=340)
    fov = find_fov(picture)
    assert_disc(fov, 300, 170, 200)
    square = crop_fov(picture, fov, size=128)
    assert square.size == (128, 128)
    array = np.asarray(square).max(2)
    assert array[:8].max() < 30 and array[-8:].max() < 30 and array[64, 4:-4].min() > 30


def test_large_photograph_is_measured_at_its_own_scale():
    picture = photograph(300, 230, 210, width=640, height=480).resize((2560, 1920))
    assert_disc(find_fov(picture), 1200, 920, 840, tolerance=12)


def test_notch_and_text_do_not_move_the_rim():
    picture = photograph()
    draw = ImageDraw.Draw(picture)
    draw.polygon([(320, 55), (345, 60), (345, 85)], fill=(150, 90, 50))
    draw.text((5, 5), 'OD 45 12/03', fill=(255, 255, 255))
    draw.rectangle([4, 385, 60, 390], fill=(200, 200, 200))
    fov = find_fov(picture)
    assert_disc(fov, 200, 200, 180)
    masked = np.asarray(crop_fov(picture, fov, mask=True)).max(2)
    y, x = np.ogrid[: len(masked), : len(masked)]
    outside = np.hypot(y - len(masked) / 2, x - len(masked) / 2) > 184
    assert masked[outside].max() == 0


def test_white_margin_becomes_black():
    picture = photograph()
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    array = np.array(picture)
    array[np.hypot(x - 200, y - 200) >= 180] = 254
    picture = Image.fromarray(array)
    fov = find_fov(picture)
    assert fov.white_margin
    assert_disc(fov, 200, 200, 180, tolerance=5)
    square = np.asarray(crop_fov(picture, fov))
    assert square[:20, :20].max() == 0 and square[-20:, -20:].max() == 0


def test_overexposed_corners_are_not_a_white_margin():
    array = np.array(photograph(200, 200, 400))
    y, x = np.mgrid[:SIZE, :SIZE]
    array[(x + y < 120) | (x - y > 300)] = 255
    fov = find_fov(Image.fromarray(array))
    assert fov.kind == 'frame' and not fov.white_margin and fov.box == (0, 0, SIZE, SIZE)


def test_squeezed_disc_is_an_ellipse_and_can_be_restored():
    picture = photograph(200, 200, 180).resize((280, 400))
    fov = find_fov(picture)
    assert_disc(fov, 140, 200, 126, 180)
    plain, restored = (crop_fov(picture, fov, unsqueeze=u) for u in (False, True))
    widths = []
    for square in (plain, restored):
        array = np.asarray(square).max(2)
        bright = np.nonzero(array[len(array) // 2] > 25)[0]
        widths.append((bright[-1] - bright[0]) / len(array))
    assert widths[0] == pytest.approx(0.7, abs=0.03)
    assert widths[1] > 0.97 and abs(restored.width - 360) <= 6


def test_frame_without_margin():
    fov = find_fov(photograph(200, 200, 600))
    assert fov.kind == 'frame' and fov.box == (0, 0, SIZE, SIZE)
    assert fov_mask(fov, SIZE, SIZE).min() == 1


def test_margin_that_is_no_disc():
    array = np.array(photograph(200, 200, 600))
    array[340:] = 2
    fov = find_fov(Image.fromarray(array))
    assert fov.kind == 'box' and abs(fov.box[3] - 340) <= 3
    mask = fov_mask(fov, SIZE, SIZE)
    assert mask[:330].min() == 1 and mask[350:].max() == 0


@pytest.mark.parametrize(
    'picture,reason',
    [
        (Image.new('RGB', (200, 150)), 'near-black'),
        (photograph(level=8), 'near-black'),
        (Image.new('RGB', (200, 200), (180, 180, 180)), 'blank'),
        (Image.new('RGB', (3, 3)), 'near-black'),
    ],
)
def test_frames_without_a_retina(picture, reason):
    with pytest.raises(UnusableFrame, match=reason):
        find_fov(picture)


def test_mask_covers_the_disc_with_a_soft_rim():
    fov = find_fov(photograph())
    mask = fov_mask(fov, SIZE, SIZE)
    assert mask.sum() == pytest.approx(np.pi * fov.rx * fov.ry, rel=0.01)
    assert 0 < ((mask > 0) & (mask < 1)).sum() < 3000


def test_same_picture_same_answer():
    assert find_fov(photograph(seed=3)) == find_fov(photograph(seed=3))


def test_pictures_that_are_no_photograph_get_a_box_inside_the_frame():
    rng = np.random.default_rng(0)
    for seed in range(30):
        h, w = (int(v) for v in rng.integers(5, 90, 2))
        blobs = rng.random((h, w)) < rng.uniform(0.01, 0.9)
        lines = np.zeros((h, w), bool)
        lines[rng.integers(0, h), :] = lines[:, rng.integers(0, w)] = True
        picture = Image.fromarray(((blobs if seed % 2 else lines) * 255).astype(np.uint8))
        try:
            fov = find_fov(picture.convert('RGB'))
        except UnusableFrame:
            continue
        left, top, right, bottom = fov.box
        assert 0 <= left < right <= w and 0 <= top < bottom <= h
        square = crop_fov(picture.convert('RGB'), fov, size=16, mask=True, unsqueeze=True)
        assert square.size == (16, 16)
