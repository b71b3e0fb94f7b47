"""WMTP: token-weighted multi-token prediction fine-tuning. Recipes live in `recipes/` and call this library."""

import logging
import os

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
