"""Losses: functions of logits and targets."""

from torch import Tensor, nn
from torch.nn import functional as F


class CrossEntropy(nn.Module):
    """Cross entropy with label smoothing: `smoothing / classes` on every class, the rest on the right one.

    Source: `tf.losses.softmax_cross_entropy(label_smoothing=0.1)`, as the authors call it.
    """

    def __init__(self, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing={label_smoothing} must lie in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the batch, a float32 scalar.

        `logits` are (N, K) of any float type; `targets` are class numbers (N,) or probabilities (N, K).
        """
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)


def distillation(logits: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return how far a student's softened probabilities are from its teacher's, a float32 scalar.

    `logits` and `teacher` are (N, K) logits. The divergence KL(teacher || student) of softmax(logits / temperature),
    the mean over the batch, times the square of `temperature`: so gradients are of the labels' size, whatever it is.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, sections 2 and 2.1. Their cross entropy
    is this and the teacher's entropy, which no gradient knows of.
    """
    student, wanted = ((scores.float() / temperature).log_softmax(dim=1) for scores in (logits, teacher))
    return F.kl_div(student, wanted, reduction="batchmean", log_target=True) * temperature**2
