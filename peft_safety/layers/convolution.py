"""A factor on a convolution: a linear map of patches, whose weight `(r, channels, *kernel)` is a matrix of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peft_safety.core.kinds import is_convolution

_FUNCTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class Convolution:
    """How PEFT's own factor of a convolution reads its inputs."""

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, factor: Any) -> Convolution | None:
        """That of a factor; None for a linear one."""
        return cls(factor.stride, factor.padding, factor.groups) if is_convolution(factor) else None


class Factor(nn.Linear):
    """A leaf in the place of a factor. Where it is one of a convolution, it says what PEFT asks of that one when it
    makes a wider one.
    """

    convolution: Convolution | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("stride", "padding", "groups", "kernel_size") and self.convolution is not None:
            weight: Any = self._parameters["weight"]
            return tuple(weight.shape[2:]) if name == "kernel_size" else getattr(self.convolution, name)
        return super().__getattr__(name)


def product(convolution: Convolution | None, x: Tensor, weight: Tensor) -> Tensor:
    """The outputs of a factor without a bias."""
    if convolution is None:
        return F.linear(x, weight)
    how = convolution
    result: Tensor = _FUNCTIONS[weight.ndim](
        x, weight, None, stride=how.stride, padding=how.padding, groups=how.groups
    )
    return result


def sizes(factor: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a factor as a matrix."""
    weight: Any = factor._parameters["weight"]
    if is_convolution(factor):
        return int(weight[0].numel()), int(weight.shape[0])
    return int(factor.in_features), int(factor.out_features)  # type: ignore[arg-type]
