"""The tokenizer of the tiny models: 512 entries, byte level, with the added tokens of Qwen3.5 at the top.

    tiny_tokenizer.py OUT

Writes tokenizer.json, tokenizer_config.json, generation_config.json and cases.json (texts with their ids). Everything
but the merges is as in Qwen3.5: NFC first, the same split expression, the same added tokens in the same order, and the
end-of-turn token in generation_config.json although config.json names another.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 512
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Special tokens are dropped from decoded text; the plain ones after them are kept.
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
PLAIN = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
<tool_response> </tool_response> <think> </think>""".split()
SPECIAL_AFTER = """<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single>
<|audio_pad|>""".split()

# The merges are learned from this text, so it may change only together with the files.
TEXT = """
A model that does not fit into memory can still run from disk, if most of it is not needed for the next token. Each
layer has many experts, and a router picks a few of them. The weights of the picked experts are read, multiplied and
forgotten; the rest stays where it is. You are a helpful assistant. What is the weather in Paris today? It is sunny.
The user asks a question, the system gives the rules, and the assistant answers with a tool call or with text.
function name: get_weather, parameter: city, value: London. Numbers are split into digits: 1, 23, 456, 7890.
def main(): print("hello world"); return {"status": "ok", "count": 10}
Der Wald ist dunkel und der Weg ist weit. La maison est petite, mais elle est belle. I don't know what they'll say.
"""

CASES = [
    "",
    " ",
    "Hello world",
    "The weather in Paris is sunny.",
    "I don't know, they'LL say 1234567890.",
    "tabs\tand  two spaces\n\n\nand lines\r\n end ",
    "caf\u00e9 cafe\u0301 \u00c5 A\u030a",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600 \U0001f469\u200d\U0001f4bb",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "<tool_call>\n<function=get_weather>\n</function>\n</tool_call><|endoftext|>",
    "x<|im_end|>y <think>z</think> <|im_sta rt|>",
    "   leading and trailing   ",
    "\u00a0no-break\u2003em space",
    'def f(a): return {"k": [1, 2.5, None]}  # comment',
]


def added_tokens():
    """The added tokens in the order of their ids."""
    kinds = [(SPECIAL, True), (PLAIN, False), (SPECIAL_AFTER, True)]
    return [AddedToken(t, normalized=False, special=special) for tokens, special in kinds for t in tokens]


def assemble(model):
    """A tokenizer around a BPE model, with the stages of Qwen3.5."""
    t = Tokenizer(model)
    t.normalizer = normalizers.NFC()
    by_split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.pre_tokenizer = pre_tokenizers.Sequence([by_split, by_byte])
    t.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    return t


def build():
    """Learn the merges, then put the added tokens above them."""
    base = VOCABULARY - len(added_tokens())
    t = assemble(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=base, initial_alphabet=alphabet, show_progress=False))
    t.add_tokens(added_tokens())
    assert t.get_vocab_size() == VOCABULARY and t.token_to_id("<|endoftext|>") == base
    return t


def main(folder):
    t = build()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text, end_of_turn = t.token_to_id("<|endoftext|>"), t.token_to_id("<|im_end|>")
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": 262144,
    }
    generation_config = {
        "bos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "eos_token_id": [end_of_turn, end_of_text],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    cases = []
    for text in CASES:
        ids = t.encode(text, add_special_tokens=False).ids
        shown = t.decode(ids, skip_special_tokens=True)
        cases.append({"text": text, "ids": ids, "decoded_without_special": shown})
    for name, value in [
        ("tokenizer", json.loads(t.to_str())),
        ("tokenizer_config", tokenizer_config),
        ("generation_config", generation_config),
    ]:
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    lines = ",\n".join(json.dumps(case) for case in cases)
    (folder / "cases.json").write_text(f"[\n{lines}\n]\n")
    print(f"{folder}: {t.get_vocab_size()} entries, {len(cases)} cases")


if __name__ == "__main__":
    main(sys.argv[1])
