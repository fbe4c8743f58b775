"""The paper's networks in PyTorch on the CPU, as its users would write and tune them."""

import numpy as np
import torch
from rooms import batch_of, data_of
from torch import nn

CHUNK = 5000


def normalized(layer: nn.Module, normalization: type[nn.Module], width: int) -> list[nn.Module]:
    """A layer, batch statistics, and the activation."""
    return [layer, normalization(width, eps=1e-6, track_running_stats=False), nn.ReLU(inplace=True)]


def convolutional(channels: int, filters: int, size: int) -> list[nn.Module]:
    """A convolution and what follows it."""
    return normalized(nn.Conv2d(channels, filters, size, padding=size // 2), nn.BatchNorm2d, filters)


def dense(inputs: int, units: int) -> list[nn.Module]:
    """A dense layer and what follows it."""
    return normalized(nn.Linear(inputs, units), nn.BatchNorm1d, units)


def build(network: str) -> nn.Module:
    """Return F1, C1 or C2 with batch statistics throughout, ending in logits."""
    if network == "F1":
        hidden = [*dense(784, 512), *(layer for _ in range(4) for layer in dense(512, 512))]
        return nn.Sequential(*hidden, nn.Linear(512, 10))
    if network == "C1":
        hidden = [*convolutional(3, 64, 5), nn.MaxPool2d(3, 2, 1), *convolutional(64, 64, 5), nn.MaxPool2d(3, 2, 1)]
        hidden += [nn.Flatten(), *dense(4096, 384), nn.Dropout(0.5), *dense(384, 192), nn.Dropout(0.5)]
        return nn.Sequential(*hidden, nn.Linear(192, 10))
    hidden, channels = [], 3
    for count, filters in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for i in range(count):
            hidden += convolutional(channels, filters, 3)
            channels = filters
            if i < count - 1:
                hidden.append(nn.Dropout(0.3 if filters == 64 else 0.4))
        hidden.append(nn.MaxPool2d(2))
    hidden += [nn.Flatten(), nn.Dropout(0.5), *dense(512, 512), nn.Dropout(0.5)]
    return nn.Sequential(*hidden, nn.Linear(512, 10))


def flat(tensors: list[torch.Tensor]) -> np.ndarray:
    """Return the tensors as one float64 vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).numpy().astype(np.float64)


class PyTorch:
    """`tuned` is channels_last and the fused ADAM; `compiled` is torch.compile. Data lie in memory, scaled, and each
    batch is an index into them."""

    def __init__(self, network: str, task: str, samples: int, tuned: bool, compiled: bool = False):
        data = data_of(network, samples)
        x = torch.tensor(data.x_train.astype(np.float32) / 255)
        self._layout = torch.channels_last if tuned and x.ndim == 4 else torch.contiguous_format
        self._x = x.permute(0, 3, 1, 2).contiguous(memory_format=self._layout) if x.ndim == 4 else x
        self._y = torch.tensor(data.y_train.astype(np.int64))
        self._model = build(network)
        if x.ndim == 4:
            self._model = self._model.to(memory_format=self._layout)
        self._parameters = list(self._model.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, eps=1e-8, fused=tuned)
        self._loss = torch.compile(self._mean_loss) if compiled else self._mean_loss
        self._batch = batch_of(network, task) if task.endswith("training") else CHUNK
        self._model.train(task.endswith("training"))
        self._w = flat(self._parameters)
        self.run = {
            "loss": self._evaluate,
            "loss and gradient": self._gradient,
            "Hessian-vector product": self._product,
        }.get(task, self._train)

    def _mean_loss(self, x, y):
        return nn.functional.cross_entropy(self._model(x), y)

    def _train(self) -> int:
        order = torch.randperm(len(self._x))
        for first in range(0, len(order), self._batch):
            chosen = order[first : first + self._batch]
            x = self._x[chosen].contiguous(memory_format=self._layout) if self._x.ndim == 4 else self._x[chosen]
            loss = self._loss(x, self._y[chosen])
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        return len(self._x)

    def _batches(self):
        parts = torch.tensor(self._w, dtype=torch.float32).split([p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.data.copy_(part.view(parameter.shape))
        return zip(self._x.split(CHUNK), self._y.split(CHUNK), strict=True)

    @torch.no_grad()
    def _evaluate(self) -> int:
        sum(len(x) * self._loss(x, y).item() for x, y in self._batches())
        return len(self._x)

    def _gradient(self) -> int:
        total = 0.0
        for x, y in self._batches():
            gradients = torch.autograd.grad(self._loss(x, y), self._parameters)
            total = total + len(x) * flat(gradients)
        return len(self._x)

    def _product(self) -> int:
        total = 0.0
        for x, y in self._batches():
            gradients = torch.autograd.grad(self._loss(x, y), self._parameters, create_graph=True)
            slope = sum((g * p.detach()).sum() for g, p in zip(gradients, self._parameters, strict=True))
            products = torch.autograd.grad(slope, self._parameters)
            total = total + len(x) * flat(products)
        return len(self._x)
