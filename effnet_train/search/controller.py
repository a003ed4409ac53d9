"""The recurrent controller that emits a network's tokens one by one, trained by proximal policy optimization."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_train.search.space import Tokens

_EQUAL = 1e-6  # a spread of rewards that is rounding


class Policy(nn.Module):
    """Give each token's probabilities, knowing the tokens before it: an LSTM of one layer.

    It has an embedding and a classifier for each place, as places have values of their own.
    """

    def __init__(self, sizes: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.first = nn.Parameter(torch.zeros(hidden))  # what stands before the first token
        self.embeddings = nn.ModuleList(nn.Embedding(size, hidden) for size in sizes[:-1])
        self.cell = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` sequences (count, T), int64."""
        drawn: list[Tensor] = []

        def draw(log_p: Tensor) -> Tensor:
            drawn.append(torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0])
            return drawn[-1]

        with torch.no_grad():
            self._walk(count, draw)
        return torch.stack(drawn, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map sequences (N, T) to the logarithm of their probability (N,) and the entropy of their choices (N,)."""
        places = iter(tokens.T)
        given: list[Tensor] = []

        def read(_log_p: Tensor) -> Tensor:
            given.append(next(places))
            return given[-1]

        log_ps = self._walk(len(tokens), read)
        chosen = [log_p.gather(1, own[:, None])[:, 0] for log_p, own in zip(log_ps, given, strict=True)]
        entropies = [-(log_p.exp() * log_p).sum(1) for log_p in log_ps]
        return torch.stack(chosen).sum(0), torch.stack(entropies).sum(0)

    def _walk(self, count: int, choose: Any) -> list[Tensor]:
        """Return each place's log-probabilities (count, size), where `choose` settles the tokens before."""
        x = self.first.expand(count, -1)
        state = (x.new_zeros(count, self.hidden), x.new_zeros(count, self.hidden))
        found = []
        for place, head in enumerate(self.heads):
            state = self.cell(x, state)
            found.append(F.log_softmax(head(state[0]), 1))
            tokens = choose(found[-1])
            if place < len(self.embeddings):
                x = self.embeddings[place](tokens)
        return found


def clipped_loss(log_p: Tensor, old_log_p: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return what PPO minimises, a number; all arguments are (N,).

    Source: Schulman et al., arXiv 1707.06347, equation 7.
    """
    ratio = (log_p - old_log_p).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


class PPO:
    """Propose what the policy draws, and move it towards what was rewarded above the moving baseline.

    Each round's candidates are one batch, over which `epochs` steps of Adam go. The baseline and the spread around it
    (a root mean square), by which advantages are divided, are averages over rounds, of which former ones keep the part
    `baseline_decay`. So `entropy`, the weight of the bonus for staying undecided, means the same whatever the rewards.

    Source: Tan et al., arXiv 1807.11626, section 4.2; layer, initialisation, baseline and entropy bonus: Zoph et al.,
    arXiv 1707.07012, appendix A, who have a rate of 0.00035 for 20,000 candidates: ours is for some hundreds.
    Raises: ValueError naming the key.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        seed: int = 0,
        hidden: int = 100,
        lr: float = 0.005,
        epochs: int = 5,
        clip: float = 0.2,
        entropy: float = 0.2,
        baseline_decay: float = 0.9,
    ) -> None:
        for name, value in {"hidden": hidden, "lr": lr, "epochs": epochs, "clip": clip}.items():
            if not value > 0:
                raise ValueError(f"searcher.{name}={value} must be above 0")
        if not entropy >= 0:
            raise ValueError(f"searcher.entropy={entropy} must be at least 0")
        if not 0 <= baseline_decay < 1:
            raise ValueError(f"searcher.baseline_decay={baseline_decay} must be from 0 to below 1")
        self._epochs, self._clip, self._entropy, self._decay = epochs, clip, entropy, baseline_decay
        self._generator = torch.Generator().manual_seed(seed)
        self.policy = Policy(sizes, hidden)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.uniform_(-0.1, 0.1, generator=self._generator)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)
        self._moving: tuple[float, float] | None = None  # baseline and spread of rewards

    def ask(self, count: int) -> list[Tokens]:
        """Return candidates, drawn from the policy."""
        return [tuple(tokens) for tokens in self.policy.sample(count, self._generator).tolist()]

    def tell(self, candidates: Sequence[Tokens], rewards: Sequence[float]) -> Mapping[str, float]:
        """Take the steps that a round is worth."""
        if not candidates:
            return {}
        tokens, values = torch.tensor(candidates), torch.tensor(rewards, dtype=torch.float32)
        mean = float(values.mean())
        baseline, spread = self._moving or (mean, 0.0)
        found = float((values - baseline).square().mean().sqrt())
        # Until a reward differs there is no spread: divided by nearly none, the first that does would be all.
        spread = spread if spread > _EQUAL else found
        advantage = (values - baseline) / max(spread, _EQUAL)
        with torch.no_grad():
            # The policy has not changed since it drew them.
            old_log_p, undecided = self.policy(tokens)
        for _ in range(self._epochs):
            log_p, entropy = self.policy(tokens)
            loss = clipped_loss(log_p, old_log_p, advantage, self._clip) - self._entropy * entropy.mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        old, new = self._decay, 1 - self._decay
        self._moving = (old * baseline + new * mean, old * spread + new * found)
        return {"entropy": float(undecided.mean()), "baseline": self._moving[0], "spread": self._moving[1]}

    def state_dict(self) -> dict[str, Any]:
        """Return weights, Adam's moments, baseline and random numbers."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "moving": self._moving,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.policy.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._moving = state["moving"]
        self._generator.set_state(state["generator"])
