"""A judge for model-written programs that a program cannot fool, learn from, or harm.

    with Sandbox() as sandbox:
        outcomes = sandbox.judge([AssertionJob(program=text, tests=("assert add(2, 3) == 5",))])

Processes: the caller --- judge (one for each worker; it alone knows what is expected, and runs the trusted tests) ---
zygote (a warm interpreter that never sees a program or an expected value) --- one confined child for each program,
or, for stdio jobs, for each test. A test's free names are proxies (`remote`): a call on one sends the encoded
arguments to the child and gets back an encoded answer (`codec`), which the judge rebuilds from types whose code is
ours. `==`, `isclose`, `sorted` and all else in a test run in the judge, on values that carry no code of the program's.
Functions and iterators that a test hands over stay in the judge, where the program has them called (`session`).

What is guaranteed against a program that does its worst, and by what:

- It cannot fake a verdict. Whatever it tampers with (builtins, this package's code in its process, the channel), all
  it can do is give an answer; verdicts rest on answers and on stdout, never on exit codes, and no object of the
  program's is ever asked whether it equals something. By the split into processes.
- It cannot have its failure called ours (`harness_error`): from the first byte of an answer on, all is its doing.
- It cannot learn an expected value: none is in its process or its ancestors up to the judge, whose memory it cannot
  reach (seccomp: no ptrace, no process_vm_*; Landlock or the mount namespace: no /proc). Arguments of calls are known
  to it, as they must be; random draws of the tests are seeded alike in every run.
- It starts no process, signals none, opens no socket, mounts nothing (seccomp; Landlock's TCP and signal scopes and
  the pid, net and ipc namespaces beside it).
- It reads Python's library, site-packages, shared libraries and time zones, and writes a scratch folder that is
  emptied after it (Landlock; a read-only root in a mount namespace; for root, no capabilities either). It cannot see
  the folders given as `hidden` (of tasks with solutions, say), nor the package that this one is a part of. Modes,
  owners and times of files cannot be changed (seccomp).
- It ends: CPU time (killed by the zygote on the exact count, by RLIMIT_CPU a little later), wall clock (by the
  judge), memory, output and answers (counted by the judge), threads (RLIMIT_NPROC), size of files (RLIMIT_FSIZE,
  tmpfs).
- It holds no more memory than `memory_bytes`: the zygote looks at its anonymous and swapped pages before it could have
  touched what is left (at 8 GB a second, but no oftener than every 2 ms), and kills it beyond the limit: at most 6 MB
  beyond, measured beside 18 busy processes on 2 cores. RLIMIT_DATA refuses what is 1 GiB above the limit in any case,
  RLIMIT_AS 8 GiB. No page escapes the count: shared anonymous maps are refused (seccomp; `mmap.mmap(-1, n)` makes a
  private one), there is no memfd and no /dev/zero. Beside it come 64 MiB of scratch and the buffers of its pipes. Where
  /proc cannot be read (bubblewrap) or the kernel has no process descriptors, `missing` names `resident memory`, and
  RLIMIT_AS counts all that is mapped, touched or not.
- It steals no time from its neighbours by sleeping: only a program that the kernel kept from running (`usage`), and a
  failure of ours, is judged again alone, and all that together takes at most a quarter of the time, or one minute.
- It leaves nothing: killed and reaped before its outcome is known, scratch emptied, and the zygote never shares
  memory with it, so that the next program starts from the same state.

The floor, without which `Sandbox` refuses to start: seccomp, rlimits, and one of Landlock, a mount namespace,
bubblewrap. Each layer is tried out in a throw-away child (`probe`); `Sandbox.layers` and `.missing` tell what holds.

What is not guaranteed:

- Against flaws of the kernel or the CPU (side channels); there is no second kernel around the program.
- Names that a test takes from the program on the expected side (`assert f(x) == g(x)`, objects made by the set-up)
  mean what the program says. The judge uses its own modules for names the set-up or the preamble imports, and for
  standard library modules that a test uses as `name.attribute`.
- What `setup` defines lies in the program's process, to be read and changed: it must hold no expected value.
- Arguments are copies: a test that looks for a change made in place fails.
- What would rest on the program's word is refused, with a detail that says so, and counts against the program once
  it has answered: `==`, order, `is` and sets of two objects of its own classes (dataclasses, enums); `in` on an object
  that cannot be iterated over; an operator between such an object and a value of the test's (`abs(f(x) - 7.5)`), which
  may be the expected one; a context manager that swallows exceptions. An object of the program's equals no value.
- A program that knows the dataset can recite it.
- Tests of a job with `inside=True` run in the program's process, for what no other process can answer. They can be
  fooled, though not by ending early; such an outcome says `judged="inside"`.
- The set-up runs in the program's process: what it defines is the program's to read and to change, so it must hold no
  expected value.
- A test that does not come to an end with the program's answer is held against the program (`timeout`, `memory`).
- Whether files, sizes and names outside exist can be asked where there is no mount namespace (stat is not watched).
- There is no /proc: `open("/dev/stdin")` fails in a contest program (`open(0)` works), and so does multiprocessing.
- Without a tmpfs (`missing` says so), only the size of each file is bounded, not the number of files.
"""

from wmtp.sandbox.jobs import AssertionJob, Job, Limits, Outcome, StdioJob, StdioTest, Verdict
from wmtp.sandbox.pool import Sandbox

__all__ = ["AssertionJob", "Job", "Limits", "Outcome", "Sandbox", "StdioJob", "StdioTest", "Verdict"]
