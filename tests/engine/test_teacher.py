import pytest
import torch
from torch import nn

from effnet_train.data.preprocess import Preprocess, normalize
from effnet_train.engine.teacher import Distill, Distillation, Teacher, fingerprint

STUDENT = Preprocess(resolution=6)
OWN = Preprocess(resolution=12, mean=(0.5, 0.5, 0.5), std=(0.5, 0.4, 0.3))
PIXELS = torch.randint(256, (3, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Seen(nn.Module):
    """Keeps what it is given; its logits are the means of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.inputs, self.was_training = images, self.training
        return self.norm(images).mean((2, 3)) * self.weight


def teacher(resolution: int, classes: tuple[int, ...] = (0, 1, 2)) -> tuple[Seen, Teacher]:
    model = Seen()
    return model, Teacher(model, own=OWN, student=STUDENT, resolution=resolution, classes=classes)


def test_the_teacher_sees_the_students_pixels_in_its_own_normalisation():
    model, taught = teacher(6)
    taught(normalize(PIXELS, STUDENT.mean, STUDENT.std))
    torch.testing.assert_close(model.inputs, normalize(PIXELS, OWN.mean, OWN.std), rtol=1e-5, atol=1e-5)


def test_the_teacher_sees_them_at_its_own_resolution():
    model, taught = teacher(12)
    taught(normalize(PIXELS, STUDENT.mean, STUDENT.std))
    pixels = PIXELS.permute(0, 3, 1, 2) / 255
    scaled = nn.functional.interpolate(pixels, (12, 12), mode="bicubic", antialias=True).clamp(0, 1)
    wanted = (scaled - torch.tensor(OWN.mean).view(3, 1, 1)) / torch.tensor(OWN.std).view(3, 1, 1)
    torch.testing.assert_close(model.inputs, wanted, rtol=1e-5, atol=1e-5)


def test_the_teacher_stays_as_it_is():
    model, taught = teacher(6, classes=(2, 0))
    before = fingerprint(model)
    logits = taught(normalize(PIXELS, STUDENT.mean, STUDENT.std).requires_grad_())
    assert (tuple(logits.shape), logits.requires_grad, model.was_training) == ((3, 2), False, False)
    torch.testing.assert_close(logits[:, 1], model(model.inputs)[:, 0])
    assert fingerprint(model) == before
    model.weight.data += 1e-6
    assert fingerprint(model) != before


def test_the_losses_are_weighted():
    _, taught = teacher(6)
    student = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    images = normalize(PIXELS, STUDENT.mean, STUDENT.std).contiguous()

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.tensor(7.0)

    class Keyed(nn.Module):
        def forward(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            return student(images)

    found = {
        weight: Distillation(taught, 2.0, weight)(Keyed(), loss, images, torch.zeros(3), torch.zeros(3))[0].item()
        for weight in (0.25, 1.0)
    }
    assert found[0.25] == pytest.approx(0.25 * found[1.0] + 0.75 * 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 2.0}, r"distill.temperature=2.0 needs a teacher: give distill.teacher=..."),
        ({"teacher": "x", "temperature": 0.0}, "distill.temperature=0.0 must be more than 0"),
        ({"teacher": "x", "weight": 0.0}, r"distill.weight=0.0 must be the teacher's share of the loss"),
        ({"teacher": "x", "resolution": 0}, "distill.resolution=0 must be at least 1, or teacher, or student"),
    ],
)
def test_what_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        Distill(**values)
