"""A scripted conversation of the official anthropic package with a running server.

Usage: anthropic_client.py BASE_URL. The server has a template with tools. Exits with an error at the
first thing that is not as the package's own types and the protocol have it.
"""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="test", max_retries=0, timeout=120)
MODEL = "any"
SAID = [{"role": "user", "content": "Tell me a story about a robot."}]
TOOL = {
    "name": "set_lamp",
    "description": "Switch a lamp",
    "input_schema": {
        "type": "object",
        "properties": {
            "room": {"type": "string", "enum": ["kitchen", "hall"]},
            "level": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["room", "level"],
    },
    "cache_control": {"type": "ephemeral"},
}


def text():
    ask = dict(model=MODEL, max_tokens=24, messages=SAID, extra_body={"temperature": 0.0})
    system = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    whole = client.messages.create(**ask, system=system)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 24, whole
    with client.messages.stream(**ask, system=system) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert streamed == whole.content[0].text and final.usage.output_tokens == 24
    word = whole.content[0].text.split()[2]
    stopped = client.messages.create(**ask, system=system, stop_sequences=[word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word), stopped
    counted = client.messages.count_tokens(model=MODEL, messages=SAID, system=system)
    assert counted.input_tokens == whole.usage.input_tokens


def thinking():
    whole = client.messages.create(
        model=MODEL, max_tokens=2000, messages=SAID, extra_body={"temperature": 0.0},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert whole.content[0].type in ("thinking", "text"), whole


def tools():
    ask = dict(model=MODEL, max_tokens=120, messages=SAID, tools=[TOOL])
    one = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(**ask, tool_choice=one) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds and final.stop_reason == "tool_use", final
    call = final.content[-1]
    assert call.name == "set_lamp" and call.input["room"] in ("kitchen", "hall"), call
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "ok"}]}
    more = SAID + [
        {"role": "assistant", "content": [block.model_dump() for block in final.content]},
        {"role": "user", "content": [result]},
    ]
    after = client.messages.create(**{**ask, "messages": more, "max_tokens": 5})
    assert after.usage.output_tokens <= 5
    named = client.messages.create(**ask, tool_choice={"type": "tool", "name": "set_lamp"})
    assert named.content[-1].type == "tool_use", named


def refusals():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    for extra, expected in [
        ({"messages": [{"role": "user", "content": [image]}]}, "reads text alone"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
    ]:
        try:
            client.messages.create(**{"model": MODEL, "max_tokens": 5, "messages": SAID, **extra})
            raise SystemExit(f"accepted: {expected}")
        except anthropic.BadRequestError as error:
            assert error.body["type"] == "error" and expected in error.body["error"]["message"]


for part in (text, thinking, tools, refusals):
    part()
    print(f"anthropic {anthropic.__version__}: {part.__name__} ok")
