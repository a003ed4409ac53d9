import json
import math
from pathlib import Path

import pytest
import torch

from effnet_train.optim.losses import CrossEntropy, distillation

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/optim.json").read_text())["smoothed_loss"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{len(case['logits'][0])} classes")
def test_loss_and_gradient_are_tensorflows(case):
    logits = torch.tensor(case["logits"], requires_grad=True)
    loss = CrossEntropy(label_smoothing=0.1)(logits, torch.tensor(case["labels"]))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=2e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(case["gradient"]), rtol=1e-5, atol=1e-7)


def test_probabilities_equal_class_numbers():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    for smoothing in (0.0, 0.1):
        loss = CrossEntropy(label_smoothing=smoothing)
        torch.testing.assert_close(loss(logits, one_hot), loss(logits, labels))


def test_mixed_targets_mix_the_losses():
    logits, loss = torch.randn(1, 3), CrossEntropy(label_smoothing=0.1)
    mixed = loss(logits, torch.tensor([[0.3, 0.0, 0.7]]))
    torch.testing.assert_close(mixed, 0.3 * loss(logits, torch.tensor([0])) + 0.7 * loss(logits, torch.tensor([2])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss(dtype):
    # 300 equal logits: exp and its sum in half precision would be off by far more.
    loss = CrossEntropy(label_smoothing=0.0)(torch.full((2, 300), 9.0, dtype=dtype), torch.tensor([0, 299]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(300), rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=rf"loss.label_smoothing={smoothing} must lie in \[0, 1\)"):
        CrossEntropy(label_smoothing=smoothing)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_distillation_is_hintons(temperature):
    """Hinton et al., section 2: gradient (q - p) / T of the cross entropy, times T squared; the mean over the batch."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    logits.requires_grad_()
    distillation(logits, teacher, temperature=temperature).backward()
    q, p = ((scores / temperature).exp() for scores in (logits.detach(), teacher))
    q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    torch.testing.assert_close(logits.grad, temperature * (q - p) / 5, rtol=1e-4, atol=1e-7)
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert distillation(logits, teacher, temperature=temperature).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_distillation_ends_where_the_student_is_the_teacher():
    scores = torch.randn(3, 4)
    assert distillation(scores + 5, scores, temperature=3.0).item() == pytest.approx(0, abs=1e-6)
