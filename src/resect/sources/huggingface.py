"""Image data sets of the Hugging Face `datasets` library, from a local folder or by hub id."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resect.errors import DataError
from resect.sources.splits import ArrayData

_LABEL_NAMES = ("label", "labels", "target", "class", "fine_label")
_TEST_NAMES = ("test", "validation", "valid", "val", "dev")


def load_images(spec: str) -> tuple[ArrayData, ArrayData | None, tuple[str, ...]]:
    """(training split, test split or None, class names) of the image data set `spec`.

    The image and label columns are found by their features. Pixels are float32 in [0, 1], shape (examples, channels, height,
    width). A local folder is read without touching the network. DataError where there is no such data set, no image column,
    or images of several sizes.
    """
    splits = _loaded(spec)
    if "train" not in splits:
        raise DataError(f"data set {spec!r} has the splits {sorted(splits)}; it needs one called 'train'.")
    image, label = _columns(spec, splits["train"])
    names = tuple(getattr(splits["train"].features[label], "names", None) or ())
    test = next((splits[name] for name in _TEST_NAMES if name in splits), None)
    arrays = [None if part is None else _arrays(spec, part, image, label) for part in (splits["train"], test)]
    assert arrays[0] is not None
    return arrays[0], arrays[1], names


def _loaded(spec: str) -> Any:
    try:
        import datasets
        from datasets.utils.logging import disable_progress_bar
    except ModuleNotFoundError as missing:
        raise DataError(f"{spec!r} needs the package {missing.name!r}: pip install 'resect[data]'.") from None
    disable_progress_bar()
    local = Path(spec).is_dir()
    try:
        with _silent("datasets", "huggingface_hub"):
            if local and (Path(spec) / "dataset_dict.json").is_file():
                return datasets.load_from_disk(spec)
            return datasets.load_dataset(str(Path(spec).resolve()) if local else spec)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "the folder" if local else "the hub id (is this machine online, and the name right?)"
        raise DataError(f"{where} {spec!r} could not be loaded as a Hugging Face data set: {reason}") from error


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Keep libraries from logging what an error of ours will say in one line."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _columns(spec: str, split: Any) -> tuple[str, str]:
    """Names of the image and the label column."""
    import datasets

    features = split.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = sorted(labels, key=lambda name: name not in _LABEL_NAMES) or [name for name in _LABEL_NAMES if name in features]
    if not images or not labels:
        missing = "image" if not images else "label"
        raise DataError(
            f"data set {spec!r} has no {missing} column among {list(features)}. "
            "For other data write a function that returns the examples, and name it as module:function."
        )
    return images[0], labels[0]


def _arrays(spec: str, split: Any, image: str, label: str) -> ArrayData:
    import datasets

    raw = split.cast_column(image, datasets.Image(decode=False))
    pixels = _pixels(spec, raw[image])
    inputs = torch.from_numpy(pixels).to(torch.float32).div_(255)
    return ArrayData(inputs=inputs, labels=torch.tensor(list(raw[label]), dtype=torch.int64))


def _pixels(spec: str, encoded: Iterable[dict[str, Any]]) -> np.ndarray:
    """Decoded images, (examples, channels, height, width) uint8; grey ones keep their single channel."""
    from PIL import Image

    decoded = []
    for entry in encoded:
        with Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] else entry["path"]) as picture:
            decoded.append(np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB")))
        if decoded[-1].shape != decoded[0].shape:
            raise DataError(
                f"images of {spec!r} differ in size: {decoded[0].shape} and {decoded[-1].shape}; resize them first."
            )
    stacked = np.stack(decoded)
    return stacked[:, None] if stacked.ndim == 3 else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
