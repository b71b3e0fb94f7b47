"""recipes/generate.py: what it prints, keeps and shows of what the heads proposed."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from random_models import random_decoder

from recipes.generate import GenerateRecipe
from wmtp.config import ConfigError
from wmtp.data import chat
from wmtp.errors import UserError
from wmtp.generation.text import StopStrings, TextStream
from wmtp.models import export_hf
from wmtp.pretrained import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ raise_exception('no') if messages|length > 2 }}"
)
SIZES = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose heads 2 and 3 say what head 1 says, so that some drafts are right."""
    model = random_decoder(vocab_size=259, max_seq_len=96, num_future_tokens=4, **SIZES)
    for head in model.extra_heads[:2]:
        head.load_state_dict(model.layers[-1].state_dict())
    tokenizer = byte_tokenizer()
    tokenizer.hf.chat_template = TEMPLATE
    export_hf(model, tmp_path_factory.mktemp("model") / "export", tokenizer_source=tokenizer)
    return tmp_path_factory.getbasetemp() / "model0" / "export"


@pytest.fixture
def generated(folder, capsys):
    """Runs the recipe; returns what it printed: the text, and what was said about it."""

    def run(**keys):
        of = lambda name: {"_component_": name, "path": str(folder)}
        keys = {"checkpoint": str(folder), "device": "cpu", "max_new_tokens": 24, **keys}
        keys |= {"model": of("wmtp.models.from_checkpoint"), "tokenizer": of("wmtp.pretrained.hf_tokenizer")}
        recipe = GenerateRecipe(OmegaConf.create(keys))
        recipe.setup()
        recipe.generate()
        recipe.report()
        return capsys.readouterr()

    return run


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_text_is_streamed_and_the_same_with_and_without_drafts(generated, tmp_path):
    plain = generated(prompt="def f", num_drafts=0)
    drafted = generated(prompt="def f", output=str(tmp_path / "o.jsonl"))
    assert plain.out == drafted.out and len(plain.out) > 5
    figures = r"24 tokens in [\d.]+ s: [\d.]+ tokens/s, ([\d.]+) tokens per forward"
    assert float(re.match(figures, plain.err)[1]) == 1 < float(re.match(figures, drafted.err)[1])
    assert "accepted: head 2" in drafted.err
    (row,) = rows(tmp_path / "o.jsonl")
    assert row["text"] + "\n" == plain.out and row["prompt"] == "def f"
    assert row["new_tokens"] == 24 > row["forwards"] and row["finish_reason"] == "length"


