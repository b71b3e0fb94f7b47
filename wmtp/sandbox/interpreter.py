"""How the processes of the sandbox are started: an interpreter apart from the caller's modules and environment."""

import os
import sys
from pathlib import Path

_BOOTSTRAP = """
import sys, types
for name, folders in (("wmtp", []), ("wmtp.sandbox", [{sandbox!r}])):
    sys.modules[name] = types.ModuleType(name)  # neither __init__ is run: they import what is not needed here
    sys.modules[name].__path__ = folders
from wmtp.sandbox.{module} import main
main()
"""


def python_command(module: str, *args: str) -> list[str]:
    """Command line of an interpreter that runs `wmtp.sandbox.<module>.main` and imports nothing else of the library."""
    # -P and -s with an environment of our own isolate like -I, which would also ignore PYTHONHASHSEED.
    sandbox = str(Path(__file__).resolve().parent)
    code = _BOOTSTRAP.format(sandbox=sandbox, module=module)
    return [sys.executable, "-P", "-s", "-c", code, *args]


def clean_environment() -> dict[str, str]:
    """Variables of the sandbox's processes: none of the caller's but two, which say where to find and what to keep."""
    environment = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the order of a set must not change a verdict from run to run
        "MALLOC_ARENA_MAX": "1",  # each further arena would reserve 64 MiB of the address space allowed
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    }
    passed_on = ("LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")
    return environment | {name: os.environ[name] for name in passed_on if name in os.environ}
