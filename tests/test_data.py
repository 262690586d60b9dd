from __future__ import annotations

import gzip
import http.server
import threading
from functools import partial

import numpy as np
import pytest
import torch

from lightning_optcore.data import DataError, Digits, FashionMNIST, read_idx


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_set(tmp_path):
    """The four files in miniature: 20 training and 6 test images."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in zip(FashionMNIST.FILES, [(20, 28, 28), (20,), (6, 28, 28), (6,)], strict=True):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(rng.integers(0, 10, shape))))
    return folder


def test_digits_are_split_once_and_for_all():
    first, second = Digits(), Digits()
    first.setup()
    second.setup()
    sets = (first.train_set, first.val_set, first.test_set)
    assert [len(part) for part in sets] == [1257, 270, 270]
    assert torch.equal(first.val_set.tensors[0], second.val_set.tensors[0])
    assert len({tuple(image.flatten().tolist()) for part in sets for image in part.tensors[0]}) == 1797
    other = Digits(split_seed=1)
    other.setup()
    assert not torch.equal(first.val_set.tensors[1], other.val_set.tensors[1])


def test_digits_can_be_enlarged():
    data = Digits(image_size=16)
    data.setup()
    images = data.train_set.tensors[0]
    assert images.shape[1:] == (1, 16, 16)
    assert 0 <= images.min() < images.max() <= 1


def test_real_fashion_mnist(fashion_mnist):
    data = FashionMNIST(root=str(fashion_mnist))
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [55000, 5000, 10000]
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (128, 1, 28, 28)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.bincount(data.test_set.tensors[1]).tolist() == [1000] * 10


def test_plain_files_are_read_too(small_set):
    for path in small_set.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    data = FashionMNIST(root=str(small_set), val_size=5, train_size=4)
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [4, 5, 6]


def test_a_missing_folder_says_how_to_get_the_data(tmp_path):
    with pytest.raises(DataError, match=r"data.root=.*dataset-fashion-mnist.*data.download=true"):
        FashionMNIST(root=str(tmp_path / "nowhere")).prepare_data()


@pytest.mark.parametrize("cut", [2, 10, 300, -1])
def test_a_truncated_file_is_named(small_set, cut):
    path = small_set / f"{FashionMNIST.FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: (truncated|no IDX)"):
        FashionMNIST(root=str(small_set), val_size=5).setup()


def test_content_that_lacks_images_is_named(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(idx(np.zeros((3, 4)))[:-1])
    with pytest.raises(DataError, match=r"truncated \(11 of 12 bytes\)"):
        read_idx(path)


def test_another_format_is_named(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(DataError, match=r"no IDX file of unsigned bytes"):
        read_idx(path)


def test_labels_that_do_not_match_are_named(small_set):
    labels = small_set / f"{FashionMNIST.FILES[1]}.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(7))))
    with pytest.raises(DataError, match="20 images in train-images-idx3-ubyte, 7 labels"):
        FashionMNIST(root=str(small_set), val_size=5).setup()


@pytest.fixture
def server(small_set):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(small_set))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_missing_files_are_fetched_where_allowed(server, tmp_path):
    data = FashionMNIST(root=str(tmp_path / "new"), download=True, url=server, val_size=5)
    data.prepare_data()
    data.setup()
    assert len(data.test_set) == 6


def test_a_damaged_download_leaves_nothing_behind(server, small_set, tmp_path):
    path = small_set / f"{FashionMNIST.FILES[2]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    new = tmp_path / "new"
    with pytest.raises(DataError, match="truncated"):
        FashionMNIST(root=str(new), download=True, url=server).prepare_data()
    assert sorted(p.name for p in new.iterdir()) == sorted(f"{name}.gz" for name in FashionMNIST.FILES[:2])


def test_an_unreachable_server_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data.url=http://127.0.0.1:9: cannot fetch train-images"):
        FashionMNIST(root=str(tmp_path), download=True, url="http://127.0.0.1:9").prepare_data()


@pytest.mark.parametrize("make", [lambda: Digits(batch_size=0), lambda: FashionMNIST(batch_size=-1)])
def test_a_senseless_batch_size_is_named(make):
    with pytest.raises(ValueError, match=r"data.batch_size=(0|-1): expected at least 1"):
        make()


def test_a_validation_set_that_leaves_nothing_is_named(small_set):
    with pytest.raises(ValueError, match=r"data.val_size=20: expected less than 20"):
        FashionMNIST(root=str(small_set), val_size=20).setup()
