"""Data sets by name: the built-in digits, a Hugging Face data set (folder or hub id), or your own function."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from resect.errors import DataError
from resect.exporting import named_function, nearest
from resect.sources.splits import ArrayData, Splits, shuffled

CertifyFrom = Literal["train", "test"]
KNOWN = ("digits", "ylecun/mnist", "zalando-datasets/fashion_mnist", "uoft-cs/cifar10")


def load_data(spec: str, *, seed: int = 0, certify_from: CertifyFrom = "train") -> Splits:
    """The data set called `spec`, split by `seed` into train, calibrate, search, certify and test.

    spec: ``digits`` (scikit-learn's 1,797 handwritten digits), a local folder or hub id of a Hugging Face image data set
    (``ylecun/mnist``), or ``module:function`` that returns `Splits`, an (inputs, labels) pair, or {"train": pair, "test":
    pair}. certify_from: where a data set has a test split of its own, whether the certify examples are held out of its
    training split (then train only on `train`) or are one half of its test split (for networks trained elsewhere).

    DataError where there is no such data set, naming the nearest.
    """
    if certify_from not in ("train", "test"):
        raise DataError(f"certify_from is {certify_from!r}; it must be 'train' or 'test'.")
    if spec == "digits":
        return _digits(seed)
    if Path(spec).is_dir() or _is_hub_id(spec):
        from resect.sources.huggingface import load_images

        train, test, class_names = load_images(spec)
        return _split(Path(spec).name, train, test, class_names, seed, certify_from)
    if ":" in spec:
        return _from_function(spec, seed, certify_from)
    folders = [str(path) for path in Path().iterdir() if path.is_dir()]
    raise DataError(
        f"no data set {spec!r}: it is not a folder here, nor 'digits', a hub id such as ylecun/mnist, or module:function."
        + nearest(spec, [*KNOWN, *folders])
    )


def _is_hub_id(spec: str) -> bool:
    owner, slash, name = spec.partition("/")
    return bool(slash and owner not in {"", ".", "..", "~"} and name) and "/" not in name and ":" not in spec


def _digits(seed: int) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError("the digits come with scikit-learn, which is not installed: pip install 'resect[digits]'.") from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div(16).unsqueeze(1)
    data = ArrayData(inputs=images, labels=torch.from_numpy(bunch.target).to(torch.int64))
    return _split("digits", data, None, tuple(map(str, range(10))), seed, "train")


def _from_function(spec: str, seed: int, certify_from: CertifyFrom) -> Splits:
    function = named_function(spec, error=DataError)
    value = function(seed=seed) if "seed" in inspect.signature(function).parameters else function()
    if isinstance(value, Splits):
        return value
    parts = value if isinstance(value, Mapping) else {"train": value}
    if "train" not in parts or set(parts) - {"train", "test"}:
        raise DataError(f"{spec} returned a mapping with {sorted(parts)}; it must have 'train' and may have 'test'.")
    arrays = {name: _pair(spec, part) for name, part in parts.items()}
    return _split(spec, arrays["train"], arrays.get("test"), (), seed, certify_from)


def _pair(spec: str, part: Any) -> ArrayData:
    if isinstance(part, ArrayData):
        return part
    try:
        inputs, labels = part
        return ArrayData(inputs=torch.as_tensor(np.asarray(inputs)), labels=torch.as_tensor(np.asarray(labels)))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{spec} returned {type(part).__name__}, which is not resect.sources.Splits, an (inputs, labels) pair of arrays, "
            f"or a mapping of 'train' and 'test' to such pairs ({error})."
        ) from None


def _split(
    name: str,
    train: ArrayData,
    test: ArrayData | None,
    class_names: tuple[str, ...],
    seed: int,
    certify_from: CertifyFrom,
) -> Splits:
    """The five roles. Sizes are shares of what there is, capped where more examples buy nothing."""
    note = (
        f"The certify examples were held out of the training examples by seed {seed}: the certificate counts only for a "
        "network that was not trained on them."
    )
    if test is None:
        test, certify, search, train = shuffled(train, seed, _pool_sizes(train.examples))
    elif certify_from == "test":
        certify, test = shuffled(test, seed, (test.examples // 2,))
        search, _ = shuffled(train, seed, (min(10_000, train.examples // 5),))
        note = ""
    else:
        certify, search, train = shuffled(train, seed, (min(10_000, train.examples // 5), min(5_000, train.examples // 10)))
    calibrate, _ = shuffled(train, seed + 1, (min(10_000, train.examples),))
    return Splits(
        name=name,
        train=train,
        calibrate=calibrate,
        search=search,
        certify=certify,
        test=test,
        class_names=class_names,
        note=note,
    )


def _pool_sizes(examples: int) -> tuple[int, int, int]:
    """(test, certify, search) of a data set without a test split; the rest, some 45 %, is for training.

    An exact binomial test of "at least 95 %" at delta .05 passes with 96.8 % right among 500 examples, but needs 98.7 % among
    150: of 1,797 digits the certify split takes the largest part after training.
    """
    return examples * 17 // 100, examples * 28 // 100, examples // 10
