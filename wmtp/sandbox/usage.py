"""What a process used, and whether it was the machine that kept it from using more."""

import resource

_BLOCKS_A_READ = 256  # of 512 bytes: what the kernel reads ahead in a file
# A process that wants to run and may not is put aside and taken up again many times: every 10 to 140 ms beside 5 to 15
# busy processes on its CPU, every 20 ms under a container's quota of a tenth of one. One that sleeps, whole or in naps
# of a millisecond, or waits for a lock that nobody frees, goes of its own accord: it is put aside once a second or
# less, whatever runs beside it. The line is drawn at 0.3 s (half of the idle time must be accounted for).
_PUT_ASIDE_SECONDS = 0.15
_READ_SECONDS = 0.02  # of a busy disk

Usage = dict[str, float]


def usage_of(usage: resource.struct_rusage) -> Usage:
    """CPU seconds (`cpu`), the times it was put aside for another (`preempted`) and waited for a disk (`read`)."""
    return {
        "cpu": usage.ru_utime + usage.ru_stime,
        "preempted": usage.ru_nivcsw,
        "read": usage.ru_majflt + usage.ru_inblock / _BLOCKS_A_READ,
    }


def own_usage() -> Usage:
    """Of this process."""
    return usage_of(resource.getrusage(resource.RUSAGE_SELF))


def between(before: Usage, after: Usage) -> Usage:
    """What was used from one time to another."""
    return {name: after[name] - value for name, value in before.items()}


def starved(wall: float, *usages: Usage) -> bool:
    """Whether the machine, and not the program, is to blame for what of `wall` seconds was not computed in.

    Args:
        usages: of the processes that took turns meanwhile.

    A process that was kept from running for a tenth of the time or less would have been late without that too.
    """
    idle = wall - sum(usage["cpu"] for usage in usages)
    kept = sum(_PUT_ASIDE_SECONDS * usage["preempted"] + _READ_SECONDS * usage["read"] for usage in usages)
    return idle > 0.1 * wall and kept > 0.5 * idle
