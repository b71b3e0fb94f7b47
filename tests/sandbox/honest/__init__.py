"""Unusual but right programs, which a judge that is too strict or too clever fails.

Each is also run in a plain interpreter (`test_honest_programs.py`), so that its tests are known to be right.
"""

from dataclasses import dataclass

from wmtp.sandbox import AssertionJob, Limits, StdioJob, StdioTest


@dataclass(frozen=True)
class Honest:
    """A program and its tests; with `stdio`, (input, expected output) pairs, it is a contest program."""

    name: str
    program: str
    tests: tuple[str, ...] = ()
    setup: str = ""
    preamble: str = ""
    entry_point: str | None = None
    stdio: tuple[tuple[str, str], ...] = ()
    needs: str | None = None  # a module that may be absent
    limits: Limits | None = None

    @property
    def text(self) -> str:
        """The program without the line break that begins its literal."""
        return self.program.removeprefix("\n")

    def job(self) -> AssertionJob | StdioJob:
        if self.stdio:
            return StdioJob(self.text, tuple(StdioTest(*pair) for pair in self.stdio), limits=self.limits)
        return AssertionJob(self.text, self.tests, self.setup, self.preamble, self.entry_point, self.limits)


from honest import behaviour, contest, expression, values  # noqa: E402  (they use the class above)

PROGRAMS = values.PROGRAMS + expression.PROGRAMS + behaviour.PROGRAMS + contest.PROGRAMS
