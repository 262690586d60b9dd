"""The model that screens children: what it predicts, and that screening by it pays."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_optcore.search import Evolutionary, Space
from lightning_optcore.search.pareto import hypervolume_gains
from lightning_optcore.search.surrogate import Surrogate, most_promising, scaled


def smooth(x):
    return np.stack([np.sin(3 * x[:, 0]) + x[:, 1] ** 2, 5 + 100 * x[:, 0] * x[:, 1]], axis=1)


def test_a_smooth_function_is_predicted_where_it_was_not_tried():
    rng = np.random.default_rng(0)
    tried, held_out = rng.random((40, 2)), rng.random((200, 2))
    mean, deviation = Surrogate([0, 1]).fit(tried, smooth(tried), steps=50).predict(held_out)
    errors = np.abs(mean - smooth(held_out))
    assert np.all(errors.mean(0) < 0.1 * smooth(held_out).std(0))
    # As unsure as it is wrong: most of the truth lies within two deviations, and these are no empty words.
    assert np.mean(errors < 2 * deviation) > 0.85
    assert np.all(deviation.mean(0) < 0.3 * smooth(held_out).std(0))


def test_what_was_tried_without_noise_is_recovered():
    tried = np.random.default_rng(1).random((30, 2))
    mean, deviation = Surrogate([0, 1]).fit(tried, smooth(tried), steps=50).predict(tried)
    assert np.all(np.abs(mean - smooth(tried)).max(0) < 0.01 * smooth(tried).std(0))
    far = Surrogate([0, 1]).fit(tried, smooth(tried), steps=50).predict(np.array([[3.0, -2.0]]))[1]
    assert np.all(far > 3 * deviation.max(0))


def test_noise_is_averaged():
    rng = np.random.default_rng(2)
    tried = rng.random((120, 1))
    costs = tried + rng.normal(0, 0.3, size=tried.shape)
    mean, deviation = Surrogate([0]).fit(tried, costs, steps=50).predict(tried)
    assert np.abs(mean - tried).mean() < 0.1
    assert deviation.mean() < 0.15


def test_a_parameter_without_effect_is_ignored():
    rng = np.random.default_rng(3)
    tried = rng.random((60, 4))
    model = Surrogate(range(4)).fit(tried, np.sin(6 * tried[:, :1]), steps=50)
    rates = np.exp(model.logs[0][:4])
    assert rates[0] > 3 * rates[1:].max()


def test_a_choice_is_one_parameter():
    space = Space({"kind": "a,b,c,d", "x": "interval(0.0,1.0)"})
    genomes = space.random_genomes(60, np.random.default_rng(4))
    worth = np.array([0.0, 2.0, -1.0, 3.0])[genomes[:, 0].astype(int)] + genomes[:, 1]
    model = Surrogate([0, 0, 0, 0, 1]).fit(space.features(genomes[:40]), worth[:40, None], steps=50)
    mean, _ = model.predict(space.features(genomes[40:]))
    assert len(model.logs[0]) == 2 + 3
    assert np.abs(mean[:, 0] - worth[40:]).mean() < 0.1 * worth.std()


def test_equal_costs_and_equal_points_are_no_trouble():
    tried = np.repeat(np.array([[0.2, 0.4], [0.6, 0.1]]), 100, axis=0)
    for costs in (np.ones((200, 1)), np.random.default_rng(5).random((200, 1))):
        mean, deviation = Surrogate([0, 1]).fit(tried, costs, steps=50).predict(tried)
        assert np.isfinite(mean).all() and np.isfinite(deviation).all()
        assert mean.mean() == pytest.approx(costs.mean(), abs=0.1)


def test_the_scale_is_that_of_what_is_good():
    costs = scaled(np.array([[1.0], [2.0], [3.0], [4.0], [1e9]]))
    assert costs[:, 0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_first_chosen_adds_most_and_the_next_keep_away_from_it(objectives):
    rng = np.random.default_rng(6)
    bounds, costs = rng.random((40, objectives)), 0.5 + 0.5 * rng.random((10, objectives))
    gains = hypervolume_gains(bounds, costs, np.full(objectives, 1.1))
    chosen = most_promising(np.vstack([bounds, bounds]), costs, 3)
    assert gains[chosen[0] % 40] > 0.95 * gains.max()
    assert len({index % 40 for index in chosen}) == 3


def test_screening_finds_the_best_sooner():
    """Ten decisions that count unequally, 30 trials."""
    space = Space({f"layer{i}": "a,b,c" for i in range(10)})

    def worth(params):
        return sum((i + 1) * "abc".index(params[f"layer{i}"]) for i in range(10))

    def best_of(surrogate, seed):
        searcher = Evolutionary(space, ["maximize"], seed=seed, surrogate=surrogate, population_size=10)
        for _ in range(30):
            (candidate,) = searcher.ask()
            searcher.tell(candidate, worth(candidate.params))
        return searcher.best().objectives[0]

    pairs = [(best_of(True, seed), best_of(False, seed)) for seed in range(5)]
    assert all(screened > alone for screened, alone in pairs)
