"""A judge for model-written programs that a program cannot fool, learn from, or harm.

    with Sandbox(hidden=["folder/of/solutions"]) as sandbox:
        outcomes = sandbox.judge([AssertionJob(program=text, tests=("assert add(2, 3) == 5",))])

A test's free names are proxies (`remote`): a call on one sends the encoded arguments to the program's process and gets
back an encoded answer (`codec`), which the judge rebuilds from types whose code is ours. `==`, `isclose`, `sorted` and
all else in a test run in the judge, on values that carry no code of the program's. Functions and iterators that a test
hands over stay in the judge, where the program has them called (`session`). The processes, what is guaranteed by which
layer, the floor below which `Sandbox` refuses to start, and what is not guaranteed: docs/sandbox.md.

Files, each importing only from those before it, and nothing else of the library:

    primitives      syscalls landlock seccomp filesystem namespaces usage wire
    data            jobs compare set_order kinds codec operations
    zygote, child   confine server child probe zygote
    judge           supervise raised remote session names assertions judge
    caller          pool
"""

from wmtp.sandbox.jobs import AssertionJob, Job, Limits, Outcome, StdioJob, StdioTest, Verdict
from wmtp.sandbox.pool import Sandbox

__all__ = ["AssertionJob", "Job", "Limits", "Outcome", "Sandbox", "StdioJob", "StdioTest", "Verdict"]
