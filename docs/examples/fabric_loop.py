"""Distillation in a loop of your own, with Lightning Fabric: ``python fabric_loop.py [EPOCHS]``."""

import sys

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Teacher
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10

digits = load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
train, test = TensorDataset(x[:1200], y[:1200]), (x[1200:], y[1200:])


def fit(fabric, network, loss_of):
    """Train a network on the loss of its logits, inputs and labels; return it, and its accuracy."""
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(DataLoader(train, batch_size=64, shuffle=True))
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            fabric.backward(loss_of(model(inputs), inputs, labels))
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(fabric.to_device(test[0])).argmax(1).cpu() == test[1]
    return network, right.float().mean().item()


fabric = Fabric(accelerator="auto", devices=1)
fabric.launch()
fabric.seed_everything(0)
network, of_teacher = fit(fabric, DigitsCNN(width=32), lambda logits, inputs, labels: F.cross_entropy(logits, labels))

teacher = fabric.to_device(Teacher(network))  # frozen, in eval mode, without gradients
soft_loss, soft_weight = KDLoss(temperature=4.0), 0.9


def distill(logits, inputs, labels):
    """Return the objective of a batch."""
    soft = soft_loss(logits, teacher(inputs), labels)
    return (1 - soft_weight) * F.cross_entropy(logits, labels) + soft_weight * soft


_, of_student = fit(fabric, DigitsCNN(width=4), distill)
fabric.print(f"teacher {of_teacher:.3f}, student {of_student:.3f}")
