"""Train the network on the train part of images/ (about half a minute) and write weights.safetensors.

Your own training goes here: coinfer wants a module and its weights, nothing else.

    python train.py [EPOCHS]
"""

import sys

import torch
from safetensors.torch import save_file
from shapes_net import make
from torch.nn import functional

from coinfer.data import load_source


def tensors(images):
    pixels = torch.from_numpy(images.pixels.copy()).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.5) / 0.5, torch.from_numpy(images.labels)


def main(epochs: int) -> None:
    torch.manual_seed(0)
    source = load_source("folder:images")
    x, labels = tensors(source.images("train"))
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * (len(x) // 50))
    for epoch in range(epochs):
        order = torch.randperm(len(x))[: len(x) // 50 * 50]
        for batch in order.split(50):
            flipped = x[batch] if epoch % 2 else x[batch].flip(3)
            loss = functional.cross_entropy(model(flipped), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    x, labels = tensors(source.images("validation"))
    with torch.no_grad():
        right = (model(x).argmax(1) == labels).float().mean().item()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "weights.safetensors")
    print(f"weights.safetensors: {100 * right:.1f} % right on {len(x)} pictures of the validation part")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
