"""A scripted conversation of the official openai package with a running server.

Usage: openai_client.py BASE_URL. The server has a template with tools. Exits with an error at the
first thing that is not as the package's own types and the protocol have it.
"""

import json
import sys
import threading
import time

import openai
from pydantic import BaseModel

BASE = sys.argv[1]
client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="test", max_retries=0, timeout=120)
NO_THINKING = {"enable_thinking": False}
TOOL = {
    "type": "function",
    "function": {
        "name": "set_lamp",
        "description": "Switch a lamp",
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"type": "string", "enum": ["kitchen", "hall"]},
                "level": {"type": "integer", "minimum": 0, "maximum": 9},
                "on": {"type": "boolean"},
            },
            "required": ["room", "level", "on"],
            "additionalProperties": False,
        },
    },
}


def arguments_are_right(text):
    arguments = json.loads(text)
    assert arguments["room"] in ("kitchen", "hall"), arguments
    assert isinstance(arguments["on"], bool) and 0 <= arguments["level"] <= 9, arguments


def models():
    listed = client.models.list().data
    assert len(listed) == 1 and client.models.retrieve(listed[0].id).id == listed[0].id
    return listed[0].id


def chat(model):
    said = [{"role": "user", "content": "Tell me a story about a robot."}]
    ask = dict(model=model, messages=said, max_tokens=24, temperature=0, extra_body=NO_THINKING)
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 24
    assert whole.usage.prompt_tokens_details.cached_tokens is not None
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert chunks[-1].usage.completion_tokens == 24
    two = client.chat.completions.create(
        **{**ask, "temperature": 1.0, "seed": 5}, n=2, logprobs=True, top_logprobs=3
    )
    assert len(two.choices) == 2 and len(two.choices[0].logprobs.content[0].top_logprobs) == 3
    assert two.choices[0].message.content != two.choices[1].message.content
    again = client.chat.completions.create(**{**ask, "temperature": 1.0, "seed": 5}, n=2)
    assert [c.message.content for c in again.choices] == [c.message.content for c in two.choices]
    first = whole.choices[0].message.content.split()[2]
    stopped = client.chat.completions.create(**ask, stop=[first])
    assert stopped.choices[0].finish_reason == "stop"
    assert first not in stopped.choices[0].message.content


def tools(model):
    said = [{"role": "user", "content": "Light the kitchen."}]
    ask = dict(model=model, messages=said, tools=[TOOL], max_tokens=120, extra_body=NO_THINKING)
    named = {"type": "function", "function": {"name": "set_lamp"}}
    whole = client.chat.completions.create(**ask, tool_choice=named)
    call = whole.choices[0].message.tool_calls[0]
    assert whole.choices[0].finish_reason == "tool_calls" and call.function.name == "set_lamp"
    arguments_are_right(call.function.arguments)
    stream = client.chat.completions.create(
        **ask, tool_choice="required", parallel_tool_calls=False, stream=True
    )
    name, arguments, finish = "", "", None
    for chunk in stream:
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        for delta in choice.delta.tool_calls or []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert (name, finish) == ("set_lamp", "tool_calls"), (name, finish)
    arguments_are_right(arguments)
    said.append(whole.choices[0].message.model_dump(exclude_none=True))
    said.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    after = client.chat.completions.create(**{**ask, "max_tokens": 8})
    assert after.usage.completion_tokens <= 8


class Person(BaseModel):
    age: int
    likes_tea: bool


def schema(model):
    said = [{"role": "user", "content": "A person."}]
    parsed = client.chat.completions.parse(
        model=model, messages=said, response_format=Person, max_tokens=100, extra_body=NO_THINKING
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)


def refusals(model):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    for messages, extra, expected in [
        ([{"role": "user", "content": [image]}], {}, "reads text alone"),
        ([{"role": "user", "content": "a"}], {"frobnicate": 1}, "frobnicate"),
    ]:
        try:
            client.chat.completions.create(model=model, messages=messages, extra_body=extra)
            raise SystemExit(f"accepted: {expected}")
        except openai.BadRequestError as error:
            assert expected in error.message and error.param, error


def responses(model):
    ask = dict(model=model, max_output_tokens=20, temperature=0, extra_body=NO_THINKING)
    first = client.responses.create(**ask, input="Tell me a story.", instructions="Be brief.")
    assert first.status == "incomplete" and first.output_text
    events = list(client.responses.create(**ask, input="Tell me a story.", instructions="Be brief.", stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == first.output_text and events[0].type == "response.created"
    assert events[-1].type == "response.incomplete", events[-1]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    more = client.responses.create(**ask, input="Go on.", previous_response_id=first.id)
    assert more.usage.input_tokens > first.usage.output_tokens
    tool = {"type": "function", **TOOL["function"], "strict": True}
    called = client.responses.create(
        **{**ask, "max_output_tokens": 120}, input="Light the hall.", tools=[tool], tool_choice="required",
        parallel_tool_calls=False,
    )
    call = called.output[0]
    assert call.type == "function_call" and called.status == "completed", called
    arguments_are_right(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.responses.create(
        **ask, input=[result], previous_response_id=called.id, tools=[tool]
    )
    assert after.output is not None
    parsed = client.responses.parse(
        **{**ask, "max_output_tokens": 100}, input="A person.", text_format=Person
    )
    assert isinstance(parsed.output_parsed, Person)


def cancellation(model):
    stream = client.completions.create(
        model=model, prompt="Once", max_tokens=2000, stream=True, extra_body={"ignored": None}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while client.get("/../health", cast_to=object)["live"]:
        assert time.monotonic() < deadline, "the text of a client that left goes on"
        time.sleep(0.05)


def together(model):
    said = [{"role": "user", "content": "Tell me a story."}]
    ask = dict(model=model, messages=said, max_tokens=40, temperature=0, extra_body=NO_THINKING)
    alone = client.chat.completions.create(**ask).choices[0].message.content
    texts = []
    work = lambda: texts.append(client.chat.completions.create(**ask).choices[0].message.content)
    threads = [threading.Thread(target=work) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert texts == [alone] * 6, texts


model = models()
for part in (chat, tools, schema, refusals, responses, cancellation, together):
    part(model)
    print(f"openai {openai.__version__}: {part.__name__} ok")
