"""The inputs of parameters that a layer multiplies inside of its forward: that runs once more, on the tokens that
count and under `Products`, and its result is dropped. So the model computes what it always does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peft_safety.calibration.products import Products
from peft_safety.core.parameters import IN_PROJ, ParameterOf, are_experts

Parts = Mapping[str, ParameterOf]


class Counts(Protocol):
    """What counts the rows: `InputMoments`."""

    leaders: dict[str, str]

    @property
    def counting(self) -> bool: ...

    def positions(self, lead: Sequence[int]) -> Tensor | None: ...

    def take(self, name: str, x: Tensor) -> None: ...

    def add(self, name: str, rows: Tensor, placed: bool) -> None: ...


@contextmanager
def watching(parts: Parts, moments: Counts) -> Iterator[None]:
    """While active, each forward of the parameters' layers gives its rows to `moments`."""
    owners = {id(part.owner): part.owner for part in parts.values()}
    with ExitStack() as stack:
        for key, owner in owners.items():
            own = {name: part for name, part in parts.items() if id(part.owner) == key}
            hook = partial(_look, own, moments)
            stack.callback(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _look(parts: Parts, moments: Counts, owner: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    moments.leaders |= {name: name for name in parts}
    if not moments.counting:
        return
    if isinstance(owner, nn.MultiheadAttention):
        _attention(parts, moments, owner, args, kwargs)
    elif are_experts(owner):
        _experts(parts, moments, owner, args, kwargs)
    else:
        _others(parts, moments, owner, args, kwargs)


def _attention(
    parts: Parts, moments: Counts, owner: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Any
) -> None:
    """`in_proj` multiplies query, key and value; `out_proj` what they give, time first."""
    names = ("query", "key", "value")
    given: dict[str, Tensor] = {**dict(zip(names, args, strict=False)), **{n: kwargs[n] for n in names if n in kwargs}}
    query = given["query"]
    time_first = query.ndim == 3 and not owner.batch_first
    for name in (name for name, part in parts.items() if part.parameter == IN_PROJ):
        for x in {id(x): x for x in given.values()}.values():
            moments.take(name, x.transpose(0, 1) if time_first else x)

    def see(name: str, x: Tensor) -> None:
        if query.ndim == 3:
            x = x.view(query.shape[0 if time_first else 1], -1, x.shape[-1]).transpose(0, 1)
        moments.take(name, x)

    out = {name: part for name, part in parts.items() if part.parameter != IN_PROJ}
    if out:
        _again(out, see, owner, args, kwargs)


def _experts(parts: Parts, moments: Counts, owner: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    """Of routed tokens nobody knows the positions any more, so those that count are chosen before."""
    x = args[0] if args else next(iter(kwargs.values()))
    chosen = moments.positions(x.shape[:-1])
    whole = chosen is not None and bool(chosen.all())
    placed = whole or (chosen is not None and x.ndim == 2)
    if chosen is not None and placed and not whole:
        rows = chosen.to(x.device)
        if not bool(rows.any()):
            return
        args, kwargs = tree_map_only(Tensor, lambda t: t[rows] if len(t) == len(rows) else t, (args, kwargs))
    _again(parts, lambda name, rows: moments.add(name, rows, placed), owner, args, kwargs)


def _others(parts: Parts, moments: Counts, owner: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    """A layer of any kind: what is multiplied are its own inputs, or rows whose positions nobody knows."""
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)

    def see(name: str, rows: Tensor) -> None:
        same = given is not None and given.numel() == rows.numel() and given.shape[-1:] == rows.shape[-1:]
        if given is not None and same and torch.equal(given.reshape(rows.shape).to(rows.dtype), rows):
            moments.take(name, given)
        else:
            moments.add(name, rows, False)

    _again(parts, see, owner, args, kwargs)


@torch.no_grad()
def _again(parts: Parts, see: Any, owner: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    """Run a layer's forward on copies of its arguments, by the implementation in which its products are seen."""
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    with _plainly(owner), Products(parts, see):
        owner.forward(*args, **kwargs)


@contextmanager
def _plainly(owner: nn.Module) -> Iterator[None]:
    """Without the fused operations of PyTorch's attention, and with transformers' own loop over the experts."""
    config: Any = getattr(owner, "config", None)
    chosen = getattr(config, "_experts_implementation", None) if are_experts(owner) else None
    if chosen is not None:
        config._experts_implementation = "eager"
    try:
        with without_fast_path():
            yield
    finally:
        if chosen is not None:
            config._experts_implementation = chosen


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Without the fused operations of PyTorch's attention and encoder, which call no module and nest padded inputs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
