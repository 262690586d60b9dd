"""Networks of the kinds that people prune, in small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_optcore.models import Classifier


class Residual(nn.Module):
    """A block of a ResNeXt: 1x1, grouped 3x3, 1x1, and the way round them."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.c2 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.c3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c3(torch.relu(self.c2(torch.relu(self.b1(self.c1(x))))))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), Residual(16, 4), Residual(16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


def mobilenet() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU6()]
    layers += [nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 16, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge, self.out = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.down1(x))
        second = self.up(torch.relu(self.down2(first)))
        return self.out(torch.relu(self.merge(torch.cat([first, second], 1))))


class Encoder(nn.Module):
    """nn.TransformerEncoder between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class SelfAttention(nn.Module):
    """In the style of Hugging Face: three projections, the sizes in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 8, 32
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.attention_head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1)


class BertLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(50, 32), SelfAttention()
        self.dense, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = self.norm(hidden + self.dense(self.attention(hidden)))
        return self.head((hidden + self.down(nn.functional.gelu(self.up(hidden))))[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.before, self.recurrent = nn.Linear(8, 16), kind(16, 12, batch_first=True)
        self.after, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.after(self.recurrent(self.before(x))[0][:, -1])))


class Rows(nn.Module):
    """A transformer over the rows of small images."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8 * 32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(images.squeeze(1))).flatten(1))


class RowsClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__(Rows(), lr=5e-3)


IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(0))
ALL = {
    "resnet": (resnet, IMAGES),
    "mobilenet": (mobilenet, IMAGES),
    "unet": (UNet, IMAGES),
    "encoder": (Encoder, TOKENS),
    "bert": (BertLike, TOKENS),
    "lstm": (Recurrent, SERIES),
    "gru": (lambda: Recurrent(nn.GRU), SERIES),
}
