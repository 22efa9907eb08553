"""The random streams of the data: order, crops, replacements."""

import numpy as np

from dataset.draws import CropDraws, crop_draws, epoch_order, replacement


def test_no_two_images_of_an_epoch_share_draws():
    draws = {crop_draws(0, epoch, index) for epoch in range(2) for index in range(10_000)} | {crop_draws(1, 0, 0)}
    assert len(draws) == 20_001
    assert len({d.choice for d in draws}) == len({d.top for d in draws}) == 20_001
    assert crop_draws(3, 2**31, 2**40) == crop_draws(3, 2**31, 2**40)


def test_draws_are_uniform_and_independent():
    table = np.array([crop_draws(5, 1, index) for index in range(4000)], float)
    assert np.all((table >= 0) & (table <= 1))
    assert np.allclose(table.mean(0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(table.T) - np.eye(5)).max() < 0.06
    assert np.abs(np.corrcoef(table[1:, 0], table[:-1, 0])[0, 1]) < 0.06


def test_a_draw_never_changes():
    expected = CropDraws(0.047750112370791964, 0.6074384456319367, 0.5022478233722624, 0.27186690248318357, True)
    assert crop_draws(7, 3, 11) == expected
    assert [replacement(7, 3, 11, attempt, 1000) for attempt in (1, 2)] == [955, 852]


def test_every_bit_of_a_seed_counts():
    assert len({crop_draws(2**64 - 1 - k, 0, 0) for k in range(100)} | {crop_draws(2**63, 0, 0)}) == 101


def test_orders_differ_by_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 1000) for seed in range(2) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert max((a == b).mean() for i, a in enumerate(orders) for b in orders[:i]) < 0.02
    assert epoch_order(7, 2, 6).tolist() == [5, 4, 3, 2, 1, 0]  # never changes
