"""The moments of a task's inputs, within the memory that is free: those of one group of layers at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft_safety.calibration.batches import Batch, attended
from peft_safety.calibration.budget import bytes_of, groups, need, together
from peft_safety.calibration.models import adapters_off
from peft_safety.calibration.moments import InputMoments, Moment, collect, inputs_of


class GroupedMoments:
    """The `InputMoments` of all tokens, adapters off. `widths`: columns that each moment is multiplied by. Reading a
    layer of another group runs the model again: go in order.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        widths: Mapping[str, int],
        *,
        memory: str | int | None = None,
        progress: bool = True,
    ) -> None:
        budget, tokens = bytes_of(memory, next(model.parameters()).device), attended(batches)
        needs = {name: need(layer, tokens, widths[name]) for name, layer in layers.items()}
        as_rows = [name for name, one in needs.items() if one.as_rows]
        self._reading: dict[str, Any] = {"as_rows": as_rows, "progress": progress, "what": "task inputs"}
        self._model, self._batches, self._parts = model, batches, [dict(layers)]
        if together(needs.values()) > budget:
            with adapters_off(model):
                self._parts = groups(layers, inputs_of(model, layers, batches, "all"), needs, budget)
        self._place = {name: index for index, part in enumerate(self._parts) for name in part}
        self._index, self._current = 0, self._read(0)

    @property
    def positions(self) -> int:
        """Tokens that counted, or patches or frames."""
        return self._current.tokens + self._current.others

    def _read(self, index: int) -> InputMoments:
        with adapters_off(self._model):
            return collect(self._model, self._parts[index], self._batches, positions="all", **self._reading)

    def _of(self, name: str) -> InputMoments:
        if (index := self._place[name]) != self._index:
            del self._current  # before the next ones take their memory
            self._index, self._current = index, self._read(index)
        return self._current

    def reaches(self, name: str) -> bool:
        return name in self._place and self._of(name).reaches(name)

    def leader(self, name: str) -> str:
        return self._of(name).leaders[name]

    def moment(self, name: str) -> Tensor:
        return self._of(name).moment(name)

    def operator(self, name: str) -> Moment:
        return self._of(name).operator(name)
