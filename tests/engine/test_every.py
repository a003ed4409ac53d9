from fractions import Fraction
from math import ceil

import pytest
from hydra.utils import instantiate

from effnet_train.engine.every import Every


@pytest.mark.parametrize("epochs", [1, 0.1, 1.1, 2.4, 0.05, 7])
@pytest.mark.parametrize(
    ("batch_size", "num_images"), [(4096, 20_000), (128, 1000), (7, 100), (10, 100), (100, 100), (64, 50)]
)
def test_epochs_are_due_at_the_first_step_that_reaches_each_multiple(epochs, batch_size, num_images):
    last = 300
    period = Fraction(str(epochs)) * num_images / batch_size  # in steps
    expected = {ceil(k * period) for k in range(1, ceil(last / period) + 1)} & set(range(last + 1))

    every = Every(epochs=epochs)
    assert {step for step in range(last + 1) if every.due(step, batch_size, num_images)} == expected


def test_epochs_do_not_drift_over_the_paper_run():
    every, images, batch_size = Every(epochs=0.1), 1_281_167, 4096
    for k in [1, 2, 3, *range(3490, 3501)]:
        step = -(-k * images // (10 * batch_size))
        assert every.due(step, batch_size, images), k
        assert not every.due(step - 1, batch_size, images), k
        assert not every.due(step + 1, batch_size, images), k


def test_steps():
    assert [step for step in range(13) if Every(steps=4).due(step, 8, 100)] == [4, 8, 12]


def test_neither_is_never():
    assert not any(Every().due(step, 8, 100) for step in range(200))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5, "epochs": 1}, "steps=5 and epochs=1 are both set; choose one"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number of at least 1"),
        ({"epochs": 0}, "epochs=0 must be more than 0"),
        ({"epochs": float("inf")}, "epochs=inf must be more than 0 and finite"),
        ({"epochs": float("nan")}, "epochs=nan must be more than 0 and finite"),
    ],
)
def test_meaningless_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Every(**arguments)


def test_made_from_a_config():
    assert instantiate({"_target_": "effnet_train.engine.every.Every", "epochs": 1}) == Every(epochs=1)
