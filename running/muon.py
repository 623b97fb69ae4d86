"""The optimizer of segmentations under --recipe short: Muon for the weights of convolutions, AdamW for the rest.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". torch.optim.Muon takes matrices alone.
"""
import torch
import torch.nn.functional as F


class Muon(torch.optim.AdamW):
    """AdamW, but a convolution's weight, as a matrix (out, in k k), moves by its momentum made orthogonal: about as far
    in each direction that the momentum has. In all it moves as far as by AdamW (Liu et al. 2025, arXiv 2502.16982), so
    that one learning rate serves all weights. Its products are in the precision of autocast."""

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        for weight in group["params"]:
            if weight.ndim < 4 or weight.grad is None:
                continue
            state = self.state[weight]
            if not state:  # AdamW looks for a step when a run goes on
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(weight))
            momentum = state["exp_avg"].lerp_(weight.grad, 0.05)
            ahead = weight.grad.lerp(momentum, 0.95).flatten(1)               # Nesterov's; (out, in k k)
            size = 0.2 * max(ahead.shape) ** 0.5                              # an RMS of 0.2
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(orthogonal(ahead).view_as(weight), alpha=group["lr"] * size)
            weight.grad = None                                                # AdamW passes it by
        super().step()


def orthogonal(matrix):
    """Return a matrix (m, n) with the same singular vectors, its singular values levelled: near 1, 0.7 to 1.2, but
    small ones at most 40 times their share of the norm. These are three of Jordan's Newton-Schulz steps. By his five,
    which take longer, networks here learnt no more."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = F.normalize(wide, dim=(0, 1))
    for _ in range(3):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.775 * gram) @ wide
    return wide if wide.shape == matrix.shape else wide.T
