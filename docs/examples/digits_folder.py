"""Write scikit-learn's handwritten digits as a folder of pictures, ``photos/CLASS/NUMBER.png``."""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

root, each = Path("photos"), int(sys.argv[1]) if len(sys.argv) > 1 else 30  # pictures of each class
digits = load_digits()
for label in range(10):
    (root / str(label)).mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(digits.images[digits.target == label][:each]):
        Image.fromarray((pixels * 255 / 16).astype("uint8")).resize((32, 32)).save(root / str(label) / f"{number}.png")
print(f"{root}: {10 * each} pictures of 10 classes")
