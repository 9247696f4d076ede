"""What a layer multiplies its parameters by, seen while its forward runs: inputs that no hook on a module gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_safety.core.parameters import ParameterOf
from peft_safety.errors import CalibrationError, UnsupportedLayerError

PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::matmul": (0, 1),
    "aten::linear": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::addmv": (1, 2),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
}
"""Operations that multiply two of their arguments, and which. All other products of torch are made of them."""
COPIES = ("aten::_to_copy", "aten::clone", "aten::index", "aten::index_select")
"""Operations whose result is a parameter again: in another dtype or layout, or of some experts."""


class Products(TorchDispatchMode):
    """While active, `see(name, rows)` gets the rows `(rows, in_features)` that each product multiplies a parameter by,
    also through views, casts and copies of it.

    Raises (from within the forward):
        UnsupportedLayerError: the rows are on the other side than PEFT's `lora_A`.
        CalibrationError: the parameter goes into an operation that is none of `PRODUCTS`, so that its inputs would be
            missed.
    """

    def __init__(self, parts: Mapping[str, ParameterOf], see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._parts, self._see = dict(parts), see
        self._copies: dict[int, tuple[str, int, Tensor]] = {}  # and the copy itself: its address stays taken

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        known = self._known()
        found = {i: known[a] for i, x in enumerate(args) if (a := _address(x)) in known}
        others = {key: known[a] for key, x in options.items() if (a := _address(x)) in known}
        nested = [x for value in (*args, *options.values()) if isinstance(value, (list, tuple)) for x in value]
        others |= {str(i): known[a] for i, x in enumerate(nested) if (a := _address(x)) in known}
        if found or others:
            self._follow(func._schema.name, args, options, result, found, others)
        return result

    def _known(self) -> dict[int, tuple[str, int]]:
        """Name and stride of the inputs' axis, by the address of a storage. Offloaded weights come and go."""
        own = {name: w for name, part in self._parts.items() if _address(w := part.weight)}
        result = {_address(w): (name, w.stride(self._parts[name].input_axis)) for name, w in own.items()}
        if len(result) < len(own):
            raise CalibrationError(f"{', '.join(own)}: these parameters share their memory. Target one of them.")
        return {address: (name, stride) for address, (name, stride, _) in self._copies.items()} | result

    def _follow(
        self,
        operation: str,
        args: tuple[Any, ...],
        options: dict[str, Any],
        result: Any,
        found: dict[int, tuple[str, int]],
        others: dict[str, tuple[str, int]],
    ) -> None:
        name, stride = next(iter((*found.values(), *others.values())))
        if isinstance(result, (list, tuple)):
            views = all(_address(x) == _address(args[0]) for x in result)
        else:
            views = isinstance(result, Tensor) and 0 in found and _address(result) == _address(args[0])
        if not others and len(found) == 1:
            index = next(iter(found))
            if operation in PRODUCTS and index in PRODUCTS[operation]:
                self._see(name, self._rows(operation, name, stride, index, args, options))
                return
            if index == 0 and operation in COPIES:
                self._copy(operation, name, stride, args, result)
                return
            if index == 0 and (views or not isinstance(result, (Tensor, list, tuple))):
                return
        raise CalibrationError(
            f"{name}: {self._parts[name].extra_repr()} goes into {operation}, where its inputs cannot be seen. Leave "
            "it out of target_parameters and target_modules."
        )

    def _rows(
        self, operation: str, name: str, stride: int, index: int, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        left, right = PRODUCTS[operation]
        first = index == left
        weight, other = args[index], args[right if first else left]
        summed = weight.ndim - (1 if first or weight.ndim == 1 or operation == "aten::linear" else 2)
        n = self._parts[name].shape[1]
        if weight.shape[summed] != n or weight.stride(summed) != stride:
            raise UnsupportedLayerError(
                f"{name}: {self._parts[name].extra_repr()} cannot be protected: {operation} sums over the axis that "
                "PEFT takes for its outputs, so that lora_A is on their side. Leave it out of target_parameters."
            )
        if "grouped_mm" in operation:
            ends = args[2] if len(args) > 2 else options["offs"]
            other = other[: int(ends[-1])]
        elif first and other.ndim > 1:
            other = other.mT
        return other.detach().reshape(-1, n)

    def _copy(self, operation: str, name: str, stride: int, args: tuple[Any, ...], result: Tensor) -> None:
        weight, n = args[0], self._parts[name].shape[1]
        axes = [i for i in range(weight.ndim) if weight.stride(i) == stride and weight.shape[i] == n]
        axis = axes[-1] - weight.ndim if axes else 0
        taken = args[1] if operation == "aten::index" else ()
        chosen = [i for i, index in enumerate(taken) if index is not None]
        if operation == "aten::index_select":
            chosen = [args[1] % weight.ndim]
        if not axes or axes[-1] in chosen or result.ndim < -axis or result.shape[axis] != n:
            raise CalibrationError(
                f"{name}: {operation} takes some of the input features of {self._parts[name].extra_repr()}. Leave it "
                "out of target_parameters."
            )
        self._copies[_address(result)] = (name, result.stride(axis), result)


def _address(x: Any) -> int:
    """Of a tensor's storage; 0 where there is none."""
    if not isinstance(x, Tensor) or x.is_meta or x.layout is not torch.strided:
        return 0
    return x.untyped_storage().data_ptr()
