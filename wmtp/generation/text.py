"""Stop strings in a growing text."""

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in the decoded text, whatever tokens they span.

    Args:
        tokenizer: has ``decode``.
        stop: the strings; none is fine.
    """

    def __init__(self, tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # A token holds at least a byte, so a string that ends in the newest token starts at most that many tokens ago.
        # Three more, so that a character cut at the window's start is not one of the string's.
        self._window = max((len(s.encode()) for s in self._stop), default=0) + 3

    def ended(self, tokens: list[int]) -> bool:
        """Whether a stop string is complete in the text of ``tokens``; called after each new token.

        Decodes only the end of the text, and all of it once something is found there.
        """
        if not self._stop:
            return False
        end = self._tokenizer.decode(tokens[-self._window :])
        return any(s in end for s in self._stop) and self.cut(self._tokenizer.decode(tokens)) is not None

    def cut(self, text: str) -> str | None:
        """The text before its first stop string, or None where there is none."""
        starts = [at for s in self._stop if (at := text.find(s)) >= 0]
        return text[: min(starts)] if starts else None
