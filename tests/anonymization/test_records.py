"""What a run keeps for its owner."""

import pytest
import torch

from anonymization.records import GroupResult, pixel_digest, write_contact_sheet
from utils.images import load_rgb


def result(centroid: torch.Tensor, image: torch.Tensor) -> GroupResult:
    return GroupResult(image, centroid, torch.zeros(2, 4), torch.zeros(0, 2), pixel_digest(image))


@pytest.mark.parametrize(('moved', 'columns'), [(False, 4), (True, 5)])
def test_a_centroid_without_steps_is_shown_once(tmp_path, moved, columns):
    members = [torch.full((3, 16, 16), 40 * i, dtype=torch.uint8) for i in range(3)]
    image = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    still = result(image, image)
    other = result(image - 50, image) if moved else still
    write_contact_sheet(tmp_path / 'sheet.png', [(members, still), (members[:2], other)])
    width, height = load_rgb(tmp_path / 'sheet.png').size
    assert width // 128 == columns and height // 128 == 2
