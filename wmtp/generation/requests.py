"""What is asked of decoding, what comes back, and the counts of both."""

from dataclasses import asdict, dataclass, field
from typing import Literal

from wmtp.errors import UserError
from wmtp.generation.kv_memory import check_kv_memory
from wmtp.generation.sampling import Sampling, key_digest
from wmtp.models.decoder import MTPDecoder


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        id: returned with the completion.
        prompt: token ids, at least one.
        key: strings and numbers, usually (seed, task, sample); the random numbers depend only on it.
    """

    id: object
    prompt: tuple[int, ...]
    key: tuple


@dataclass(frozen=True)
class Completion:
    """The result of a request.

    Args:
        id: the request's.
        text: decoded up to the first stop string or end token, both left out, as are the names of special tokens.
        tokens: all generated tokens, with the end token or those of the stop string.
        finish_reason: ``stop``, ``eos``, or ``length``: max_new_tokens or the model's context is used up.
        forwards: passes of the model for its tokens, the prompt's too; fewer than tokens if drafts were accepted.
    """

    id: object
    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "eos", "length"]
    forwards: int


@dataclass(frozen=True)
class Step:
    """What one forward gave a request.

    Args:
        drafts: of heads 2 to the number that count, in the order of their tokens.
        accepted: how many of them, from the first, the model agreed with. The next one it refused; those after that
            were not compared.
        tokens: what the request got: accepted drafts, then head 1's own token, up to one that ended it.
    """

    drafts: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]


@dataclass
class DecodingStats:
    """Counts that calls of :func:`generate` add to. The seconds exclude the consumer's time."""

    prefills: int = 0  # prompts computed; samples of one prompt share it
    forwards: int = 0  # of the decoder after prefill, for all rows at once
    row_forwards: int = 0  # the same, counted once per row
    completions: int = 0
    new_tokens: int = 0  # of all completions, with end tokens and those of stop strings
    drafted: dict[int, int] = field(default_factory=dict)  # per head: drafts made
    verified: dict[int, int] = field(default_factory=dict)  # per head: drafts whose predecessors were all accepted
    accepted: dict[int, int] = field(default_factory=dict)  # per head: verified drafts that were accepted
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_tokens: int = 0  # tokens that came from a prefill

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per row and forward after the prefill: 1 in plain decoding, up to H with drafts."""
        return (self.new_tokens - self.first_tokens) / self.row_forwards if self.row_forwards else 0.0

    def count_drafts(self, count: int) -> None:
        """Counts ``count`` drafts of a row, of heads 2 to count + 1."""
        for k in range(2, count + 2):
            self.drafted[k] = self.drafted.get(k, 0) + 1

    def count_verified(self, draft: int, *, accepted: bool) -> None:
        """Counts the draft at this index of a window, which was compared with the model: all before it are accepted."""
        k = draft + 2
        self.verified[k] = self.verified.get(k, 0) + 1
        self.accepted[k] = self.accepted.get(k, 0) + accepted

    def acceptance(self) -> dict[int, float]:
        """Returns, per head, the share of its verified drafts that were accepted."""
        return {k: self.accepted.get(k, 0) / n for k, n in sorted(self.verified.items())}

    def as_dict(self) -> dict:
        """Returns all counts and the two figures derived from them."""
        return {**asdict(self), "tokens_per_forward": self.tokens_per_forward, "acceptance": self.acceptance()}


def check_request(request: Request, model: MTPDecoder) -> None:
    prompt = request.prompt
    if len(prompt) == 0:
        raise UserError(f"request {request.id!r} has an empty prompt; start it with BOS or a token of text")
    if len(prompt) >= model.max_seq_len:
        raise UserError(
            f"request {request.id!r} has a prompt of {len(prompt)} tokens, which leaves no room for a new one in the "
            f"model's context of {model.max_seq_len}; shorten the prompt"
        )
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise UserError(f"request {request.id!r} has token id {wrong}, outside the model's {model.vocab_size}")
    key_digest(request.key)


def check_memory(request: Request, model: MTPDecoder, sampling: Sampling, num_drafts: int, kv_memory: int) -> None:
    length = len(request.prompt)
    new_tokens, name = min(sampling.max_new_tokens, model.max_seq_len - length), f"the prompt of request {request.id!r}"
    check_kv_memory(kv_memory, model, length, new_tokens, num_drafts=num_drafts, name=name)
