import pytest

from oomless.training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
    ],
)
def test_factors(kind, expected):
    factors = [learning_rate_factor(kind, step, 12, 1 / 6) for step in range(12)]
    assert factors == pytest.approx(expected)


def test_cosine_is_half_way_in_the_middle():
    assert learning_rate_factor("cosine", 0, 10, 0) == 1
    assert learning_rate_factor("cosine", 5, 10, 0) == pytest.approx(0.5)
    assert 0 < learning_rate_factor("cosine", 9, 10, 0) < 0.03
