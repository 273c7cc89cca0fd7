"""Trains ResNet18 in PyTorch: in half precision, a quarter of XLA's time on a CPU that has it.

    python -m benchmarks.resnet runs/resnet18-norm-x0.5 --seed 0 --width 0.5
    python -m benchmarks.resnet runs/resnet18-x0.5 --no-norm --learning-rate 0.1
    python -m benchmarks.resnet runs/resnet18-norm-x0.5 --no-half --epochs 18 --sides 16 24 32

Half precision is for processors with instructions for it, sixteen times slower on others. Smaller
images first, as `--sides` has it, train for as many epochs in less time.
Whoever runs this installs PyTorch. The network is `resnet18` of the studies, with `--norm` unless
it is told otherwise, the data is CIFAR-10 as `experiments.data` reads it, and `seed-0.safetensors`
in the folder is for their flag `--weights`. A training that is killed goes on after its last whole
epoch.
"""

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.data import Dataset, load_dataset

# By name, so that a type checker does not ask for what the package does not need.
torch: Any = importlib.import_module("torch")
nn: Any = importlib.import_module("torch.nn")
functional: Any = importlib.import_module("torch.nn.functional")
safetensors: Any = importlib.import_module("safetensors.torch")

_BATCH = 128
_MARGIN = 4
_CHECKED = 1000  # how many test images go through the network at once


class Block(nn.Module):
    """Two convolutions and a shortcut, a projection where resolution or width change."""

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], Any]):
        """Draws the weights by PyTorch's own rule; `norm` makes what follows a convolution."""
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = norm(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            projection = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, norm(after))

    def forward(self, x: Any) -> Any:
        """Maps features to features."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """The network of Singh and Jaggi (2020), with batch norm or without, and without biases."""

    def __init__(self, width: float, has_norm: bool):
        """Draws the weights; `width` multiplies the number of units of every layer."""
        super().__init__()
        norm = nn.BatchNorm2d if has_norm else nn.Identity
        widths = [max(1, round(units * width)) for units in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = norm(widths[0])
        blocks = []
        before = widths[0]
        for stage, after in enumerate(widths):
            for place in range(2):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(Block(before, after, stride, norm))
                before = after
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(before, 10, bias=False)

    def forward(self, images: Any) -> Any:
        """Maps images `[batch, 3, 32, 32]` to logits."""
        x = functional.relu(self.bn1(self.conv1(images)))
        return self.linear(self.layers(x).mean(dim=(2, 3)))


def train(seed: int, settings: argparse.Namespace) -> None:
    """Trains one network, or goes on from its checkpoint; writes arrays and accuracy."""
    data = load_dataset("cifar10", settings.data_dir)
    images = torch.from_numpy(data.train_images).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(data.train_labels).long()
    black = images.amin(dim=(0, 2, 3)).reshape(1, 3, 1, 1)

    torch.manual_seed(seed)
    model = ResNet18(settings.width, settings.norm).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.epochs * steps, cycle_momentum=False
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = settings.folder / f"seed-{seed}.ckpt"
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["done"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    for epoch in range(done, settings.epochs):
        began = time.perf_counter()
        side = settings.sides[epoch * len(settings.sides) // settings.epochs]
        draws = torch.Generator().manual_seed(1000 * seed + epoch)
        right = 0
        for chosen in torch.randperm(len(images), generator=draws)[: steps * _BATCH].split(_BATCH):
            batch = resized(augmented(images[chosen], black, draws), side)
            right += one_step(model, optimizer, batch, labels[chosen], settings)
            schedule.step()
        saved = {name: part.state_dict() for name, part in parts.items()}
        unfinished = checkpoint.with_suffix(".part")
        torch.save(saved | {"done": epoch + 1}, unfinished)
        os.replace(unfinished, checkpoint)
        progress = {"seed": seed, "epoch": epoch + 1, "training %": 100 * right / (steps * _BATCH)}
        print(json.dumps(progress | {"seconds": round(time.perf_counter() - began)}), flush=True)

    arrays = {name: array.contiguous() for name, array in model.state_dict().items()}
    safetensors.save_file(arrays, settings.folder / f"seed-{seed}.safetensors")
    print(json.dumps({"seed": seed, "test %": accuracy(model, data)}), flush=True)


def one_step(
    model: Any, optimizer: Any, batch: Any, labels: Any, settings: argparse.Namespace
) -> int:
    """Takes one step on the cross-entropy of a batch; returns how many images were right."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.half):
        logits = model(batch.contiguous(memory_format=torch.channels_last))
    loss = functional.cross_entropy(
        logits.float(), labels, label_smoothing=settings.label_smoothing
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return int((logits.argmax(1) == labels).sum())


def augmented(batch: Any, black: Any, draws: Any) -> Any:
    """Crops each image out of a black margin, somewhere, and flips every other one."""
    count, _, height, width = batch.shape
    padded = functional.pad(batch - black, [_MARGIN] * 4) + black
    corners = torch.randint(2 * _MARGIN + 1, (count, 2), generator=draws)
    rows = corners[:, :1] + torch.arange(height)
    columns = corners[:, 1:] + torch.arange(width)
    flipped = torch.rand(count, generator=draws) < 0.5
    columns[flipped] = columns[flipped].flip(1)
    each = torch.arange(count)[:, None, None]
    cropped = padded[each, :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)


def resized(batch: Any, side: int) -> Any:
    """Returns the images with `side` pixels a side."""
    if side == batch.shape[-1]:
        return batch
    return functional.interpolate(batch, (side, side), mode="bilinear", antialias=True)


@torch.no_grad()
def accuracy(model: Any, data: Dataset) -> float:
    """Returns the accuracy on the test images in percent, in full precision."""
    model.eval()
    images = torch.from_numpy(data.test_images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.test_labels).long()
    right = 0
    for some, their in zip(images.split(_CHECKED), labels.split(_CHECKED), strict=True):
        right += int((model(some).argmax(1) == their).sum())
    return 100 * right / len(labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=0.4)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--sides", type=int, nargs="+", default=[32], help="by share of the epochs")
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    train(given.seed, given)
