"""What audits find in pixels alone, computed once for the pictures of many audits."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
from PIL import Image

from anonymization.audit import copies, photographs
from datasets.sides import DiscPlace, find_disc


def remember_pictures(patch: pytest.MonkeyPatch) -> None:
    """Makes audits remember discs and nearest photographs, by the pixels they depend on."""
    known: dict[Hashable, Any] = {}

    def once(key: Hashable, compute: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = compute()
        return known[key]

    def disc(image: Image.Image) -> DiscPlace:
        return once((image.size, image.tobytes()), lambda: find_disc(image))

    def compare(
        self: copies.Detector,
        picture: Any,
        *,
        other_than: int | None = None,
        members: Sequence[int] = (),
    ) -> tuple[float, float, int]:
        sources = b''.join(maps.tobytes() for maps in self.sources)
        key = sources, self.people.tobytes(), picture.tobytes(), other_than, tuple(members)
        return once(key, lambda: whole(self, picture, other_than=other_than, members=members))

    whole = copies.Detector.compare
    patch.setattr(photographs, 'find_disc', disc)
    patch.setattr(copies.Detector, 'compare', compare)
