"""Conversations rendered with transformers' Jinja, for the engine's chat-template test.

    template_cases.py TEMPLATE OUT

Each case of OUT has a name, messages, the template's other variables, and either the rendered text or the error that
the template raises. The conversations are chosen by the branches of the template, one or two branches a case.
"""

import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

FORECAST = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "Forecast \u2013 in <\u00b0C> & \"words\"",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content} | fields


def tool(content):
    return {"role": "tool", "content": content}


def call(name, **arguments):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


ASK = user("How warm is it in Bern?")
CASES = {
    "user": ([user("Good morning")], {}),
    "user_is_trimmed": ([user(" \n Good morning\t\n")], {}),
    "system": ([system("Answer in one word."), user("Why?")], {}),
    "system_is_trimmed": ([system("\n Answer in one word. \n"), user("Why?")], {}),
    "system_empty": ([system(""), user("Why?")], {}),
    "no_thinking": ([user("Why?")], {"enable_thinking": False}),
    "thinking": ([user("Why?")], {"enable_thinking": True}),
    "no_generation_prompt": ([user("Why?"), assistant("Because.")], {"add_generation_prompt": False}),
    "thinking_before_last_user_is_dropped": (
        [user("2+2?"), assistant("<think>\nadd them\n</think>\n\n4"), user("and 3?")],
        {},
    ),
    "thinking_after_last_user_is_kept": (
        [user("2+2?"), assistant("<think>\n\nadd them \n</think>\n\n4")],
        {"add_generation_prompt": False},
    ),
    "reasoning_field_is_dropped": (
        [user("2+2?"), assistant("4", reasoning_content="add them"), user("and 3?")],
        {},
    ),
    "reasoning_field_is_kept": (
        [user("2+2?"), assistant("4", reasoning_content=" add them\n")],
        {"add_generation_prompt": False},
    ),
    "three_turns": (
        [system("Count."), user("1"), assistant("2"), user("3"), assistant("4"), user("5")],
        {"enable_thinking": False},
    ),
    "tools": ([ASK], {"tools": [FORECAST]}),
    "two_tools": ([ASK], {"tools": [FORECAST, CLOCK]}),
    "no_tools_given": ([ASK], {"tools": []}),
    "tools_and_system": ([system(" Be exact. "), ASK], {"tools": [FORECAST]}),
    "tools_and_empty_system": ([system("  "), ASK], {"tools": [FORECAST]}),
    "tool_round_trip": (
        [
            ASK,
            assistant("", reasoning_content="look it up", tool_calls=[call("forecast", place="Bern", days=1)]),
            tool('{"warm": 21}'),
        ],
        {"tools": [FORECAST]},
    ),
    "tool_round_trip_answered": (
        [
            ASK,
            assistant("", tool_calls=[call("forecast", place="Bern")]),
            tool(" 21 \n"),
            assistant("21 degrees."),
            user("Thanks!"),
        ],
        {"tools": [FORECAST]},
    ),
    "text_before_two_calls_and_two_results": (
        [
            user("Bern and Rome?"),
            assistant("One moment.", tool_calls=[call("forecast", place="Bern"), call("forecast", place="Rome")]),
            tool("21"),
            tool("29"),
        ],
        {"tools": [FORECAST]},
    ),
    "call_without_arguments": (
        [user("Time?"), assistant("", tool_calls=[call("clock")]), tool("noon")],
        {"tools": [CLOCK]},
    ),
    "scalar_arguments": (
        [
            user("Go"),
            assistant(
                "",
                tool_calls=[call("f", i=-3, f=0.5, big=12345678901, t=True, f2=False, n=None, s="a\nb <&> \u00fc")],
            ),
            tool("done"),
        ],
        {},
    ),
    "nested_arguments": (
        [
            user("Go"),
            assistant("", tool_calls=[call("f", m={"k": [1, 2.0, None, True, "\u00fc<&'\">"]}, l=[], o={})]),
            tool("done"),
        ],
        {},
    ),
    "call_without_function_wrapper": (
        [user("Go"), assistant("x", tool_calls=[{"name": "f", "arguments": {"a": "b"}}]), tool("done")],
        {},
    ),
    "content_parts": (
        [user([{"type": "text", "text": " a"}, {"type": "text", "text": "b "}])],
        {},
    ),
    "image_part": (
        [user([{"type": "text", "text": "see "}, {"type": "image", "image": "x.png"}])],
        {},
    ),
    "null_content": (
        [user("Go"), assistant(None, tool_calls=[call("f", a=1)]), tool("done")],
        {},
    ),
    "non_ascii": ([user("Gr\u00fc\u00dfe aus \u6771\u4eac \U0001f5fc")], {}),
    "tool_response_in_user_turn": (
        [user("Go"), assistant("ok"), user("<tool_response>\n1\n</tool_response>")],
        {},
    ),
    "error_no_user": ([system("Alone.")], {}),
    "error_late_system": ([user("Why?"), system("Be brief.")], {}),
    "error_unknown_role": ([user("Why?"), {"role": "critic", "content": "No."}], {}),
    "error_no_messages": ([], {}),
    "error_image_in_system": ([system([{"type": "image", "image": "x.png"}]), user("Why?")], {}),
    "error_unknown_part": ([user([{"type": "sound", "sound": "x.wav"}])], {}),
    "error_number_as_content": ([user(5)], {}),
}


def render(template, name, messages, variables):
    """One case with what the template makes of it."""
    variables = {"add_generation_prompt": True} | variables
    case = {"name": name, "messages": messages, "kwargs": variables}
    try:
        texts, _ = render_jinja_template(conversations=[messages], chat_template=template, **variables)
        assert not name.startswith("error_"), name
        return case | {"rendered": texts[0]}
    except Exception as error:
        assert name.startswith("error_"), (name, error)
        return case | {"error": str(error)}


def main(template_path, out):
    template = Path(template_path).read_text()
    cases = [render(template, name, *case) for name, case in CASES.items()]
    Path(out).write_text(json.dumps(cases, indent=1) + "\n")
    print(f"{out}: {len(cases)} cases, {sum('error' in case for case in cases)} errors")


if __name__ == "__main__":
    main(*sys.argv[1:])
