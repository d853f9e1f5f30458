"""A bounded random sample: uniform, and apart from what it is given."""

import torch

from tie_ext.utils.reservoir import Reservoir


def test_uniform_sample_of_all_rows_of_a_stream():
    held = torch.zeros(40)
    for _ in range(400):
        sample = Reservoir(10)
        for part in torch.arange(40.0)[:, None].split((3, 9, 1, 20, 7)):
            sample.add(part)
        assert len(sample.rows) == 10
        held += torch.bincount(sample.rows.flatten().long(), minlength=40)
    assert held.sum() == 4000
    assert ((held > 65) & (held < 135)).all()  # 100 expected, deviation 8.7


def test_rows_that_a_full_sample_was_given():
    sample, rows = Reservoir(10), torch.zeros(10, 2)
    sample.add(rows)
    sample.add(torch.ones(1000, 2))
    assert rows.sum() == 0
    assert sample.rows.shape == (10, 2)
    assert sample.rows.sum() > 10
