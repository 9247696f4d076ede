"""A pytest plugin: only tests that concern LoRA run, and one JSON line says how each of them ended."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peft_suite import arms

LONGEST = 1000
"""Characters of a message that are kept."""


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("peft_suite")
    group.addoption("--suite-arm", default="plain")
    group.addoption("--suite-results", default="", help="file of JSON lines; tests that it has are not run again")
    group.addoption("--suite-only", default="", help="file with the names of the tests to run, one a line")


def pytest_configure(config: Any) -> None:
    arms.install(config.getoption("--suite-arm"))
    for mark in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", mark)
    config.pluginmanager.register(Recorder(config), "peft-suite")


class Known(dict):
    """For PEFT's `hub_online_once`: every model was fetched before, so that it stays offline."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


class Recorder:
    """Counts what concerns LoRA in each test, and writes its result."""

    def __init__(self, config: Any) -> None:
        self.path = Path(config.getoption("--suite-results"))
        self.only = config.getoption("--suite-only")
        self.used, self.raised, self.row = 0, [], {}  # type: ignore[var-annotated]
        self._watch()

    def _watch(self) -> None:
        """Count LoRA's configs and layers, and note the typed errors, also those that a test catches."""
        import peft
        from peft.tuners.lora import LoraLayer

        def counting(cls: Any, name: str, kinds: tuple[str, ...]) -> None:
            original = getattr(cls, name)

            def counted(this: Any, *args: Any, **kwargs: Any) -> Any:
                self.used += not any(kind in type(this).__module__ for kind in kinds)
                return original(this, *args, **kwargs)

            setattr(cls, name, counted)

        counting(peft.LoraConfig, "__post_init__", ("adalora",))
        counting(LoraLayer, "__init__", ("adalora",))
        if arms.LoraConfig is not peft.LoraConfig:
            from peft_safety.errors import PeftSafetyError

            def noting(error: Any, *args: Any) -> None:
                super(PeftSafetyError, error).__init__(*args)
                self.raised.append({"error": type(error).__name__, "says": str(error)[:LONGEST]})

            PeftSafetyError.__init__ = noting  # type: ignore[method-assign, assignment]

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """No test of other methods, and none that has run already. One that was begun and never ended has crashed."""
        done = finished(self.path)
        only = None if not self.only else set(Path(self.only).read_text(encoding="utf-8").splitlines())
        wanted = [
            item
            for item in items
            if short(item.nodeid) not in done
            and (only is None or short(item.nodeid) in only)
            and concerns_lora(getattr(item, "callspec", None))
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
        items[:] = wanted
        for name, module in list(sys.modules.items()):
            if name.endswith(".testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
                module._HUB_MODEL_ACCESSES = Known()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Iterator[None]:
        self.used = int(names_lora(getattr(item, "callspec", None)))
        self.raised.clear()
        self.row = {"test": short(item.nodeid), "outcome": "crashed", "lora": True}
        self._write()
        self.row |= {"outcome": "passed", "seconds": 0.0}
        result = yield
        self.row["lora"] = self.used > 0
        if self.row["outcome"] not in ("passed", "skipped"):
            self.row["raised"] = list(self.raised)
        self._write()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[Any]:
        report = yield
        self.row["seconds"] += round(report.duration, 3)
        if report.skipped:
            self.row["outcome"] = "skipped"
        elif report.failed and self.row["outcome"] != "failed":
            self.row |= {"outcome": "failed", "when": call.when, "chain": chain(call.excinfo.value)}
        return report

    def _write(self) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.row) + "\n")


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each test."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["test"]: row for row in rows}


def short(nodeid: str) -> str:
    """The name of a test without folders, the same in all arms: pytest names parameters by the class."""
    path, _, rest = nodeid.partition("::")
    name = arms.LoraConfig.__name__
    rest = re.sub(rf"\b{name}\b", "LoraConfig", rest)
    rest = re.sub(rf"(?<=_){name.removesuffix('Config')}(?=_|$)", "Lora", rest)  # as the tests of mixed models do
    return f"{Path(path).name}::{rest}"


def chain(error: BaseException | None) -> list[dict[str, str]]:
    """An error and those behind it, the last one first, with the innermost line of each."""
    result: list[dict[str, str]] = []
    while error is not None and len(result) < 8:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = "" if frame is None else f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        result.append({"error": type(error).__name__, "says": str(error)[:LONGEST], "where": where})
        error = error.__cause__ or error.__context__
    return result


def _configs(callspec: Any) -> list[Any]:
    import peft

    values = list(getattr(callspec, "params", {}).values())
    values += [part for value in values if isinstance(value, (tuple, list)) for part in value]
    kinds = [value if isinstance(value, type) else type(value) for value in values]
    return [kind for kind in kinds if issubclass(kind, peft.PeftConfig)]


def concerns_lora(callspec: Any) -> bool:
    """Whether a test's parameters name no config at all, or that of LoRA."""
    return not (kinds := _configs(callspec)) or arms.LoraConfig in kinds


def names_lora(callspec: Any) -> bool:
    return arms.LoraConfig in _configs(callspec)
