"""Write a small folder of pictures: images/CLASS/*.png, four shapes on noisy grounds, 48 x 48.

    python make_images.py [FOLDER] [PICTURES_OF_EACH_CLASS]
"""

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 48
CORNERS = {"square": 4, "triangle": 3}


def picture(shape: str, random: np.random.Generator) -> Image.Image:
    """One shape at a random place, size, angle and colour."""
    ground = random.integers(0, 130, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    colour = tuple(int(c) for c in random.integers(120, 256, 3))
    radius, turn = random.uniform(8, 16), random.uniform(0, 2 * math.pi)
    x, y = random.uniform(radius, SIZE - radius, 2)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "cross":
        for angle in (turn, turn + math.pi / 2):
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=5)
    else:
        angles = [turn + 2 * math.pi * k / CORNERS[shape] for k in range(CORNERS[shape])]
        draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=colour)
    noisy = np.asarray(image, dtype=np.int16) + random.integers(-12, 13, (SIZE, SIZE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def main(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for shape in ("circle", "cross", "square", "triangle"):
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(shape, random).save(folder / shape / f"{shape}_{number:04}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "images"), int(sys.argv[2]) if len(sys.argv) > 2 else 500)
