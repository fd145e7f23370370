"""How photographs are prepared for encoder training."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EncodeTransforms:
    """Resize to the encoder's input (aspect ratio not kept), mirror, scale to [-1, 1].

    mirror: flip training photographs left to right with probability 1/2. That shows left eyes as
    right ones; turn it off where laterality matters.
    """

    mirror: bool = True
