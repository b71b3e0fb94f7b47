"""Which files a program may see, and the folder it may write to."""

import itertools
import os
import re
import site
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from wmtp.sandbox import landlock

DEVICES = ("/dev/null", "/dev/urandom", "/dev/random")  # a map of /dev/zero would be memory that no limit sees
SCRATCH_BYTES = 64 << 20
SCRATCH_FILES = 4096


def readable_paths() -> list[str]:
    """Returns what a program may read: Python's library and site-packages, shared libraries, time zones. No other file.

    Call it after the warm imports: the folders of shared libraries are those that the process has loaded from.
    """
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths.update(site.getsitepackages())
    paths.add(os.path.join(sys.base_prefix, "lib"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths.update(os.path.dirname(name) for name in re.findall(r" (/\S+\.so[^/\s]*)$", maps.read_text(), re.M))
    paths.update(("/etc/ld.so.cache", "/usr/share/zoneinfo"))
    return outermost(path for path in paths if os.path.exists(path))


def outermost(paths: Iterable[str]) -> list[str]:
    """Returns `paths` without those that lie inside another of them."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(is_inside(path, other) for other in kept):
            kept.append(path)
    return kept


def with_real(paths: Iterable[str]) -> list[str]:
    """Returns `paths` and what they are links to, the outermost of them."""
    return outermost(each for path in paths for each in (path, os.path.realpath(path)))


def is_inside(path: str, folder: str) -> bool:
    """Returns whether `path` is `folder` or lies beneath it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def without_hidden(readable: Iterable[str], hidden: Iterable[str]) -> list[str]:
    """Returns `readable` without what lies in a hidden folder: what is hidden is hidden, whoever asks for it."""
    return [path for path in readable if not any(is_inside(os.path.realpath(path), folder) for folder in hidden)]


def hidden_within(readable: Iterable[str], hidden: Iterable[str]) -> list[str]:
    """Returns the paths under which hidden folders would be seen: a readable folder may lead there through a link."""
    reals = [(path, os.path.realpath(path)) for path in readable]
    return [path + folder[len(real) :] for folder in hidden for path, real in reals if is_inside(folder, real)]


def bubblewrap_options(base: str, hidden: list[str]) -> list[str]:
    """Returns options of `bwrap` that show what a program may read without `hidden`, and an empty folder at `base`."""
    command = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    sandbox = str(Path(__file__).resolve().parent)
    loader = [path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64") if os.path.isdir(path)]
    readable = with_real(without_hidden([*readable_paths(), *loader, sys.prefix, sys.base_prefix], hidden))
    for path in readable:
        command += ["--ro-bind", path, path]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    for path in hidden_within(readable, hidden):
        command += ["--tmpfs", path]
    command += ["--ro-bind", sandbox, sandbox]  # which the zygote is started from
    return [*command, "--size", str(SCRATCH_BYTES), "--tmpfs", base, "--"]


def landlock_rules(readable: Iterable[str], hidden: list[str], box: str) -> list[tuple[str, int]]:
    """Returns rules for `landlock.Ruleset`: read `readable` without `hidden`, write `box`, use the harmless devices."""
    rules = [(box, landlock.SCRATCH)] + [(device, landlock.DEVICE) for device in DEVICES]
    for path in readable:
        rules += _rules_around(path, hidden)
    return rules


def _rules_around(path: str, hidden: list[str]) -> Iterator[tuple[str, int]]:
    """Grants a tree, entry by entry (and for listing) where a part of it is hidden, since a rule grants all."""
    real = os.path.realpath(path)
    if any(is_inside(real, part) for part in hidden):
        return
    if not any(is_inside(part, real) for part in hidden):
        yield path, landlock.READ
        return
    yield path, landlock.LIST
    for name in os.listdir(path):
        yield from _rules_around(os.path.join(path, name), hidden)


def clear_folder(folder: str) -> None:
    """Removes all that is in `folder`, whatever a program left there.

    Works without recursion and without long paths: folders are moved to the top before they are emptied, so that no
    depth of nesting stops it; links are removed, never followed.
    """
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    number = itertools.count()
    try:
        while names := os.listdir(top):
            for name in names:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                os.chmod(name, 0o700, dir_fd=top)
                child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    for inner in os.listdir(child):
                        if stat.S_ISDIR(os.lstat(inner, dir_fd=child).st_mode):
                            os.chmod(inner, 0o700, dir_fd=child)  # moving a folder rewrites its `..`
                            os.rename(inner, f".moved-{next(number)}-{os.getpid()}", src_dir_fd=child, dst_dir_fd=top)
                        else:
                            os.unlink(inner, dir_fd=child)
                finally:
                    os.close(child)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def remove_folder(folder: str | os.PathLike[str]) -> None:
    """Removes `folder` with all that is in it; what cannot be removed, or somebody else removes meanwhile, is let be.

    `shutil.rmtree` would break off with a RecursionError in what a program has nested.
    """
    while os.path.isdir(folder):
        try:
            clear_folder(os.fspath(folder))
            os.rmdir(folder)
        except FileNotFoundError:  # of what somebody else has removed
            continue
        except OSError:
            return
