"""Train MONAI's 3-D DenseNet on generated volumes, as it is and after `convert`.

`python volumes.py [EPOCHS]`: is there a sphere in the noise or not? MONAI's own transforms and
loader; the same weights, volumes and order twice, so that the losses agree.
"""

import copy
import sys
import time

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.networks.nets import DenseNet
from monai.transforms import Compose, EnsureChannelFirstd, RandFlipd, ScaleIntensityd, ToTensord
from monai.utils import set_determinism
from torch import nn

import densenet_fast

SIZE = 32
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 8
random = np.random.default_rng(0)
grid = np.stack(np.meshgrid(*3 * [np.arange(SIZE)], indexing="ij"))


def volume(label):
    noise = random.normal(size=3 * [SIZE]).astype(np.float32)
    centre = random.uniform(8, SIZE - 8, size=(3, 1, 1, 1))
    inside = np.square(grid - centre).sum(0) < random.uniform(5, 8) ** 2
    return {"image": noise + 2 * label * inside, "label": label}


steps = [EnsureChannelFirstd("image", channel_dim="no_channel"), ScaleIntensityd("image")]
training = Compose([*steps, RandFlipd("image", prob=0.5, spatial_axis=0), ToTensord("image")])
seen = Dataset([volume(i % 2) for i in range(64)], training)
unseen = Dataset([volume(i % 2) for i in range(32)], Compose([*steps, ToTensord("image")]))

set_determinism(0)
original = DenseNet(3, 1, 2, init_features=16, growth_rate=16, block_config=(4, 4, 4))
converted = copy.deepcopy(original)
print(densenet_fast.convert(converted))
for name, model in (("as it is", original), ("converted", converted)):
    set_determinism(0)
    loader = DataLoader(seen, batch_size=8, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * len(loader))
    start = time.perf_counter()
    for epoch in range(epochs):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"{name}, epoch {epoch + 1}: loss {np.mean(losses):.4f}")
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        right = [
            model(b["image"]).argmax(1) == b["label"] for b in DataLoader(unseen, batch_size=8)
        ]
    accuracy = torch.cat(right).float().mean()
    print(f"{name}: {seconds:.1f} s, {accuracy:.0%} of unseen volumes")
