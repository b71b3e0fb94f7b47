"""What torchrun and `tune run` print: loaded into them by torch, through an entry point of the installed package.

torch asks packages for rendezvous backends when its launcher is imported (entry points `torchrun.handlers`); this is
the one moment at which a package is heard in that process, which never imports a recipe. So it is done in every launch
of that environment: three lines of torch's are silenced in all, and failures are told otherwise where WMTP's recipes
ran, which show it by a `wmtp` line in their reply file (:mod:`wmtp.errors`) or by their exit status after a signal.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from wmtp.errors import Stopped

_NOISE = (
    "Setting OMP_NUM_THREADS environment variable",  # torchrun's default of 1 thread a process is what is wanted
    "no error file defined for parent",  # that the launcher has no launcher above it
    "Redirects are currently not supported",  # of options that nobody gave, on macOS
)


def prepare() -> Callable[..., Any]:
    """Makes the launcher end with the error that a recipe told; the rendezvous backend that torch asked for is none."""
    elastic = "torch.distributed.elastic.multiprocessing"
    for name in ("torch.distributed.run", f"{elastic}.errors.error_handler", f"{elastic}.redirects"):
        logging.getLogger(name).addFilter(lambda record: not any(noise in str(record.msg) for noise in _NOISE))
    sys.excepthook = _hook(sys.excepthook)
    return _no_backend


def last_words(failures: dict[int, Any]) -> tuple[list[str], int] | None:
    """Says what to print of the failures of a launch, the first error last, and its exit status; None where torch's own
    report is needed.

    Args:
        failures: torch's ProcessFailure of each rank.
    """
    told = {rank: failure.error_file_data.get("wmtp") for rank, failure in failures.items()}  # "": another rank's is it
    if not any(told.values()):
        return None
    lines = []
    for rank, failure in failures.items():
        if told[rank] is None and failure.exitcode == -signal.SIGKILL:  # by the kernel, or it did not heed SIGTERM
            lines.append(f"rank {rank} was killed (SIGKILL)")
        elif told[rank] is None and failure.exitcode != -signal.SIGTERM:
            return None
    said = sorted((rank for rank in failures if told[rank]), key=lambda rank: failures[rank].timestamp, reverse=True)
    words, status = [told[rank] for rank in said], failures[said[-1]].exitcode
    if lines and status == Stopped.exit_status:  # they were stopped because one was killed, as it may be again
        return words + lines, 1
    return lines + words, status


def _hook(before: Callable[..., Any]) -> Callable[..., Any]:
    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        words = None
        if kind.__name__ == "ChildFailedError":
            words = last_words(error.failures)  # type: ignore[attr-defined]
        elif kind.__name__ == "SignalException":
            by_signal, statuses = 128 + int(error.sigval), _statuses(error)  # type: ignore[attr-defined]
            if statuses & {Stopped.exit_status, by_signal}:  # torch has said so, and the workers how to go on
                words = [], Stopped.exit_status if statuses == {Stopped.exit_status} else by_signal
        if words is None:
            before(kind, error, trace)
            return
        sys.stdout.flush()
        print(*(f"{line}\n" for line in words[0]), sep="", end="", file=sys.stderr, flush=True)
        os._exit(words[1])

    return hook


def _statuses(error: BaseException) -> set[int | None]:
    """Returns the exit statuses of the workers that the launcher waited for when a signal came."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        context = getattr(frame.f_locals.get("self"), "_pcontext", None)  # of the agent whose `run` it is
        if workers := getattr(context, "subprocess_handlers", None):
            return {worker.proc.returncode for worker in workers.values()}
    return set()


def _no_backend(parameters: Any) -> Any:
    raise ValueError("wmtp is no rendezvous backend: use c10d or static")
