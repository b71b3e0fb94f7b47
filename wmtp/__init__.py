"""WMTP: token-weighted multi-token prediction fine-tuning. Recipes live in `recipes/` and call this library."""

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

# Loggers of other packages whose messages below a level mean nothing here. Filters are used, since MLflow sets the
# levels of its loggers again when it is imported.
_FROM_LEVEL = {
    "torchao": logging.ERROR,  # missing compiled kernels, which no recipe uses
    "mlflow.store.db.utils": logging.WARNING,  # the creation of a new database's tables
    "alembic.runtime.migration": logging.WARNING,  # the migration of an older database
}
for _name in _FROM_LEVEL:
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= _FROM_LEVEL[record.name])

# When a peer is gone, torch's C++ prints a page of stack frames beside the exception. torch reads this at its import.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"


def on_demand(package: str, **modules: str) -> Callable[[str], Any]:
    """Returns a package's `__getattr__` (PEP 562), which imports a module when one of its names is used.

    So a config names ``wmtp.data.python_functions``, and a run imports only the code of its own source.

    Args:
        modules: for each module of the package its public names, separated by spaces. No name may be a module's too: an
            import of that module would replace it.
    """
    home = {name: module for module, names in modules.items() for name in names.split()}
    assert not home.keys() & modules.keys()

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    find.names = frozenset(home)  # type: ignore[attr-defined]  # for messages about one that is not there
    return find
