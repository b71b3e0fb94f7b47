"""A growing text: its stop strings, and what of it can be shown already."""

from collections.abc import Collection, Sequence


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


class TextStream:
    """The text of a request while it grows, in parts: no half characters, and nothing that a stop string may take back.

    Args:
        tokenizer: as `generate` takes it.
        stop: strings that end the text.
        end_ids: tokens that end it, and are no text.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), end_ids: Collection[int] = ()) -> None:
        self._tokenizer, self._stop, self._left_out = tokenizer, stop, {*tokenizer.special_ids, *end_ids}
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that became certain with these tokens."""
        self._tokens += [token for token in tokens if token not in self._left_out]
        text = self._tokenizer.decode(self._tokens).rstrip("\ufffd")  # the first bytes of a character
        starts = [at for s in self._stop if (at := text.find(s)) >= 0]  # of whole stop strings, then of begun ones
        starts += [len(text) - n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])]
        return self._until(text[: min(starts, default=len(text))])

    def end(self, text: str) -> str:
        """Returns what is left to show of the whole text, a completion's."""
        return self._until(text)

    def _until(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown += new
        return new
