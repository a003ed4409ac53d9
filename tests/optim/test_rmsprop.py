"""The optimizer that configs/optim/rmsprop.yaml names is TensorFlow's RMSProp."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_class

REPOSITORY = Path(__file__).parents[2]
GOLDEN = json.loads((REPOSITORY / "tests/golden/optim.json").read_text())["rmsprop"]
CONFIG = yaml.safe_load((REPOSITORY / "configs/optim/rmsprop.yaml").read_text())


def optimizer(parameters, weight_decay, foreach):
    arguments = {key: value for key, value in CONFIG.items() if key not in ("_target_", "weight_decay")}
    # As the command builds it: the rate is set before each step.
    groups = [{"params": parameters, "weight_decay": weight_decay}]
    return get_class(CONFIG["_target_"])(groups, lr=0.0, foreach=foreach, **arguments)


def run(case, dtype, foreach):
    """Return weights, mean squares and momenta after every step, each (steps, weights)."""
    weights = torch.nn.Parameter(torch.tensor(case["start"], dtype=dtype))
    rmsprop = optimizer([weights], case["weight_decay"], foreach)
    found = []
    for gradient, rate in zip(case["gradients"], case["rates"], strict=True):
        weights.grad = torch.tensor(gradient, dtype=dtype)
        rmsprop.param_groups[0]["lr"] = rate
        rmsprop.step()
        state = rmsprop.state[weights]
        found.append([weights.tolist(), state["square_avg"].tolist(), state["momentum_buffer"].tolist()])
    return np.array(found).transpose(1, 0, 2)


def formula(case):
    """Return the same by the recipe, in float64."""
    weights, mean_square, momentum = np.array(case["start"]), np.ones(len(case["start"])), 0.0
    found = []
    for gradient, rate in zip(case["gradients"], case["rates"], strict=True):
        gradient = np.array(gradient) + case["weight_decay"] * weights
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        momentum = 0.9 * momentum + rate * gradient / np.sqrt(mean_square + 1e-3)
        weights = weights - momentum
        found.append([weights, mean_square, momentum])
    return np.array(found).transpose(1, 0, 2)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"decay {case['weight_decay']}")
def test_states_are_tensorflows(case, foreach):
    reference = np.array([case["weights"], case["mean_square"], case["momentum"]])
    np.testing.assert_allclose(run(case, torch.float32, foreach), reference, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"decay {case['weight_decay']}")
def test_states_follow_the_recipe(case, foreach):
    np.testing.assert_allclose(run(case, torch.float64, foreach), formula(case), rtol=1e-12, atol=1e-15)


def test_configuration_has_the_recipes_numbers():
    assert CONFIG == {
        "_target_": "timm.optim.rmsprop_tf.RMSpropTF",
        "alpha": 0.9,
        "momentum": 0.9,
        "eps": 1e-3,
        "weight_decay": 1e-5,
    }


def test_torch_rmsprop_is_another_one():
    # The parity above must be able to fail: torch's puts eps outside the root and starts the mean square at 0.
    case = GOLDEN[0]
    weights = torch.nn.Parameter(torch.tensor(case["start"]))
    other = torch.optim.RMSprop([weights], lr=case["rates"][0], alpha=0.9, eps=1e-3, momentum=0.9)
    weights.grad = torch.tensor(case["gradients"][0])
    other.step()
    assert not np.allclose(weights.tolist(), case["weights"][0], rtol=1e-2)
