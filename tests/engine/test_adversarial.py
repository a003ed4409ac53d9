import numpy as np
import pytest
import torch
from torch import nn

from effnet_train.data.loader import Batch
from effnet_train.data.preprocess import Preprocess, normalize
from effnet_train.distributed import Session
from effnet_train.engine.adversarial import _SALT, Adversarial, AdvProp, Attack, Attacker, pgd
from effnet_train.engine.evaluate import Member, evaluate_members, unchanged
from effnet_train.models.auxiliary import add_auxiliary
from effnet_train.models.efficientnet import EfficientNet
from effnet_train.models.layers import uniform
from effnet_train.optim.losses import CrossEntropy

PREPROCESS = Preprocess(resolution=3)
LOSS = CrossEntropy(label_smoothing=0.0)
KEYS, LABELS = torch.tensor([11, 12, 13, 14]), torch.tensor([0, 2, 1, 1])


class Linear(nn.Module):
    """Logits that are linear in the inputs: the gradient can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 27, generator=torch.Generator().manual_seed(3)))

    def forward(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


def by_hand(pixels: np.ndarray, weight: np.ndarray, attack: AdvProp, start: np.ndarray) -> np.ndarray:
    """Attack each image (3, 3, 3) of pixels from 0 to 255, step by step, in levels of 255."""
    std, mean = (np.array(values).reshape(3, 1, 1) for values in (PREPROCESS.std, PREPROCESS.mean))
    attacked = []
    for image, label, begin in zip(pixels, LABELS.tolist(), start, strict=True):
        x = np.clip(image + attack.epsilon * begin, 0, 255)
        for _ in range(attack.steps):
            logits = weight @ ((x / 255 - mean) / std).reshape(-1)
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            shares[label] -= 1
            x = x + attack.step_size * np.sign((weight.T @ shares).reshape(3, 3, 3))
            x = np.clip(np.clip(x, image - attack.epsilon, image + attack.epsilon), 0, 255)
        attacked.append(x)
    return np.stack(attacked)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(("epsilon", "steps", "step_size"), [(1, 1, 1.0), (4, 5, 1.0), (3, 4, 2.0), (8, 1, 2.5)])
def test_pgd_is_the_one_written_by_hand(epsilon: float, steps: int, step_size: float, random_start: bool) -> None:
    attack = AdvProp(epsilon=epsilon, steps=steps, step_size=step_size, random_start=random_start)
    pixels = torch.randint(256, (4, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    pixels[0, 0], pixels[1, 0] = 0, 255  # at the ends of what a pixel can be
    model = Linear()
    inputs = normalize(pixels, PREPROCESS.mean, PREPROCESS.std)
    found = Adversarial(model, attack, PREPROCESS).attacked(LOSS, inputs, LABELS, KEYS)
    start = np.zeros((4, 3, 3, 3))
    if random_start:
        start = (2 * uniform(KEYS, 27, salt=_SALT).T.reshape(4, 3, 3, 3) - 1).double().numpy()
        assert np.abs(start).max() <= 1
    wanted = by_hand(pixels.permute(0, 3, 1, 2).double().numpy(), model.weight.detach().double().numpy(), attack, start)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESS.mean, PREPROCESS.std))
    np.testing.assert_allclose(((found * std + mean) * 255).numpy(), wanted, atol=1e-3)
    assert np.abs(wanted - pixels.permute(0, 3, 1, 2).numpy()).max() > 0.9 * min(epsilon, step_size * steps)
    assert model.weight.grad is None


def test_without_a_number_the_steps_are_the_papers() -> None:
    """Xie et al., section 5.1: epsilon + 1 of size 1, but for epsilon 1 one; so many lead epsilon away."""
    assert [Attack(epsilon=epsilon).count for epsilon in (0.5, 1, 2, 3, 4)] == [1, 1, 3, 4, 5]
    assert [Attack(epsilon=8, step_size=size).count for size in (2, 3, 8)] == [5, 4, 1]
    assert (AdvProp(epsilon=4).count, AdvProp(epsilon=4, steps=None).count, Attack(epsilon=4, steps=2).count) == (
        1,
        5,
        2,
    )
    images, black_and_white = torch.full((1, 3, 1, 1), 0.5), (torch.tensor(0.0), torch.tensor(1.0))
    attack = Attack(epsilon=4)
    found = pgd(
        *(images, torch.ones_like),
        start=torch.zeros(1),
        epsilon=torch.tensor(4 / 255),
        step_size=torch.tensor(1 / 255),
        steps=attack.count,
        bounds=black_and_white,
    )
    torch.testing.assert_close(found, images + 4 / 255)


class Unkeyed(Linear):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images, KEYS)


def test_an_evaluation_attacks_by_the_labels() -> None:
    """Also where nothing else computes gradients."""
    attack = Attack(epsilon=3, steps=4, step_size=1.5)
    pixels = torch.randint(256, (4, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    model = Unkeyed().eval()
    with torch.inference_mode():
        inputs = normalize(pixels, PREPROCESS.mean, PREPROCESS.std)
        found = Attacker(attack, PREPROCESS, torch.device("cpu"))(model, inputs, LABELS + 0)
    values = {"epsilon": 3, "steps": 4, "step_size": 1.5, "random_start": False}
    weight, whole = model.weight.detach().double().numpy(), pixels.permute(0, 3, 1, 2).double().numpy()
    wanted = by_hand(whole, weight, AdvProp(**values), np.zeros((4, 3, 3, 3)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESS.mean, PREPROCESS.std))
    np.testing.assert_allclose(((found * std + mean) * 255).numpy(), wanted, atol=1e-3)
    assert model.weight.grad is None
    with pytest.raises(ValueError, match=r"attack\.steps=4 has no effect without attack\.epsilon=, say 1"):
        Attack(steps=4)


def test_no_attack_makes_right_what_was_wrong() -> None:
    """As one that leads away from the class that the network takes an image for would, of a label that comes second."""
    pixels = torch.randint(256, (64, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    model = Unkeyed().eval()
    second = model(normalize(pixels, PREPROCESS.mean, PREPROCESS.std)).topk(2).indices[:, 1]
    batch = Batch(pixels, second, torch.arange(64), [])
    attacker = Attacker(Attack(epsilon=64, steps=8, step_size=16), PREPROCESS, torch.device("cpu"))
    for attack in (unchanged, attacker):
        member = Member({"m": model}, [batch], PREPROCESS, attack)
        found = evaluate_members([member], num_images=64, precision="fp32", session=Session())["m"]
        assert (found.top1, found.images) == (0, 64)


def network() -> EfficientNet:
    torch.manual_seed(0)
    model = EfficientNet(width=0.1, depth=0.1, resolution=32, num_classes=3, bn_momentum=0.5, dropout=0, drop_connect=0)
    add_auxiliary(model)
    return model.train()


def test_an_attack_raises_the_loss_and_leaves_the_network_alone() -> None:
    model, images = network(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = Adversarial(model, AdvProp(epsilon=4, steps=5), Preprocess(resolution=32))
    attacked = objective.attacked(LOSS, images, LABELS, KEYS)
    assert not attacked.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    change = (attacked - images).abs() * torch.tensor(PREPROCESS.std).view(3, 1, 1) * 255
    assert 0.5 < change.max() <= 4.001
    loss = objective(model, LOSS, images, LABELS, KEYS)[0]
    clean = objective(model, LOSS, images, LABELS, KEYS)[1]
    assert tuple(clean.shape) == (4, 3)
    assert loss.item() > 2 * LOSS(clean, LABELS).item()


def test_the_attack_goes_through_the_auxiliary_batch_norms() -> None:
    model, images = network(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    plain = EfficientNet(width=0.1, depth=0.1, resolution=32, num_classes=3, dropout=0, drop_connect=0).train()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".auxiliary." not in name})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".norm.weight"):  # of the others
                parameter.copy_(torch.linspace(-2, 2, len(parameter)))
    attack = AdvProp(epsilon=2, steps=2)
    found, wanted = (
        Adversarial(one, attack, Preprocess(resolution=32)).attacked(LOSS, images, LABELS, KEYS)
        for one in (model, plain)
    )
    # The sign of a gradient near 0 is rounding's.
    assert ((found - wanted).abs() < 1e-4).float().mean() > 0.99


def test_both_losses_train_the_weights_and_each_its_batch_norms() -> None:
    """The gradient is that of two networks that share all but their BatchNorms, as in the paper's algorithm."""
    model, images = network(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    objective = Adversarial(model, AdvProp(epsilon=2, steps=2), Preprocess(resolution=32))
    attacked = objective.attacked(LOSS, images, LABELS, KEYS)
    objective(model, LOSS, images, LABELS, KEYS)[0].backward()
    plain = EfficientNet(width=0.1, depth=0.1, resolution=32, num_classes=3, dropout=0, drop_connect=0).train()
    own = {name: tensor for name, tensor in network().state_dict().items() if ".auxiliary." not in name}
    plain.load_state_dict(own)
    gradients = []
    for inputs in (images, attacked):
        plain.zero_grad()
        LOSS(plain(inputs, KEYS), LABELS).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in plain.named_parameters()})
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[0].items():
        if ".norm." in name:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
            other = name.replace(".norm.", ".norm.auxiliary.")
            torch.testing.assert_close(found[other], gradients[1][name], rtol=1e-3, atol=1e-5)
        else:
            torch.testing.assert_close(found[name], gradient + gradients[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epsilon": -1.0}, "advprop.epsilon=-1.0 must be 0, for no attack, or positive: levels of 255"),
        ({"epsilon": 1.0, "steps": 0}, "advprop.steps=0 must be at least 1; for no attack set advprop.epsilon=0"),
        ({"epsilon": 1.0, "step_size": 0.0}, "advprop.step_size=0.0 must be more than 0"),
        ({"steps": 5}, "advprop.steps=5 has no effect without advprop.epsilon=, say 1"),
    ],
)
def test_what_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvProp(**values)
