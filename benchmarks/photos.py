"""Made-up photos in class folders, and the short way from them to a student: time, and what the ONNX file predicts.

python benchmarks/photos.py FOLDER            # writes FOLDER/photos with 60 photos of 3 classes
python benchmarks/photos.py FOLDER --distill  # and distils ResNet-20 into ResNet-8 on them, and prints the CPU time
"""

import argparse
import math
import random
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("circle", "square", "triangle")


def make_photo(name, seed):
    """Draw one photo: a shape of any colour, place, size and angle on a background with gradient and noise."""
    draw = random.Random(f"{name} {seed}")
    width, height = draw.choice([(120, 90), (90, 120), (100, 100)])
    sky, ground = ([draw.randrange(256) for _ in range(3)] for _ in range(2))
    photo = Image.new("RGB", (1, 2))
    photo.putdata([tuple(sky), tuple(ground)])
    photo = photo.resize((width, height), Image.Resampling.BILINEAR)
    noise = Image.effect_noise((width, height), draw.uniform(10, 40)).convert("RGB")
    photo = Image.blend(photo, noise, 0.25)
    colour = tuple((sky[k] + 128 + draw.randrange(-40, 40)) % 256 for k in range(3))
    radius = draw.uniform(0.25, 0.4) * min(width, height)
    x, y = draw.uniform(radius, width - radius), draw.uniform(radius, height - radius)
    corners = {"circle": 60, "square": 4, "triangle": 3}[name]
    turn = draw.uniform(0, 2 * math.pi)
    angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
    ImageDraw.Draw(photo).polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=colour)
    return photo.filter(ImageFilter.GaussianBlur(0.7))


def make_photos(folder, each=20, classes=CLASSES):
    """Write class folders of JPEG files, and return their folder."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            make_photo(name, number).save(folder / name / f"IMG_{number:04}.jpg", quality=90)
    return folder


def main():
    """Write the photos, and distil on them if wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=20, help="photos of each class")
    parser.add_argument("--distill", action="store_true")
    options = parser.parse_args()
    photos = make_photos(options.folder / "photos", options.each)
    print(f"{3 * options.each} photos in {photos}")
    if options.distill:
        from kd_lightning.__main__ import main as command

        line = ["distill", str(photos), "--student", "resnet8", "--teacher", "resnet20", "--epochs", "5"]
        command([*line, "--image-size", "64", "--out", str(options.folder / "runs"), "--yes"])
        print(f"{time.process_time():.0f} s of CPU, imports included")


if __name__ == "__main__":
    main()
