"""The official `openai` client against a running server.

    python openai_client.py BASE_URL KEYED_BASE_URL KEY

BASE_URL (ending in /v1) asks for no key and serves a context of 8192 tokens; KEYED_BASE_URL asks for KEY. Every function
that `@check` marks is one check. Exit status 0 when all of them hold.
"""

import asyncio
import json
import sys
import traceback

import openai

BASE_URL, KEYED_URL, KEY = sys.argv[1:]
CHECKS = []
CONTEXT = 8192

# No retries: a check must see the first answer.
client = openai.OpenAI(base_url=BASE_URL, api_key="unused", max_retries=0, timeout=60)
MODEL = client.models.list().data[0].id
MESSAGES = [{"role": "user", "content": "Count to three."}]
# Random weights may end early; most checks want a known number of tokens.
ON = {"ignore_eos": True}


def check(function):
    CHECKS.append(function)
    return function


def chat(client=client, **fields):
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "extra_body": ON} | fields
    return client.chat.completions.create(**fields)


def complete(**fields):
    fields = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "temperature": 0, "extra_body": ON} | fields
    return client.completions.create(**fields)


def refused(error_class, call, **expected):
    """`call` raises `error_class` (and no subclass of it), whose attributes are `expected`."""
    try:
        call()
    except openai.APIStatusError as error:
        assert type(error) is error_class, f"{type(error).__name__}: {error}"
        for name, value in expected.items():
            found = getattr(error, name)
            assert found == value, f"{name} is {found!r}, expected {value!r}: {error}"
        assert error.body["message"] and error.body["type"], error.body
        return error
    raise AssertionError(f"no {error_class.__name__}")


@check
def models():
    listed = client.models.list()
    assert listed.object == "list" and len(listed.data) == 1, listed
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL and model.object == "model" and model.created > 1_600_000_000, model


@check
def chat_whole():
    answer = chat()
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id, answer
    (choice,) = answer.choices
    assert choice.index == 0 and choice.message.role == "assistant" and choice.message.content, choice
    assert choice.finish_reason == "length" and choice.logprobs is None, choice
    usage = answer.usage
    assert usage.completion_tokens == 24 and usage.prompt_tokens > 4, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert chat().choices[0].message.content == choice.message.content


@check
def chat_stream_is_the_whole_in_pieces():
    # Greedy, and drawn with a seed.
    for fields in [{}, {"temperature": 1.0, "seed": 11}, {"temperature": 1.3, "top_p": 0.9, "seed": 12, "n": 2}]:
        fields["max_tokens"] = 60
        whole = chat(**fields)
        parts = {}
        finish = {}
        ids = set()
        for chunk in chat(stream=True, **fields):
            assert chunk.object == "chat.completion.chunk" and chunk.usage is None, chunk
            ids.add((chunk.id, chunk.created, chunk.model))
            (choice,) = chunk.choices
            if choice.index not in parts:
                assert choice.delta.role == "assistant", f"the first delta has no role: {chunk}"
                parts[choice.index] = []
            else:
                assert choice.delta.role is None, f"a later delta has a role: {chunk}"
            assert choice.index not in finish, f"a delta after the last: {chunk}"
            parts[choice.index].append(choice.delta.content or "")
            if choice.finish_reason is not None:
                finish[choice.index] = choice.finish_reason
        assert len(ids) == 1, ids
        assert len(parts) == len(whole.choices)
        for choice in whole.choices:
            pieces = parts[choice.index]
            assert "".join(pieces) == choice.message.content, (pieces, choice.message.content)
            assert sum(map(bool, pieces)) > 4, f"not streamed: {pieces}"
            assert finish[choice.index] == choice.finish_reason


