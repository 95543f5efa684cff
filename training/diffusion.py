"""The noise of the decoder and of the prior, and the loss of a UNet that predicts noise and its variance."""

from __future__ import annotations

import math

import numpy as np
import torch


STEPS = 1000


def linear_betas(start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Those of the 2.1 decoder, `[1000]`."""
    return np.linspace(start, end, STEPS)


def cosine_betas() -> np.ndarray:
    """Those of the prior, `[1000]` (https://arxiv.org/abs/2102.09672, equation 17)."""
    level = np.cos((np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - level[1:] / level[:-1], 0.999)


class Diffusion:
    """Tables of a Gaussian diffusion, as in https://arxiv.org/abs/2006.11239.

    Args:
        betas: `[steps]`, in float64.
        device: where they are looked up.
    """

    def __init__(self, betas: np.ndarray, device: torch.device) -> None:
        level = np.cumprod(1 - betas)
        before = np.append(1.0, level[:-1])
        variance = betas * (1 - before) / (1 - level)
        tables = {
            "signal": np.sqrt(level),
            "noise": np.sqrt(1 - level),
            "mean_of_clean": betas * np.sqrt(before) / (1 - level),
            "least_log_variance": np.log(np.append(variance[1], variance[1:])),  # it is 0 at the first
            "most_log_variance": np.log(betas),
        }
        self._tables = {n: torch.tensor(t, dtype=torch.float32, device=device) for n, t in tables.items()}

    def at(self, name: str, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Entries of a table, in a shape that broadcasts against `like`."""
        return self._tables[name][timesteps].view(-1, *[1] * (like.ndim - 1))

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`clean` `[batch, ...]` with so much noise as there is at `timesteps` `[batch]`."""
        return self.at("signal", timesteps, clean) * clean + self.at("noise", timesteps, clean) * noise

    def variance_bound(
        self,
        predicted: torch.Tensor,
        clean: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """The term of the variational bound that teaches the variance, in bits per number, `[batch]`.

        It is L_vlb of https://arxiv.org/abs/2102.09672 (section 3.1): the divergence between the true step back and
        the predicted one, and at the last step the likelihood; the mean gets no gradient from it.

        Args:
            predicted: noise and variance, `[batch, 2 * channels, height, width]`.
            clean: `[batch, channels, height, width]`.
            noisy: likewise, at `timesteps`.
            timesteps: `[batch]`.
        """
        noise, share = predicted.chunk(2, dim=1)
        guess = (noisy - self.at("noise", timesteps, noisy) * noise.detach()) / self.at("signal", timesteps, noisy)
        # between the means of the two steps back; at timestep 0 between the clean picture and the guess
        difference = self.at("mean_of_clean", timesteps, noisy) * (clean - guess)
        least, most = (self.at(f"{name}_log_variance", timesteps, noisy) for name in ("least", "most"))
        log_variance = torch.lerp(least.expand_as(share), most.expand_as(share), (share + 1) / 2)
        inverse = torch.exp(-log_variance)
        divergence = 0.5 * (log_variance - least - 1 + torch.exp(least) * inverse + difference.square() * inverse)
        likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + difference.square() * inverse)
        term = torch.where(timesteps[:, None, None, None] == 0, likelihood, divergence)
        return term.mean(dim=(1, 2, 3)) / math.log(2)

    def hybrid_loss(
        self,
        predicted: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """L_simple + L_vlb / 1000 of https://arxiv.org/abs/2102.09672, L_vlb summed over its 1000 terms.

        Args: see [`variance_bound`]; `noise` is what was added.
        """
        simple = (predicted.chunk(2, dim=1)[0] - noise).square().mean()
        bound = self.variance_bound(predicted, clean, noisy, timesteps).mean()
        return {"loss": simple + bound, "noise": simple, "variance": bound}
