"""Plain generation: the same text however it is batched, and every way to end."""

import itertools

import pytest
import torch
from decoding import Letters, completions, requests_of
from torch import nn

from wmtp.generation import Completion, DecodingStats, Request, Sampling, generate
from wmtp.models.teacher_forced import TeacherForced
from wmtp.pretrained import byte_tokenizer
from wmtp.pretrained.config_files import Source


@torch.no_grad()
def greedy_without_a_cache(model, prompt, count, eos_id):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(model(torch.tensor([tokens]), num_heads=1)[0, 0, -1].argmax()))
        if tokens[-1] == eos_id:
            break
    return tuple(tokens[len(prompt) :])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_tokens_are_those_of_full_forwards(tiny, letters, batch_size):
    model, requests, stats = tiny(), requests_of(10), DecodingStats()
    done = completions(model, letters, requests, Sampling(30), batch_size=batch_size, stats=stats)
    for request in requests:
        expected = greedy_without_a_cache(model, request.prompt, 30, letters.eos_id)
        got = done[request.id]
        assert got.tokens == expected
        assert got.finish_reason == ("eos" if expected[-1] == letters.eos_id else "length")
        assert got.text == letters.decode(t for t in expected if t != letters.eos_id)
    assert stats.new_tokens == sum(len(c.tokens) for c in done.values())
    assert stats.row_forwards == stats.new_tokens - stats.first_tokens == stats.new_tokens - 10
    assert stats.tokens_per_forward == 1 and stats.completions == stats.prefills == 10
    # Rows are refilled at once, so no forward runs with a free row while requests wait.
    longest = max(len(c.tokens) for c in done.values())
    assert stats.forwards <= stats.row_forwards / min(batch_size, 10) + longest


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(20, 1.3), Sampling(20, 0.7, 0.8)], ids=str)
@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_a_sampled_text_depends_on_its_key_alone(tiny, letters, sampling, num_drafts):
    model, requests = tiny(), requests_of(12)
    options = {"num_drafts": num_drafts}
    alone = completions(model, letters, requests, sampling, batch_size=1, **options)
    assert completions(model, letters, requests, sampling, batch_size=5, **options) == alone
    assert completions(model, letters, requests[::-1], sampling, batch_size=12, **options) == alone
    half = completions(model, letters, requests[1::2], sampling, batch_size=4, **options)  # as another process would
    assert half == {i: alone[i] for i in half}

    other = [Request(r.id, r.prompt, (1, *r.key[1:])) for r in requests]
    assert all(alone[i].tokens != c.tokens for i, c in completions(model, letters, other, sampling, **options).items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_samples_of_one_prompt_share_it_and_stay_what_they_are_apart(tiny, letters, num_drafts, dtype):
    model, sampling = tiny().to(dtype), Sampling(15, 1.0)
    tasks = requests_of(3)
    requests = [Request((r.id, n), r.prompt, (0, r.id, n)) for r in tasks for n in range(5)]
    stats = DecodingStats()
    shared = completions(model, letters, requests, sampling, batch_size=4, num_drafts=num_drafts, stats=stats)
    assert stats.prefills == 3 and stats.completions == 15
    apart = {}
    for request in requests:
        apart |= completions(model, letters, [request], sampling, num_drafts=num_drafts)
    assert shared == apart
    assert len({c.tokens for c in shared.values()}) == 15


def test_requests_are_read_as_room_appears_and_completions_come_as_they_finish(tiny, letters):
    read = []

    def stream():
        for request in requests_of(6):
            read.append(request.id)
            yield request

    iterator = generate(tiny(), letters, stream(), Sampling(5), batch_size=2)
    assert read == []
    first = next(iterator)
    assert isinstance(first, Completion) and first.id in (0, 1) and read == [0, 1]
    assert not torch.is_inference_mode_enabled()  # the consumer may train on what it got
    assert len(list(iterator)) == 5 and read == [0, 1, 2, 3, 4, 5]
    assert list(generate(tiny(), letters, [], Sampling(5), batch_size=2)) == []


# ----------------------------------------------------------------------------------------------------------------------
# Ends


def scripted(tiny, tokens):
    """A model that continues token 0 with these, all different: each token's state is a unit vector of its own."""
    chain = [0, *tokens]
    assert len(set(chain)) == len(chain)
    model = tiny(vocab_size=max(chain) + 1, embed_dim=64, num_kv_heads=4, head_dim=16)
    with torch.no_grad():
        for block in (*model.layers, *model.extra_heads):
            block.attn.output_proj.weight.zero_()
            block.mlp.w2.weight.zero_()
        model.norm.scale.fill_(1)
        model.tok_embeddings.weight.zero_()
        model.output.weight.zero_()
        for i, (token, following) in enumerate(itertools.pairwise(chain)):
            model.tok_embeddings.weight[token, i] = 1
            model.output.weight[following, i] = 1
    return model


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_a_stop_string_is_found_across_tokens_and_cut_off(tiny, letters, num_drafts):
    tokens = [ord(character) - 40 for character in "HelmoABC"]
    model = scripted(tiny, tokens)
    request = [Request("r", (0,), ("r",))]

    def ends(*stop, count=8):
        done = list(generate(model, letters, request, Sampling(count, stop=stop), batch_size=1, num_drafts=num_drafts))
        assert done[0].tokens == tuple(tokens[: len(done[0].tokens)])
        return done[0].text, done[0].finish_reason, len(done[0].tokens)

    assert ends() == ("HelmoABC", "length", 8)
    assert ends("moA") == ("Hel", "stop", 6)
    assert ends("zzz", "oA", "moAB") == ("Helm", "stop", 6)  # the first string to be complete ends it
    assert ends("BC", "oABC") == ("Helm", "stop", 8)  # two at once: the one that starts first
    assert ends("H") == ("", "stop", 1)
    assert ends("C") == ("HelmoAB", "stop", 8)  # on the last token there is room for
    assert ends("moAB", count=6) == ("HelmoA", "length", 6)
    assert ends("hel") == ("HelmoABC", "length", 8)


def test_characters_split_over_tokens_are_whole_in_the_text_and_in_stop_strings(tiny):
    tokenizer = byte_tokenizer()
    text = "aé→b🙂c"
    tokens = list(text.encode())
    assert len(set(tokens)) == len(tokens) == 12  # one token a byte
    model, request = scripted(tiny, tokens), [Request("r", (0,), ("r",))]

    def ends(count, *stop):
        (done,) = generate(model, tokenizer, request, Sampling(count, stop=stop), batch_size=1)
        return done.text, done.finish_reason, len(done.tokens)

    assert ends(12) == (text, "length", 12)
    assert ends(12, "🙂") == ("aé→b", "stop", 11)
    assert ends(12, "→b") == ("aé", "stop", 7)
    assert ends(9, "🙂") == ("aé→b\ufffd", "length", 9)  # half a character is none


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_eos_ends_a_completion_and_is_no_part_of_its_text(tiny, num_drafts):
    tokens = [10, 11, 12, 13, 14]
    model, request = scripted(tiny, tokens), [Request("r", (0,), ("r",))]
    for eos_id, length in ((10, 1), (12, 3), (14, 5)):
        options = {"batch_size": 1, "num_drafts": num_drafts}
        (done,) = generate(model, Letters(eos_id), request, Sampling(5), **options)
        assert done.tokens == tuple(tokens[:length]) and done.finish_reason == "eos"
        assert done.text == Letters().decode(tokens[: length - 1])


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_every_end_token_that_the_checkpoint_names_ends_a_text(tiny, num_drafts):
    """As a chat model's: one more in config.json, another in generation_config.json, none of them the tokenizer's."""
    model = scripted(tiny, [10, 11, 12, 13, 14])
    requests = [Request(start, (start,), (start,)) for start in (0, 10, 11, 12, 13)]
    model.source = Source({"eos_token_id": [12, 50]}, {"eos_token_id": 14})
    for batch_size in (1, 3):
        done = completions(model, Letters(), requests, Sampling(5), batch_size=batch_size, num_drafts=num_drafts)
        assert {start: c.tokens for start, c in done.items()} == {
            0: (10, 11, 12), 10: (11, 12), 11: (12,), 12: (13, 14), 13: (14,)
        }  # fmt: skip
        assert all(c.finish_reason == "eos" and c.text == Letters().decode(c.tokens[:-1]) for c in done.values())
    # The tokenizer's ends it too, also where a checkpoint names others.
    (done,) = completions(model, Letters(eos_id=11), requests[:1], Sampling(5), num_drafts=num_drafts).values()
    assert (done.tokens, done.finish_reason) == ((10, 11), "eos")


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_special_tokens_are_no_part_of_a_text_but_can_be_its_stop_string(tiny, num_drafts):
    tokens = [ord(character) - 40 for character in "HelmoABC"]
    model, request = scripted(tiny, tokens), [Request("r", (0,), ("r",))]
    letters = Letters(special_ids=(tokens[2], tokens[5]))  # l and A
    for stop, text, length in (((), "HemoBC", 8), (("A",), "Hemo", 6), (("moA",), "Hemo", 6), (("mo",), "He", 5)):
        (done,) = completions(
            model, letters, request, Sampling(8, stop=stop), batch_size=1, num_drafts=num_drafts
        ).values()
        assert (done.text, len(done.tokens)) == (text, length)
        assert done.finish_reason == ("stop" if stop else "length")


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_the_context_ends_a_completion(tiny, num_drafts):
    model, letters = tiny(max_seq_len=20), Letters(eos_id=-1)
    requests = [Request(n, (1,) * n, (n,)) for n in (19, 5, 18, 17, 12)]
    done = completions(model, letters, requests, Sampling(9), batch_size=2, num_drafts=num_drafts)
    assert {n: len(c.tokens) for n, c in done.items()} == {19: 1, 18: 2, 17: 3, 12: 8, 5: 9}
    assert {c.finish_reason for c in done.values()} == {"length"}


# ----------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "request 'r' has an empty prompt"),
        (
            (1,) * 64,
            "request 'r' has a prompt of 64 tokens, which leaves no room for a new one in the model's context of 64",
        ),
        ((1, 67), "request 'r' has token id 67, outside the model's 67"),
        ((-1, 3), "request 'r' has token id -1"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(tiny, letters, prompt, message):
    good, bad = Request("g", (1,), ("g",)), Request("r", prompt, ("r",))
    with pytest.raises(ValueError, match=message):
        generate(tiny(), letters, [good, bad], Sampling(4), batch_size=1)  # before anything is generated
    with pytest.raises(ValueError, match=message):
        list(generate(tiny(), letters, iter([good, bad]), Sampling(4), batch_size=1))


def test_models_that_cannot_generate_are_refused(tiny, letters):
    request, options = [Request(0, (1,), (0,))], {"batch_size": 1}
    with pytest.raises(ValueError, match="num_drafts must be a whole number between 0 and"):
        generate(tiny(num_future_tokens=1), letters, request, Sampling(4), num_drafts=2, **options)
    with pytest.raises(ValueError, match="generate needs an MTPDecoder, got TeacherForced"):
        generate(TeacherForced(tiny(), 2), letters, request, Sampling(4), **options)
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        generate(tiny(), letters, request, Sampling(4), batch_size=0)
    with pytest.raises(ValueError, match="key must be a tuple of strings and numbers"):
        generate(tiny(), letters, [Request(0, (1,), ({1},))], Sampling(4), **options)
    model = tiny()
    nn.init.constant_(model.norm.scale, float("nan"))
    with pytest.raises(ValueError, match="the model gives request 0 logits that are not finite"):
        list(generate(model, letters, request, Sampling(4), **options))
    model = tiny()
    model.layers[0].mlp.w1 = nn.Sequential(model.layers[0].mlp.w1, nn.Dropout(0.1))
    with pytest.raises(ValueError, match="without dropout"):
        generate(model.train(), letters, request, Sampling(4), **options)
    list(generate(model.eval(), letters, request, Sampling(4), **options))


# ----------------------------------------------------------------------------------------------------------------------
# Dtypes and devices


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_bfloat16_on_a_cpu_follows_the_model(tiny, letters, num_drafts):
    """Greedy tokens are those that the bfloat16 model itself ranks first, up to its rounding."""
    model, requests = tiny().to(torch.bfloat16), requests_of(8)
    done = completions(model, letters, requests, Sampling(25), num_drafts=num_drafts)
    agree = total = 0
    for request in requests:
        tokens = torch.tensor([[*request.prompt, *done[request.id].tokens]])
        with torch.no_grad():
            logits = model(tokens, num_heads=1)[0, 0].float()[len(request.prompt) - 1 : -1]
        chosen = logits.gather(1, tokens[0, len(request.prompt) :, None])[:, 0]
        agree, total = agree + (chosen >= logits.max(-1).values - 0.1).sum().item(), total + len(chosen)
    assert agree == total
    assert completions(model, letters, requests, Sampling(25), num_drafts=num_drafts) == done


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [Sampling(25), Sampling(25, 1.0), Sampling(25, 0.8, 0.9)], ids=str)
def test_cuda_generates_what_the_cpu_does(tiny, letters, dtype, sampling):
    requests = requests_of(12)
    requests += [Request((3, n), requests[3].prompt, (3, n)) for n in range(4)]  # which share a prompt
    model = tiny().to(dtype)
    expected = completions(model, letters, requests, sampling)
    for num_drafts in (0, 2):
        done = completions(model.cuda(), letters, requests, sampling, batch_size=5, num_drafts=num_drafts)
        assert done.keys() == expected.keys()
        if dtype == torch.float32 and (sampling.greedy or not num_drafts):
            assert {key: c.tokens for key, c in done.items()} == {key: c.tokens for key, c in expected.items()}