@check
def chat_stream_usage():
    whole = chat().usage
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1]), chunks
    last = chunks[-1]
    assert last.choices == [], last
    counts = lambda usage: (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert counts(last.usage) == counts(whole), (last.usage, whole)


@check
def chat_helper_stream():
    """The SDK's accumulating helper, which is stricter about the order of events than plain iteration."""
    # It raises on an answer that ends for length, so this one ends at a stop string.
    stop = chat().choices[0].message.content[20:24]
    whole = chat(stop=stop, logprobs=True)
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, stop=stop, logprobs=True, extra_body=ON
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


@check
def chat_logprobs():
    answer = chat(logprobs=True, top_logprobs=4)
    (choice,) = answer.choices
    entries = choice.logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 4 and best == sorted(best, reverse=True) and entry.logprob <= 0, entry
        # Greedy: the token chosen is the best one.
        assert entry.logprob == best[0] and entry.token == entry.top_logprobs[0].token, entry
    spelled = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
    assert spelled == choice.message.content, (spelled, choice.message.content)
    streamed = []
    for chunk in chat(logprobs=True, top_logprobs=4, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == entries
    none = chat(logprobs=True).choices[0].logprobs.content
    assert [entry.logprob for entry in none] == [entry.logprob for entry in entries]
    assert all(entry.top_logprobs == [] for entry in none)


@check
def stop_strings():
    whole = chat(max_tokens=60).choices[0].message.content
    # A stop string that begins inside the text, long enough to lie across tokens.
    middle = len(whole) // 2
    stop = whole[middle : middle + 5]
    end = whole.index(stop)
    answer = chat(max_tokens=60, stop=["never to be seen", stop])
    assert answer.choices[0].message.content == whole[:end], (answer, whole)
    assert answer.choices[0].finish_reason == "stop", answer
    assert answer.usage.completion_tokens < 60, answer.usage
    pieces = [chunk.choices[0] for chunk in chat(max_tokens=60, stop=stop, stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole[:end]
    assert pieces[-1].finish_reason == "stop"
    text = complete(prompt="Tell me", max_tokens=40).choices[0].text
    stop = text[10:13]
    answer = complete(prompt="Tell me", max_tokens=40, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop", answer


@check
def several_choices_and_seeds():
    drawn = {"temperature": 1.0, "max_tokens": 16}
    two = chat(n=2, seed=5, **drawn)
    assert [choice.index for choice in two.choices] == [0, 1]
    texts = [choice.message.content for choice in two.choices]
    assert texts[0] != texts[1], "two draws of one request are the same"
    assert two.usage.completion_tokens == 32, two.usage
    assert [choice.message.content for choice in chat(n=2, seed=5, **drawn).choices] == texts
    assert chat(seed=5, **drawn).choices[0].message.content == texts[0]
    assert chat(seed=6, **drawn).choices[0].message.content != texts[0]
    assert chat(**drawn).choices[0].message.content != chat(**drawn).choices[0].message.content, "no seed is one seed"
    greedy = chat(n=3).choices
    assert len({choice.message.content for choice in greedy}) == 1 and len(greedy) == 3


@check
def sampling_fields_change_the_output():
    plain = chat().choices[0].message.content
    assert chat(frequency_penalty=2.0, presence_penalty=2.0, max_tokens=60).choices[0].message.content != chat(
        max_tokens=60
    ).choices[0].message.content
    # A bias of 100 is a command: token 70 throughout.
    forced = chat(logit_bias={"70": 100}, logprobs=True).choices[0]
    assert len({entry.token for entry in forced.logprobs.content}) == 1 and forced.message.content != plain, forced


@check
def message_forms():
    assert client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "wörld 🙂"}]},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Again."},
        ],
        max_completion_tokens=3,
        extra_body=ON,
    ).usage.completion_tokens == 3
    kwargs = lambda thinking: {"chat_template_kwargs": {"enable_thinking": thinking}}
    tokens = [chat(extra_body=ON | kwargs(thinking)).usage.prompt_tokens for thinking in (True, False)]
    assert tokens[0] < tokens[1], f"chat_template_kwargs did not reach the template: {tokens}"


@check
def completion_prompts():
    text = complete()
    assert text.object == "text_completion" and text.choices[0].text, text
    assert text.usage.completion_tokens == 8
    many = complete(prompt=["Once upon", "In the", "Once upon"])
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert many.choices[0].text == many.choices[2].text == text.choices[0].text
    assert many.choices[1].text == complete(prompt="In the").choices[0].text
    ids = complete(prompt=[5, 6, 7])
    assert ids.usage.prompt_tokens == 3
    batch = complete(prompt=[[5, 6, 7], [9] * 40], n=2)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert batch.choices[0].text == batch.choices[1].text == ids.choices[0].text
    assert batch.usage.prompt_tokens == 43 and batch.usage.completion_tokens == 32, batch.usage
    streamed = {0: "", 1: ""}
    for chunk in complete(prompt=[[5, 6, 7], [9] * 40], stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == {0: batch.choices[0].text, 1: batch.choices[2].text}
    # 16 tokens when nothing is said.
    assert client.completions.create(model=MODEL, prompt="x", extra_body=ON).usage.completion_tokens == 16


@check
def completion_echo_and_logprobs():
    answer = complete(echo=True, logprobs=2)
    (choice,) = answer.choices
    logprobs = choice.logprobs
    count = answer.usage.total_tokens
    assert choice.text.startswith("Once upon") and choice.text == "Once upon" + complete().choices[0].text
    for values in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset):
        assert len(values) == count, (count, logprobs)
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    scored = complete(echo=True, logprobs=2, max_tokens=0)
    assert scored.choices[0].text == "Once upon" and scored.usage.completion_tokens == 0, scored
    length = answer.usage.prompt_tokens
    assert scored.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:length]
    without = complete(logprobs=2).choices[0].logprobs
    assert without.token_logprobs == logprobs.token_logprobs[length:]
    text = complete().choices[0].text
    for token, offset in zip(without.tokens, without.text_offset, strict=True):
        # Tokens that end inside a character are spelled as bytes, as OpenAI does.
        assert token.startswith("bytes:") or text.startswith(token, offset), (text, without)
    assert complete(max_tokens=0, echo=True).choices[0].text == "Once upon"


