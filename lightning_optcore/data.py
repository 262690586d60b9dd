"""Small real image sets for the demo, the tests and the benchmarks."""

from __future__ import annotations

import gzip
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class DataError(RuntimeError):
    """Data that is missing or damaged."""


class _Images(LightningDataModule):
    """Loaders over tensors that fit in memory."""

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size}: expected at least 1")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_set: TensorDataset | None = None
        self.val_set: TensorDataset | None = None
        self.test_set: TensorDataset | None = None

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation batches."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """Test batches."""
        return self._loader(self.test_set)

    def _loader(self, dataset: TensorDataset | None, shuffle: bool = False) -> DataLoader:
        if dataset is None:
            raise RuntimeError("call setup() before asking for a loader")
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


class Digits(_Images):
    """The 1,797 images of handwritten digits, 8x8 pixels, that ship with scikit-learn.

    Args:
        batch_size: Images per batch.
        num_workers: Worker processes of the loaders.
        image_size: Pixels per side; the images are enlarged bilinearly to it.
        split_seed: Seed of the split into 70% training, 15% validation and 15% test images.

    Example:
        >>> data = Digits(batch_size=16)
        >>> data.setup()
        >>> next(iter(data.val_dataloader()))[0].shape
        torch.Size([16, 1, 8, 8])
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0, image_size: int = 8, split_seed: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        if image_size < 1:
            raise ValueError(f"data.image_size={image_size}: expected at least 1")
        self.image_size = image_size
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        """Split the images."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        if self.image_size != images.shape[-1]:
            images = torch.nn.functional.interpolate(images, size=(self.image_size,) * 2, mode="bilinear")
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        val, test = int(0.7 * len(order)), int(0.85 * len(order))
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[index], labels[index]) for index in (order[:val], order[val:test], order[test:])
        )


class FashionMNIST(_Images):
    """FashionMNIST (Xiao et al., 2017, arXiv:1708.07747): 70,000 grey images, 28x28 pixels, 10 classes.

    Reads the four IDX files, gzipped or not. The last ``val_size`` training images validate.

    Args:
        root: Folder of the IDX files; Debian's ``dataset-fashion-mnist`` installs the default.
        batch_size: Images per batch.
        num_workers: Worker processes of the loaders.
        val_size: Training images kept for validation.
        train_size: Use only the first images of the rest; ``None`` uses all.
        download: Fetch missing files into ``root`` from ``url``.
        url: Where the files are.
    """

    FILES = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def __init__(
        self,
        root: str = "/usr/share/datasets/fashion-mnist",
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: int = 5000,
        train_size: int | None = None,
        download: bool = False,
        url: str = "https://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root = Path(root)
        self.val_size = val_size
        self.train_size = train_size
        self.download = download
        self.url = url

    def prepare_data(self) -> None:
        """Check that the files are there, or fetch them where ``download`` allows it."""
        missing = [name for name in self.FILES if self._path(name) is None]
        if not missing:
            return
        if not self.download:
            raise DataError(
                f"data.root={self.root}: {missing[0]}.gz is not there; install Debian's package "
                "(apt-get install dataset-fashion-mnist), set data.root to the folder of the IDX files, "
                "or set data.download=true"
            )
        for name in missing:
            self._fetch(name)

    def setup(self, stage: str | None = None) -> None:
        """Read the images."""
        images, labels = self._pair(*self.FILES[:2])
        last = len(labels) - self.val_size
        if last < 1:
            raise ValueError(f"data.val_size={self.val_size}: expected less than {len(labels)} images")
        first = last if self.train_size is None else min(self.train_size, last)
        self.train_set = TensorDataset(images[:first], labels[:first])
        self.val_set = TensorDataset(images[last:], labels[last:])
        self.test_set = TensorDataset(*self._pair(*self.FILES[2:]))

    def _path(self, name: str) -> Path | None:
        return next((p for p in (self.root / f"{name}.gz", self.root / name) if p.is_file()), None)

    def _pair(self, images: str, labels: str) -> tuple[Tensor, Tensor]:
        pixels, targets = (self._read(name) for name in (images, labels))
        if len(pixels) != len(targets):
            raise DataError(f"data.root={self.root}: {len(pixels)} images in {images}, {len(targets)} labels")
        return torch.from_numpy(pixels).float().div(255).unsqueeze(1), torch.from_numpy(targets).long()

    def _read(self, name: str) -> np.ndarray:
        path = self._path(name)
        if path is None:
            raise DataError(f"data.root={self.root}: {name}.gz is not there")
        return read_idx(path)

    def _fetch(self, name: str) -> None:
        target = self.root / f"{name}.gz"
        temporary = target.with_suffix(".part")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(f"{self.url}/{name}.gz", timeout=60) as answer:
                temporary.write_bytes(answer.read())
            read_idx(temporary)
            temporary.replace(target)
        except (OSError, urllib.error.URLError) as error:
            raise DataError(f"data.url={self.url}: cannot fetch {name}.gz into {self.root} ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not (format: yann.lecun.com/exdb/mnist).

    Raises:
        DataError: If the file is damaged, truncated, or no IDX file.
    """
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, kind, rank = struct.unpack(">HBB", content[:4])
        if zeros != 0 or kind != 8:
            raise DataError(f"{path}: no IDX file of unsigned bytes; give the folder of the IDX files as data.root")
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); fetch the file again") from error
    expected = int(np.prod(shape))
    present = len(content) - 4 - 4 * rank
    if present != expected:
        raise DataError(f"{path}: truncated ({present} of {expected} bytes); fetch the file again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
