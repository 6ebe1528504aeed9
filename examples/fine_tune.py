"""Fine-tune a pretrained DenseNet-121: `python fine_tune.py IMAGES [WEIGHTS] [EPOCHS]`.

IMAGES has train/ and val/, each with one folder of images per class. Without WEIGHTS, a file of
pretrained ones, torchvision's are downloaded. The usual recipe: a new classifier, SGD with
momentum, a tenth of the rate every seven epochs, the best epoch's weights.
"""

import sys

import torch
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2

from densenet_fast import densenet121, load_weights

images, weights, epochs = [*sys.argv[1:], *(None, None)][:3]
device = "cuda" if torch.cuda.is_available() else "cpu"
end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
end.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
begin = {"train": [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]}
begin["val"] = [v2.Resize(256), v2.CenterCrop(224)]
data = {p: datasets.ImageFolder(f"{images}/{p}", v2.Compose(begin[p] + end)) for p in begin}
loaders = {p: torch.utils.data.DataLoader(data[p], 4, shuffle=p == "train") for p in data}

model = densenet121(weights=None if weights else "IMAGENET1K_V1")
if weights:
    load_weights(model, weights)
model.classifier = nn.Linear(model.classifier.in_features, len(data["train"].classes))
model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
best = -1.0
for epoch in range(int(epochs or 25)):
    for part, loader in loaders.items():
        model.train(part == "train")
        loss_sum, right = 0.0, 0
        for batch, labels in loader:
            optimizer.zero_grad()
            with torch.set_grad_enabled(part == "train"):
                logits = model(batch.to(device))
                loss = nn.functional.cross_entropy(logits, labels.to(device))
            if part == "train":
                loss.backward()
                optimizer.step()
            loss_sum += loss.item() * len(labels)
            right += int((logits.argmax(1).cpu() == labels).sum())
        accuracy = right / len(data[part])
        print(f"{epoch} {part}: loss {loss_sum / len(data[part]):.4f}, accuracy {accuracy:.4f}")
    schedule.step()
    if accuracy > best:
        best = accuracy
        torch.save(model.state_dict(), "fine_tuned.pt")