def test_a_file_of_prompts_and_chats_and_samples(generated, folder, tmp_path):
    asked = [{"prompt": "a"}, {"id": "c", "messages": [{"role": "user", "content": "hi"}]}, {"prompt": "<user>hi"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    said = generated(prompts=str(file), output=str(one))
    generated(prompts=str(file), output=str(several), batch_size=4, num_drafts=0)
    key = lambda row: (row["id"], row["sample"])
    assert sorted(({**r, "forwards": 0} for r in rows(one)), key=key) == sorted(
        ({**r, "forwards": 0} for r in rows(several)), key=key
    )
    by_id = {row["id"]: row for row in rows(one)}
    assert by_id["c"]["text"] == by_id["2"]["text"] and by_id["c"]["messages"] == asked[1]["messages"]
    assert [line for line in said.out.splitlines() if line.startswith("== ")] == ["== 0", "== c", "== 2"]
    assert generated(prompt="hi", chat=True).out.rstrip("\n") == by_id["c"]["text"]
    sampled = [
        generated(prompt="a", num_samples=2, temperature=1.0, seed=seed, output=str(tmp_path / f"{n}.jsonl"))
        for n, seed in enumerate((1, 1, 2))
    ]
    texts = [[row["text"] for row in rows(tmp_path / f"{n}.jsonl")] for n in range(3)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1] and "== prompt" not in sampled[0].err


def test_a_chat_is_asked_as_it_was_trained(folder, tmp_path):
    """ShareGPT's names, tools, a template's arguments and its date; weights are not the template's."""
    (tmp_path / "t.jinja").write_text(
        "{{ strftime_now('%d') }}{{ style }}{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m | tojson }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = [
        {"from": "human", "value": "é"},
        {"from": "gpt", "value": "b", "weight": 2},
        {"from": "human", "value": "c"},
    ]
    row = {"conversations": asked, "tools": '[{"type": "function", "function": {"name": "f"}}]'}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    row["conversations"] = [*asked, {"from": "gpt", "value": "d"}]
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    tokenizer = {"_component_": "wmtp.pretrained.byte_tokenizer", "chat_template": str(tmp_path / "t.jinja")}
    template = {"template_arguments": {"style": "short"}, "date": "today"}
    model = {"_component_": "wmtp.models.llama_mtp", "vocab_size": 259, "max_seq_len": 512, "num_future_tokens": 1}
    keys = {"model": model | SIZES, "tokenizer": tokenizer, "prompts": str(tmp_path / "p.jsonl"), "device": "cpu"}
    recipe = GenerateRecipe(OmegaConf.create(keys | template))
    recipe.setup()
    [(_, ids)] = recipe._asked.values()
    [document] = chat(recipe._tokenizer, source=str(tmp_path / "c.jsonl"), turns="last", **template)
    assert tuple(ids) == document.prompt and b"weight" not in bytes(i for i in ids if i < 256)


def test_what_the_heads_proposed_is_shown_by_marks_and_in_colour_only_to_a_terminal(generated, tmp_path, monkeypatch):
    page = tmp_path / "heads.html"
    plain = generated(prompt="x < y", show="heads", page=str(page))
    lines = [line for line in plain.out.splitlines() if re.match(r" +\d+  ", line)]
    assert "\x1b" not in plain.out and "✓2 " in plain.out and "✗" in plain.out and "·4 " in plain.out
    assert "accepted, ✗ refused, · not compared" in plain.err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    coloured = generated(prompt="x < y", show="heads")
    assert "\x1b[32m✓2 " in coloured.out and re.sub(r"\x1b\[\d+m", "", coloured.out) == plain.out
    monkeypatch.setenv("NO_COLOR", "1")
    assert generated(prompt="x < y", show="heads").out == plain.out

    html = page.read_text()
    assert "prefers-color-scheme: dark" in html and not re.search(r"<script|https?://", html)
    body = html.split("<main>")[1]
    assert "x &lt; y" in body and body.count("<tr class=f") == len(lines)
    assert len(re.findall(r'<b class="h\d f\d+"', body)) == 24
    for kind, mark in (("a", "✓"), ("r", "✗"), ("n", "·")):  # no colour without its mark
        cells = re.findall(rf"<td class={kind}>(.*)", body)
        assert cells and all(f">{mark}</i>" in cell for cell in re.findall(rf"<td class={kind}>(.*?)<td", body))
    assert body.count(">✓</i>") == plain.out.count("✓")


def test_bad_input_is_one_line_before_the_model_is_read(generated, tmp_path):
    there = tmp_path / "there"
    there.write_text("")
    for keys, error, says in (
        ({}, ConfigError, "set one of prompt=TEXT and prompts=FILE"),
        ({"prompt": {"def f()": None}}, ConfigError, "quote it twice"),
        ({"prompt": "a", "output": str(there)}, FileExistsError, "output=.*is there already"),
        (
            {"prompt": "a", "page": str(tmp_path), "show": "heads", "overwrite": True},
            UserError,
            "page=.* is a folder; nam",
        ),
        ({"prompt": "a", "output": str(there / "x")}, UserError, "output=.*there.* is a file; name another folder"),
        ({"prompt": "a", "show": "tokens"}, ConfigError, "show must be one of .*null.*, got 'tokens'"),
        ({"prompt": "a", "page": "x.html"}, ConfigError, "set show=heads too"),
        ({"prompt": "a", "num_drafts": 4}, ConfigError, "at most the model's 3 extra heads, got 4"),
        ({"prompt": "a", "num_drafts": 0, "show": "heads"}, ConfigError, "show=heads needs drafts"),
        ({"prompt": "a" * 96}, UserError, "leaves no room"),
    ):
        with pytest.raises(error, match=says):
            generated(**keys)
    file = tmp_path / "bad.jsonl"
    for row, says in (
        ({"text": "a"}, r"bad.jsonl:1: field 'prompt' is missing; the row has text"),
        ({"messages": "a"}, r"bad.jsonl:1: field 'messages' must be a list, got str 'a'"),
        ({"messages": [{"role": "user"}]}, r"bad.jsonl:1: messages\[0\] has no content; give it a text"),
        (
            {"messages": [{"role": "u", "content": "a"}] * 3},
            r"bad.jsonl:1: the chat template of .* refuses the conversation of u, u, u: no",
        ),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=says):
            generated(prompts=str(file))
    file.write_text("")
    with pytest.raises(ConfigError, match="has no rows"):
        generated(prompts=str(file))
    file.write_text('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: id '1' is there twice"):
        generated(prompts=str(file))


@given(
    st.text("ab\néß日", max_size=12), st.lists(st.text("ab\n日", min_size=1, max_size=3), max_size=2), st.integers(1, 4)
)
def test_a_stream_is_the_text_up_to_its_stop_string_whatever_the_steps(text, stop, width):
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    cut = StopStrings(tokenizer, stop).cut(text)
    final = text if cut is None else cut
    stream, shown = TextStream(tokenizer, stop, [tokenizer.eos_id]), ""
    for start in range(0, len(ids), width):
        shown += stream.add(ids[start : start + width])
        assert final.startswith(shown)
    assert shown + stream.end(final) == final