@check
def errors_reach_the_right_class():
    bad = openai.BadRequestError
    for field, value in [
        ("temperature", -1),
        ("top_p", 0),
        ("frequency_penalty", 3),
        ("n", 0),
        ("max_tokens", 0),
        ("stop", [""]),
        ("messages", []),
        ("logit_bias", {"99999": 1}),
        ("top_logprobs", 3),
    ]:
        error = refused(bad, lambda: chat(**{field: value}), param=field, type="invalid_request_error", status_code=400)
        assert field in str(error), error
    # What would change the output and is not supported is refused by name.
    refused(bad, lambda: chat(response_format={"type": "json_object"}), param="response_format")
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    refused(bad, lambda: chat(tools=[function]), param="tools")
    refused(bad, lambda: complete(suffix="x"), param="suffix")
    refused(bad, lambda: complete(prompt=[1, 100000]), param="prompt")
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    refused(bad, lambda: chat(messages=[{"role": "user", "content": image}]), status_code=400)
    # A stream that is refused is refused before it begins.
    refused(bad, lambda: chat(stream=True, temperature=-1), param="temperature")
    refused(openai.NotFoundError, lambda: chat(model="gpt-unknown"), status_code=404, code="model_not_found")
    refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-unknown"), code="model_not_found")
    refused(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="x"))


@check
def context_length():
    code = {"code": "context_length_exceeded", "status_code": 400}
    error = refused(openai.BadRequestError, lambda: complete(prompt=[7] * (CONTEXT + 1)), **code)
    assert f"{CONTEXT} tokens" in str(error), error
    refused(openai.BadRequestError, lambda: complete(prompt=[7] * 10, max_tokens=CONTEXT), **code)
    refused(openai.BadRequestError, lambda: chat(messages=[{"role": "user", "content": "word " * CONTEXT}]), **code)


@check
def keys():
    with_key = lambda key: openai.OpenAI(base_url=KEYED_URL, api_key=key, max_retries=0, timeout=60)
    refused(openai.AuthenticationError, lambda: with_key("wrong").models.list(), status_code=401)
    refused(openai.AuthenticationError, lambda: chat(with_key(KEY + "x")), status_code=401)
    assert chat(with_key(KEY)).usage.completion_tokens == 24


@check
def raw_response_headers():
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, extra_body=ON
    )
    assert raw.headers["content-type"].startswith("application/json"), raw.headers
    assert raw.parse().choices[0].finish_reason == "length"
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, stream=True, extra_body=ON
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), response.headers
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines
    assert all(json.loads(line.removeprefix("data: "))["id"] for line in lines[:-1])


@check
def many_at_once():
    """32 requests at the same time: each gives what it gives alone."""
    prompts = [[3 + i] * (1 + 5 * i) for i in range(32)]
    fields = lambda i: {
        "model": MODEL, "prompt": prompts[i], "max_tokens": 4 + i % 13, "temperature": (i % 3) / 2, "seed": i,
        "logprobs": 1, "extra_body": ON,
    }

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key="unused", max_retries=0, timeout=60) as many:

            async def one(i):
                if i % 2:
                    return (await many.completions.create(**fields(i))).choices[0].text
                pieces = [chunk.choices[0].text async for chunk in await many.completions.create(**fields(i), stream=True)]
                return "".join(pieces)

            return await asyncio.gather(*map(one, range(32)))

    together = asyncio.run(all_at_once())
    for i in range(32):
        alone = client.completions.create(**fields(i)).choices[0].text
        assert together[i] == alone, (i, together[i], alone)


@check
def a_stream_closed_early():
    """The server must drop the request (the caller of this script counts); the next one is served."""
    with chat(stream=True, max_tokens=4000) as stream:
        for _, _ in zip(range(3), stream):
            pass
    assert chat(max_tokens=2).usage.completion_tokens == 2


def main():
    failed = []
    for function in CHECKS:
        try:
            function()
            print(f"ok      {function.__name__}", flush=True)
        except Exception:
            failed.append(function.__name__)
            print(f"FAILED  {function.__name__}", flush=True)
            traceback.print_exc(file=sys.stdout)
    print(f"{len(CHECKS) - len(failed)} of {len(CHECKS)} checks hold with openai {openai.__version__}")
    sys.exit(bool(failed))


main()
