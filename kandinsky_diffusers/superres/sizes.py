"""From the size of a picture to that of the canvas on which it is drawn larger."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm


@dataclass(frozen=True)
class Side:
    """Height or width, in pixels, on the way through one enlargement.

    Args:
        image: what the picture is resized to.
        padded: what its border is continued to.
        canvas: what the network draws; what it sees of the picture is stretched to it.
        kept: of the canvas.
        target: what the kept part is resized to in the end.
    """

    image: int
    padded: int
    canvas: int
    kept: int
    target: int


@dataclass(frozen=True)
class SizeRule:
    """How the original fits a picture to the network, and what we do where it crashes.

    Args:
        scale: of one enlargement.
        multiple: the original makes sides multiples of this.
        shrinks: whether it resizes the picture down to them, and the result up again (Flash); else it stretches the
            picture to the next ones on the canvas, and resizes the result down.
        network: sides that the network works on are multiples of this.
        window: sides of the canvas above this are covered by windows of this size, a multiple of `network`.
    """

    scale: int
    multiple: int
    shrinks: bool
    network: int
    window: int

    def side(self, length: int) -> Side:
        """The way of a side; where the original crashes, the picture is padded and the result cropped."""
        image = length - length % self.multiple if self.shrinks else length
        canvas = -(-image // self.multiple) * self.multiple * self.scale
        target = length * self.scale
        if canvas > self.window or (canvas and canvas % self.network == 0):
            return Side(image, image, canvas, kept=canvas, target=target)
        unit = lcm(self.multiple if self.shrinks else 1, self.network // gcd(self.network, self.scale))
        padded = -(-length // unit) * unit
        return Side(length, padded, padded * self.scale, kept=target, target=target)
