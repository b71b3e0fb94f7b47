"""Stop strings in a growing text."""

from collections.abc import Sequence


class StopStrings:
    """A search for stop strings in the decoded text; they may span any tokens."""

    def __init__(self, tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # A token holds at least a byte, so a string of n bytes in the newest token starts at most n tokens ago. Three
        # more tokens complete a character that the window's start would cut.
        self._window = max((len(s.encode()) for s in self._stop), default=0) + 3

    def ended(self, tokens: list[int]) -> bool:
        """Returns whether the text of ``tokens`` contains a stop string; called after each new token.

        It decodes only the end of the text, and all of it if a string is found there.
        """
        if not self._stop:
            return False
        end = self._tokenizer.decode(tokens[-self._window :])
        return any(s in end for s in self._stop) and self.cut(self._tokenizer.decode(tokens)) is not None

    def cut(self, text: str) -> str | None:
        """Returns the text before its first stop string, or None if it has none."""
        starts = [at for s in self._stop if (at := text.find(s)) >= 0]
        return text[: min(starts)] if starts else None
