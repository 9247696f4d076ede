"""The moments of a task's inputs, within the memory that is free: those of one group of layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from peft_safety.calibration.activations import adapters_off
from peft_safety.calibration.budget import bytes_of, groups, need, together
from peft_safety.calibration.moments import Batch, InputMoments, attended, collect, inputs_of
from peft_safety.calibration.token_rows import TokenRows


class GroupedMoments:
    """The `InputMoments` of the layers in `parts`. Reading one of another part runs the model again: go in order."""

    def __init__(
        self, parts: Sequence[Mapping[str, nn.Module]], watch: Callable[[Mapping[str, nn.Module]], InputMoments]
    ) -> None:
        self._parts, self._watch = parts, watch
        self._place = {name: index for index, part in enumerate(parts) for name in part}
        self._index, self._current = 0, watch(parts[0])

    @property
    def tokens(self) -> int:
        return self._current.tokens

    def _of(self, name: str) -> InputMoments:
        if (index := self._place[name]) != self._index:
            del self._current  # before the next ones take their memory
            self._index, self._current = index, self._watch(self._parts[index])
        return self._current

    def reaches(self, name: str) -> bool:
        return name in self._place and self._of(name).reaches(name)

    def leader(self, name: str) -> str:
        return self._of(name).leaders[name]

    def moment(self, name: str) -> Tensor:
        return self._of(name).moment(name)

    def operator(self, name: str) -> Tensor | TokenRows:
        return self._of(name).operator(name)


def task_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    widths: Mapping[str, int],
    *,
    memory: str | int | None = None,
    progress: bool = True,
) -> GroupedMoments:
    """The moments of all tokens, adapters off. `widths`: columns that each moment is multiplied by."""
    budget = bytes_of(memory, next(model.parameters()).device)
    tokens = attended(batches)
    needs = {name: need(layer, tokens, widths[name]) for name, layer in layers.items()}
    as_rows = [name for name, one in needs.items() if one.as_rows]
    parts: list[dict[str, nn.Module]] = [dict(layers)]
    with adapters_off(model):
        if together(needs.values()) > budget:
            parts = groups(layers, inputs_of(model, layers, batches, "all"), needs, budget)

    def watch(part: Mapping[str, nn.Module]) -> InputMoments:
        with adapters_off(model):
            return collect(
                model, part, batches, positions="all", as_rows=as_rows, progress=progress, what="task inputs"
            )

    return GroupedMoments(parts, watch)
