"""Networks for the handwritten digits that scikit-learn ships, and the digits.

1797 images of 8 x 8 pixels, ten classes (Alpaydin and Kaynak 1998, UCI repository). Pixels are divided by 16, their
largest value, and nothing else: no statistic of the data enters. The split is fixed and stratified: in the order of the
file, every fifth image of each class is for testing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvature.errors import TaskError

__all__ = ["UNTRAINED", "half_squared_error", "load_digits", "make_cnn", "make_mlp", "untrained_tanh"]

NUM_CLASSES = 10
TEST_EVERY = 5


def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1442 examples for training and 355 for testing.

    Each is a pair: images (N, 1, 8, 8), float32 in [0, 1], and labels (N,), int64.

    Raises:
        TaskError: if scikit-learn, which ships the images, is not installed.
    """
    pixels, classes = np.split(_table(), [64], axis=1)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(classes[:, 0], dtype=torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(NUM_CLASSES):
        members = (labels == c).nonzero()[:, 0]
        is_test[members[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def _table() -> np.ndarray[Any, Any]:
    """Return pixels and class of every image, (1797, 65), without the second that importing scikit-learn takes."""
    try:
        found = find_spec("sklearn")
    except ValueError:  # of a module that says nothing of itself
        found = None
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.exists():
            return np.loadtxt(file, delimiter=",")
    try:
        from sklearn import datasets  # of a version that keeps it elsewhere
    except ImportError as error:
        raise TaskError(
            f"the digits tasks take their images from scikit-learn, which does not import ({error}); "
            "pip install 'torch-curvature[tasks]'."
        ) from error
    return np.column_stack(datasets.load_digits(return_X_y=True))


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def make_cnn() -> nn.Module:
    """Return three convolutions with batch normalisation and a linear layer."""
    model = nn.Sequential()
    model.add_module("block1", _convolution(1, 16))
    model.add_module("block2", _convolution(16, 32))
    model.add_module("pool", nn.AvgPool2d(2))
    model.add_module("block3", _convolution(32, 32))
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("classifier", nn.Linear(32, NUM_CLASSES))
    return model


def make_mlp() -> nn.Module:
    """Return a 64-10-10-10 tanh network."""
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    model.add_module("hidden1", nn.Linear(64, 10))
    model.add_module("tanh1", nn.Tanh())
    model.add_module("hidden2", nn.Linear(10, 10))
    model.add_module("tanh2", nn.Tanh())
    model.add_module("classifier", nn.Linear(10, NUM_CLASSES))
    return model


UNTRAINED = "digits-tanh"
"""Name of the task that is bundled without parameters: one to be trained, that reaches the edge of stability."""


def untrained_tanh() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a 64-64-64-10 tanh network, initialised by the seed 0, and 500 digits less their mean, one-hot labels.

    Full-batch training is that of Cohen et al. (2021), scaled down: its sharpness rises to 2 / lr for lr of 0.4 to 0.8.
    """
    (images, labels), _ = load_digits()
    x = images[:500].flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, NUM_CLASSES))
    return model, (x - x.mean(0), torch.eye(NUM_CLASSES)[labels[:500]])


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return half the squared distance, summed over classes and averaged over examples."""
    return 0.5 * (outputs - targets).square().sum(1).mean()
