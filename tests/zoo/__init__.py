"""Small networks of every kind, seeded and in eval mode: `ZOO[name]()` gives (model, example).

`ZOO` is the quick part, for every law; `WHOLE` is all of it, with the configurations of transformers.
"""

from zoo import attention, convolutional, hub, modern, perceptrons, unusual
from zoo.registry import WHOLE, ZOO

__all__ = ["WHOLE", "ZOO", "attention", "convolutional", "hub", "modern", "perceptrons", "unusual"]
