"""Networks the benchmarks run on: an ImageNet-style ResNet-18, and networks with trained weights from $RESECT_WEIGHTS."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `pad` uses the parameter-free shortcut of the CIFAR networks (option A)."""

    def __init__(self, inputs: int, width: int, stride: int, *, pad: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - inputs
        self.shortcut = None
        if not pad and (stride != 1 or self.extra):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-20 (3 blocks a stage) or ResNet-56 (9) for 32x32 images."""

    def __init__(self, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        for number, (inputs, width, stride) in enumerate(widths, 1):
            first = BasicBlock(inputs, width, stride, pad=True)
            rest = [BasicBlock(width, width, 1, pad=True) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ResNet18(nn.Module):
    """The ImageNet ResNet-18's layers, for images of any size."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stages = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        self.layers = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(inputs, width, stride, pad=False), BasicBlock(width, width, 1, pad=False))
                for inputs, width, stride in stages
            )
        )
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layers(x).mean((2, 3)))


def trained_resnet(depth: int) -> CifarResNet:
    """ResNet-20 or ResNet-56 with its trained weights, in evaluation mode."""
    model = CifarResNet((depth - 2) // 6)
    model.load_state_dict(load_file(_weights(f"resnet{depth}_cifar10.safetensors")))
    return model.eval()


def _weights(name: str) -> Path:
    root = os.environ.get("RESECT_WEIGHTS")
    if root is None:
        sys.exit(f"no weights: set RESECT_WEIGHTS to the folder that holds {name}")
    return Path(root) / name


def cifar_images(inputs: Tensor) -> Tensor:
    """(examples, 3, 32, 32) images in [0, 1], normalised as the CIFAR-10 ResNets were trained."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (inputs - mean[:, None, None]) / std[:, None, None]


def trained_minilm() -> tuple[Any, Any]:
    """The MiniLM encoder fine-tuned on SST-2, in evaluation mode and single precision, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = _weights("minilm_sst2")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)
