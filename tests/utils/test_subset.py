"""A sample of a loader's images: which, how many, and what is left alone."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset

from tie_ext.utils.subset import SampledLoader, stratified


class Listed(Dataset):
    """Images that are their own number, with torchvision's ``targets``; counts what is read."""

    def __init__(self, count: int, targets: list[int] | None = None):
        self.read: list[int] = []
        self.count = count
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        self.read.append(i)
        return torch.full((1, 2, 2), float(i)), i % 3


def numbers(loader) -> list[int]:
    found = [batch[0] if isinstance(batch, tuple) else batch for batch in loader]
    return torch.cat([x[:, 0, 0, 0] for x in found]).int().tolist() if found else []


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 70))
def test_share_of_each_class_in_a_sample(labels, count):
    rows = stratified(torch.tensor(labels), count, torch.Generator().manual_seed(0)).tolist()
    assert len(rows) == len(set(rows)) == min(count, len(labels))
    of, all_of = Counter(labels[row] for row in rows), Counter(labels)
    if count >= len(all_of):
        assert of.keys() == all_of.keys()
    for label, size in all_of.items():
        share = size * len(rows) / len(labels)
        assert share - len(all_of) <= of[label] <= share + 1


def test_images_of_the_sample_alone_are_read():
    images = Listed(1000)
    sample = SampledLoader(DataLoader(images, 16, shuffle=True), 50, 0)
    first = numbers(sample)
    assert len(set(first)) == 50 == len(images.read)
    assert max(first) > 500
    assert not sample.whole
    assert numbers(sample) == first
    assert numbers(SampledLoader(DataLoader(images, 16), 50, 0)) == first
    assert numbers(SampledLoader(DataLoader(images, 16), 50, 1)) != first
    images.read.clear()
    assert len(sample.peek()[0][0]) == 1 == len(images.read)


def test_images_that_a_sampler_leaves_out_stay_out():
    images, allowed = Listed(100), [3, 5, 8, 13, 21]
    for dataset, sampler in (
        (images, SubsetRandomSampler(allowed)),
        (Subset(images, allowed), None),
    ):
        assert (
            sorted(numbers(SampledLoader(DataLoader(dataset, 2, sampler=sampler), 50, 0)))
            == allowed
        )
    pairs = DataLoader(images, batch_sampler=[[1, 2], [2, 4]])
    assert sorted(numbers(SampledLoader(pairs, 50, 0))) == [1, 2, 4]


@pytest.mark.parametrize("nested", [False, True])
def test_targets_stratify_and_mark_ood_images(nested):
    rare = [0] * 900 + [1] * 2 + [-1] * 98
    images = Listed(1000, rare)
    dataset = Subset(images, range(1000)) if nested else images
    found = numbers(SampledLoader(DataLoader(dataset, 16), 50, 0))
    assert len(found) == 50
    assert len(images.read) == 50  # no label is read for itself
    assert set(numbers(SampledLoader(DataLoader(dataset, 16), 50, 1))) != set(found)
    assert any(900 <= i < 902 for i in found)
    assert max(found) < 902


def test_lists_at_random_and_streams_from_the_first():
    x = torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    batches = list(x.split(10))
    assert numbers(SampledLoader(batches, 200, 0)) == list(range(100))
    found = numbers(SampledLoader(batches, 25, 0))
    assert len(found) == len(set(found)) == 25
    assert found != list(range(25))
    stream = SampledLoader((batch for batch in batches), 25, 0, rereadable=False)
    assert numbers(stream) == list(range(25))
    assert not stream.whole


def test_collate_and_workers_are_those_of_the_loader():
    dataset = TensorDataset(torch.rand(40, 1, 2, 2))
    loader = DataLoader(
        dataset,
        8,
        num_workers=1,
        collate_fn=lambda rows: {"image": torch.stack([2 + r[0] for r in rows])},
    )
    sample = SampledLoader(loader, 20, 0)
    assert sample.loader.num_workers == 1
    found = torch.cat(list(sample))
    assert found.shape == (20, 1, 2, 2)
    assert found.min() >= 2
    alone = SampledLoader(DataLoader(dataset, 8, collate_fn=loader.collate_fn), 20, 0)
    assert torch.equal(found, torch.cat(list(alone)))
