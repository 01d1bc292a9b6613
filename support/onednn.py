"""Matrix products on a CPU by oneDNN. PyTorch takes MKL for float32: half as fast on the AMD processor measured."""

import platform
from math import prod
from typing import Any

import torch
from torch import Tensor


def use_onednn(model: torch.nn.Module, least: float = 2e6) -> None:
    """Let the linear layers of a model on an x86 processor multiply by oneDNN, if it has at least so many weights."""
    large = sum(p.numel() for p in model.parameters()) >= least  # the toy's rounding stays as it was measured
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if large and on_cpu and platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear


class Linear(torch.nn.Linear):
    """A linear layer that multiplies by oneDNN in float32; in half precision PyTorch does so by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: (..., D)` to (..., W)."""
        for_onednn = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
        if not for_onednn or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y = Product.apply(x.reshape(-1, self.in_features), self.weight)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)


class Product(torch.autograd.Function):
    """x w^T of `x: (M, D)` and `w: (W, D)`, with its gradients g w and g^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        of_x = product(g, w.t()) if ctx.needs_input_grad[0] else None
        of_w = product(g.t(), x.t()) if ctx.needs_input_grad[1] else None
        return of_x, of_w


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of `a: (M, D)` and `b: (N, D)`, (M, N); needs no contiguous memory."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


# Floating-point operations of `product`, from the shapes of its factors, for torch's FlopCounterMode. A torch without
# oneDNN, as on a Mac, has no such operation.
FLOPS = {operation: lambda a, b, *_, **__: 2 * prod(a) * b[0]
         for operation in [getattr(torch.ops.mkldnn, "_linear_pointwise", None)] if operation}
