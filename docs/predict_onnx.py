"""Classify pictures with an ONNX file of ``kd-lightning export``. It needs onnxruntime, numpy and Pillow alone.

    python predict_onnx.py student.onnx PICTURE...

The metadata of the file describe the way from a picture to the input. Pillow's antialiased resize gives the bytes of
torch's, or differs by 1 of 255. Greys of more than 8 bits, and files whose resize is not antialiased, are refused.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(path, how):
    """Return the input (1, C, H, W) of the network for a picture."""
    picture, resize, crop = ImageOps.exif_transpose(Image.open(path)), how["resize"], how["crop"]
    assert picture.mode[0] not in "IF", f"{path} has more than 8 bits"
    assert not resize or resize["antialias"], "Pillow always averages where a picture shrinks"
    picture = picture.convert(how["color"])
    if resize:
        size, sides = resize["size"], picture.size[::-1]  # height, width
        if resize["fit"] == "shorter_side":
            size = [int(size * side / min(sides)) for side in sides]
        elif resize["fit"] == "cover":
            factor = max(size[0] / sides[0], size[1] / sides[1])
            size = [max(size[0], round(sides[0] * factor)), max(size[1], round(sides[1] * factor))]
        picture = picture.resize(size[::-1], Image.Resampling[resize["interpolation"].upper()])
    if crop:  # zeros outside of the picture
        left, top = ((int if a < b else round)((a - b) / 2) for a, b in zip(picture.size, crop[::-1], strict=True))
        picture = picture.crop((left, top, left + crop[1], top + crop[0]))
    x = np.asarray(picture, np.float32).reshape(picture.height, picture.width, -1) * how["scale"]
    x = (x - (how["mean"] or 0)) / (how["std"] or 1)
    return x.transpose(2, 0, 1)[np.newaxis].astype(np.float32)


def main(model, *paths):
    """Print the class of each picture, and its probability."""
    session = onnxruntime.InferenceSession(model)
    metadata = session.get_modelmeta().custom_metadata_map
    how, classes = json.loads(metadata["preprocessing"]), json.loads(metadata["classes"])
    for path in paths:
        logits = session.run(["logits"], {"input": prepare(path, how)})[0][0]
        odds = np.exp(logits - logits.max())
        print(path, classes[odds.argmax()], f"{odds.max() / odds.sum():.4f}", sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
