"""Write docs/models.md: the families of models, and what each is held to beside `transformers`.

    python docs/make_models.py      runs every check of tests/family_parity.py (about 20 s), and writes what it found

tests/models/test_families.py runs the same checks, and holds the page against a table without a fault.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TARGET = ROOT / "docs" / "models.md"

_HEAD = """# Models

Written by `python docs/make_models.py`, which runs the checks: do not edit.

One decoder computes them all. A checkpoint's folder says which it is:

```yaml
model:
  _component_: wmtp.models.from_checkpoint
  path: ${checkpoint}
  num_future_tokens: 4
checkpoint: checkpoints/Qwen2.5-Coder-1.5B
```

Extra heads are in Meta's layout whatever the family: full blocks of its own kind beside the last one, or one such block
that runs in rounds ([method.md](method.md#model)). Training, LoRA,
NF4, FSDP2, cached and self-speculative decoding, scoring and the critic take any of them; an export is the family's own
HF folder.

## Held against transformers

Small random models of `transformers`' own classes, four layers, norms and biases random too, in float32:
"""

_MIDDLE = """
RoPE, in each family whose class in `transformers` has it: plain, `linear`, `yarn`, `llama3`, and `dynamic` up to the
length that the checkpoint names. Beyond that, its frequencies depend on the length of the whole text, so a packed
document would not be what it is alone, nor a cached key what it was: a longer `max_seq_len` is refused.

## What is not computed

A `config.json` with any other `model_type`, or with a key or value that would change the logits and is not computed, is
refused by that key: Gemma 2 (soft caps), Gemma 3 with images (its `text_config` alone, saved as `gemma3_text`, is
read), mixtures of experts, `longrope` and partial rotation (Phi-3 of 128k, Phi-4-mini), biases that the family's
published models have not, dropout of attention.

## The table

What each family has that Llama has not, as `wmtp/pretrained/families.py` has it. Check it line by line against
`modeling_<model_type>.py` of `transformers`.

| `model_type` | of every model | from its config.json | tensors of other names |
|---|---|---|---|
"""


def page(results: Mapping[tuple[str, str], str | None]) -> str:
    """Returns the page for results by (family, check): None, or what went wrong."""
    from family_parity import CHECKS, FAMILIES

    from wmtp.pretrained.families import FAMILIES as TABLE

    lines = ["", "| | `model_type` |" + "".join(f" {check} |" for check in CHECKS), "|---|---|" + "---|" * len(CHECKS)]
    for name, (kind, _) in FAMILIES.items():
        cells = ["equal" if results[name, check] is None else f"**{results[name, check]}**" for check in CHECKS]
        lines.append(f"| {name} | `{kind}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"- **{name}**: {' '.join((check.__doc__ or '').split())}" for name, check in CHECKS.items())]
    table = []
    for kind, family in TABLE.items():
        tensors = [f"`{ours}`: `{theirs}`" for ours, theirs in family.tensors.items()]
        constants = [f"`{field}: {str(value).lower()}`" for field, value in family.constants.items()]
        columns = [constants, [f"`{field}`" for field in family.read], tensors]
        table.append(f"| `{kind}` | " + " | ".join(", ".join(column) for column in columns) + " |")
    return _HEAD + "\n".join(lines) + "\n" + _MIDDLE + "\n".join(table) + "\n"


def main() -> None:
    from family_parity import CHECKS, FAMILIES, case_of

    results: dict[tuple[str, str], str | None] = {}
    for name in FAMILIES:
        for check, run in CHECKS.items():
            try:
                run(case_of(name))
                results[name, check] = None
            except Exception as error:
                results[name, check] = str(error).strip().splitlines()[0][:80]
            print(f"{name}: {check} {results[name, check] or 'equal'}", flush=True)
    TARGET.write_text(page(results))


if __name__ == "__main__":
    main()
