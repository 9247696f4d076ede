"""Registers the adapter types right after PEFT is imported, by any code. A search alone (`find_spec`) is not enough:
transformers asks whether `peft` can be found long before it imports it.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any


class WhenPeftIsImported(MetaPathFinder):
    looking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "peft" or self.looking:
            return None
        self.looking = True
        spec, self.looking = importlib.util.find_spec(fullname), False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                importlib.import_module("peft_safety.registry.registration").register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
