"""Values of a program from rollouts: at each line's end, the share of sampled completions that pass the tests.

Monte-Carlo credit as in Math-Shepherd (Wang et al. 2023, arXiv 2312.08935, its soft estimation) and VinePO (Kazemnejad
et al. 2024, arXiv 2410.01679, eq. 9), with lines as the steps: V(line i) is the mean verdict of k continuations of the
prompt and lines 1 to i. Of the whole program the value is its own verdict.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wmtp.critic.localise import line_of_tokens
from wmtp.data.documents import IGNORE, Document
from wmtp.errors import UserError

WITHIN_LINE = ("linear", "end")


@dataclass(frozen=True)
class LineEnds:
    """The places of a document at which its value is estimated.

    Attributes:
        lines: [L] numbers, from 1, of the program's lines that are not blank.
        places: [L + 1] positions in the document: the prompt's last token, then the last token of each of these lines,
            blank ones that follow it included. A token belongs to the line of its first character that is no white
            space, so an end may hold the next line's indentation.
    """

    lines: np.ndarray
    places: np.ndarray

    def prefixes(self, document: Document) -> list[tuple[int, ...]]:
        """Returns the token ids of all prefixes that are rolled out: every one but the whole program."""
        return [tuple(document.tokens[: place + 1].tolist()) for place in self.places[:-1]]


def line_ends(tokenizer, document: Document, program: str) -> LineEnds:
    """Finds the line ends of a program, in the document of prompt, program and EOS.

    Raises:
        ValueError: the program has no line that is not blank, or the document has no prompt.
    """
    start = len(document.prompt)
    lines = program.split("\n")
    of_token = line_of_tokens(tokenizer, program)
    solid = np.array([bool(lines[line - 1].strip()) for line in of_token], bool)
    if not solid.any():
        raise UserError(f"{document.id}: the program is blank; leave it out")
    if start == 0:
        raise UserError(f"{document.id}: an empty prompt, which no completion can go on from; use another protocol")
    numbers = np.unique(of_token[solid])
    firsts = np.searchsorted(of_token, numbers[1:])  # tokens at which a line begins that is not blank
    ends = np.append(firsts, len(of_token)) - 1
    return LineEnds(numbers, np.append(start - 1, start + ends))


def value_column(document: Document, places: np.ndarray, values: Sequence[float], within: str = "linear") -> np.ndarray:
    """Makes the signal ``values`` of a document from the values at its line ends: [T] float32.

    The prompt has the value of its last token, EOS that of the whole program. Between two ends:

        linear    the value moves by the same amount at every token: each token of a line has an equal share of the
                  line's change, and a weighting by V_j - V_(j-1) finds it on all of them
        end       the value stays, and moves at the line's last token alone: for ``delta: gae``, which carries the
                  change back

    Args:
        places: of :class:`LineEnds`, [L + 1].
        values: [L + 1] at these places.
        within: ``linear`` or ``end``.
    """
    if within not in WITHIN_LINE:
        raise UserError(f"within_line must be one of {', '.join(WITHIN_LINE)}, got {within!r}")
    at, known = np.arange(len(document)), np.asarray(values, np.float64)
    if within == "linear":
        return np.interp(at, places, known).astype(np.float32)
    return known[np.maximum(np.searchsorted(places, at, side="right") - 1, 0)].astype(np.float32)


def prefix_id(task_id: str, tokens: Sequence[int]) -> str:
    """Names a prefix by its task and its content, the same in every program that begins so."""
    digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
    return f"{task_id} {digest[:16]}"


def line_row(document: Document, ends: LineEnds, values: Sequence[float], fault_line: int | None) -> dict:
    """Returns what a person reads of a program's values: one of ``lines.jsonl``."""
    return {
        "program": document.id,
        "fault_line": fault_line,
        "passes": bool(values[-1]),
        "prompt_value": values[0],
        "lines": ends.lines.tolist(),
        "values": list(values[1:]),
        "tokens": int((document.labels != IGNORE).sum()),
    }


def rollout_report(
    rows: Sequence[dict], stats: Sequence[dict], num_samples: int, cut_off: float
) -> tuple[dict[str, float], str]:
    """Writes the figures of all programs: for MLflow, and as Markdown.

    Args:
        rows: of :func:`line_row`.
        stats: of each rank, what decoding counted, and its ``seconds``.
        num_samples: completions at each line's end.
        cut_off: share of the completions that ended at max_new_tokens or where the context was full.
    """
    prompts = np.array([row["prompt_value"] for row in rows])
    passing = np.array([row["passes"] for row in rows])
    inner = np.array([value for row in rows for value in (row["prompt_value"], *row["values"][:-1])])
    tokens, seconds = sum(s["new_tokens"] for s in stats), max(s["seconds"] for s in stats)
    metrics = {
        "rollouts/programs": len(rows),
        "rollouts/passing_programs": int(passing.sum()),
        "rollouts/mean_value": float(inner.mean()),
        "rollouts/mean_prompt_value": float(prompts.mean()),
        "rollouts/undecided": float(((inner > 0) & (inner < 1)).mean()),
        "rollouts/cut_off": cut_off,
        "rollouts/new_tokens": tokens,
        "rollouts/seconds": seconds,
    }
    lines = [
        "# Values from rollouts",
        "",
        f"- programs: {len(rows)}, of which {int(passing.sum())} pass their tests",
        f"- value of their prompts: {prompts.mean():.3f} on average, 0 for {float((prompts == 0).mean()):.0%} of them: "
        "a task that the model never solves gives no value anything to fall from",
        f"- value at {len(inner)} line ends: {inner.mean():.3f} on average, strictly between 0 and 1 at "
        f"{metrics['rollouts/undecided']:.0%} of them; the standard error of one is at most "
        f"{0.5 / num_samples**0.5:.2f} ({num_samples} completions)",
        f"- sampled: {tokens} tokens in {seconds:.0f} s; {cut_off:.0%} of the completions were cut off by "
        "max_new_tokens or the context's end, and a program without its end seldom passes",
    ]
    if found := [_rank_of_fault(row) for row in rows if row["fault_line"] in row["lines"]]:
        first = sum(rank <= 1 for rank in found) / len(found)
        metrics |= {"rollouts/fault_first": first, "rollouts/fault_mean_rank": sum(found) / len(found)}
        lines.append(
            f"- faulty lines known: {len(found)}; the value falls most there in {first:.0%}, mean rank "
            f"{sum(found) / len(found):.2f}, ties at half"
        )
    return metrics, "\n".join(lines) + "\n"


def _rank_of_fault(row: dict) -> float:
    """Returns the place, from 1, of the faulty line among the program's lines by how far the value falls there."""
    falls = -np.diff([row["prompt_value"], *row["values"]])
    fall = falls[row["lines"].index(row["fault_line"])]
    return float((falls > fall).sum() + ((falls == fall).sum() + 1) / 2)
