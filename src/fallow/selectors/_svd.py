"""Products of low rank that stand for a weight on the inputs that calibration saw."""

import torch

# Variance, as a share of the mean, that directions of the input have at least: what calibration
# did not see may still come.
DAMPING = 1e-3


class Inputs:
    """S, with S Sᵀ = E[x xᵀ] over the inputs x (d_in,), and its inverse."""

    def __init__(self, moment: torch.Tensor) -> None:
        variance, directions = torch.linalg.eigh(moment)
        scale = variance.clamp_min(DAMPING * float(variance.mean())).sqrt()
        self.root = directions * scale  # (d_in, d_in)
        self.inverse = (directions / scale).T

    def root_mean_square(self, weight: torch.Tensor) -> torch.Tensor:
        """sqrt(E[(W x)_i²]) of W (d_out, d_in), (d_out,)."""
        return torch.linalg.vector_norm(weight @ self.root, dim=1)

    def white(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (d_out, rank) and B (rank, d_in) with the least E||W x - A B S⁻¹ x||²; B Bᵀ = 1.

        The truncated SVD of W S (arXiv:2403.07378 3.2), W (d_out, d_in).
        """
        scaled = weight.float() @ self.root
        top = torch.linalg.eigh(scaled.T @ scaled)[1][:, -rank:]
        return scaled @ top, top.T

    def truncate(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (d_out, rank) and B (rank, d_in) with the least E||W x - A B x||², W (d_out, d_in).

        The columns of A have length 1, so that rounding a row of A does not spend its levels on the
        first few of them.
        """
        out, inner = self.white(weight, rank)
        size = torch.linalg.vector_norm(out, dim=0).clamp_min(1e-30)
        return out / size, size[:, None] * (inner @ self.inverse)
