"""WMTP: token-weighted multi-token prediction fine-tuning. Recipes live in `recipes/` and call this library."""

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

# What other packages say at the start and is known to mean nothing here, by logger and level. It would stand above the
# first line that does. Filters, since MLflow sets the levels of its loggers anew when it is imported.
_FROM_LEVEL = {
    "torchao": logging.ERROR,  # the compiled kernels it did not find, which no recipe uses
    "mlflow.store.db.utils": logging.WARNING,  # that it makes the tables of a new database,
    "alembic.runtime.migration": logging.WARNING,  # or brings an older one's up to date, step by step
}
for _name in _FROM_LEVEL:
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= _FROM_LEVEL[record.name])

# Where a peer is gone, torch's C++ prints a page of stack frames beside the exception. It is read when torch is loaded.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"


def on_demand(package: str, **modules: str) -> Callable[[str], Any]:
    """Returns a package's `__getattr__` (PEP 562): what a module defines is imported when it is asked for.

    So a config names ``wmtp.data.python_functions``, and a run imports the code of its own source and no other.

    Args:
        package: its name.
        modules: for each module of the package the names that are asked for there, apart by spaces. None is a
            module's too: that would take its place as soon as anybody imports it.
    """
    home = {name: module for module, names in modules.items() for name in names.split()}
    assert not home.keys() & modules.keys()

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return find
