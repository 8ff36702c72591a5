"""Golden numbers of the tiny models, from transformers in float32 on the CPU.

    golden.py                          every variant: check, then write its golden and its config.json
    golden.py --variants q3moe,q3next  only these
    golden.py --search 24              try seeds 1..24 of the chosen variants and print the gaps of each; writes nothing
    golden.py --checkpoints DIR        also write the checkpoints themselves (the Rust tests make their own)

A golden is only good if a correct engine must agree with it: the checks demand that one prefill, a split prefill, and
token by token give the same logits and experts, and that no router and no greedy choice is a near tie.
"""

import argparse
import copy
import json
import os
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as q35

import weights
from variants import END_OF_TEXT, LONG, PROMPT, SEEDS, STEPS, config

TESTS = Path(__file__).resolve().parent.parent / "crates" / "flash-moe" / "tests"
TOLERANCE = 2e-4  # logits and states, absolute; the logits have a deviation of 3
ROUTER_GAP, GREEDY_GAP = 2e-5, 4e-3
# States are stored as every n-th number of the flattened array; n is coprime to the inner dimensions.
STRIDES = {"conv_state": 11, "delta_state": 61, "k_cache": 13, "v_cache": 13}
NO_EXPERT = 255  # stands in the router arrays of a dense layer


def build_model(settings):
    """The torch text model of a config, with uninitialised weights."""
    kind = settings["model_type"]
    fields = settings.get("text_config", settings)
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "dtype", "torch_dtype")}
    fields.pop("quantization_config", None)
    configs = {
        "qwen3_5_moe": (transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM),
        "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }
    config_class, model_class = configs[kind]
    c = config_class(**fields)
    c._attn_implementation = "eager"
    c._experts_implementation = "eager"
    return model_class(c).float().eval()


class DraftHead(torch.nn.Module):
    """The MTP head: transformers skips mtp.*, so its one layer is put together here from the trunk's classes."""

    def __init__(self, trunk_config):
        super().__init__()
        c = copy.deepcopy(trunk_config)
        c.layer_types, c.num_hidden_layers = ["full_attention"], 1
        norm = lambda: q35.Qwen3_5MoeRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = torch.nn.ModuleList([q35.Qwen3_5MoeDecoderLayer(c, 0)])
        self.fc = torch.nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.norm, self.pre_fc_norm_hidden, self.pre_fc_norm_embedding = norm(), norm(), norm()
        self.float().eval()

    def forward(self, model, ids, hidden):
        """Row t sees the trunk at t and token t+1, and predicts token t+2. Returns (hidden, logits)."""
        e = self.pre_fc_norm_embedding(model.model.embed_tokens(torch.tensor([ids[1:]])))
        x = self.fc(torch.cat([e, self.pre_fc_norm_hidden(hidden[None, :-1])], -1))
        rows = x.shape[1]
        positions = torch.arange(rows).expand(3, 1, rows)
        mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        x = self.layers[0](x, position_embeddings=model.model.rotary_emb(x, positions), attention_mask=mask)
        x = self.norm(x[0] if isinstance(x, tuple) else x)
        return x[0], model.lm_head(x)[0]


def parameters(module, prefix=""):
    """Names and shapes of a module's weights; a tied head is listed once."""
    return {prefix + name: tuple(p.shape) for name, p in module.named_parameters()}


def prepare(variant, seed):
    """(config, stored tensors, trunk with those weights, draft head or None)."""
    settings = config(variant)
    tied = settings["tie_word_embeddings"]
    model = build_model(settings)
    head = DraftHead(model.config) if settings["model_type"] == "qwen3_5_moe" else None
    shapes = parameters(model)
    if head is not None and "quantization" not in settings:
        shapes |= parameters(head, "mtp.")
    zero_centred = settings["model_type"] != "qwen3_moe"
    drawn = {n: weights.draw(n, s, seed, zero_centred, tied) for n, s in sorted(shapes.items())}
    stored, used = weights.layout(settings, drawn)
    draft = {n.removeprefix("mtp."): used.pop(n) for n in list(used) if n.startswith("mtp.")}
    if tied:
        used["lm_head.weight"] = used["model.embed_tokens.weight"]
    model.load_state_dict(used, strict=True)
    if draft:
        head.load_state_dict(draft, strict=True)
    return settings, stored, model, head if draft else None


class Record:
    """Forward hooks that keep what each layer computes during one call."""

    def __init__(self, model):
        self.seen, self.hooks = {}, []
        for i, layer in enumerate(model.model.layers):
            self.watch(f"mixer.{i}", getattr(layer, "linear_attn", None) or layer.self_attn)
            self.watch(f"moe.{i}", layer.mlp)
            self.watch(f"layer.{i}", layer)
            if hasattr(layer.mlp, "experts"):
                self.watch(f"router.{i}", layer.mlp.gate)
        self.watch("final_norm", model.model.norm)

    def watch(self, key, module):
        """Keep a router's whole output, and the hidden states of anything else."""
        def keep(_module, _inputs, out):
            if not key.startswith("router"):
                out = (out[0] if isinstance(out, tuple) else out)[0].clone()
            self.seen[key] = out

        self.hooks.append(module.register_forward_hook(keep))

    def stop(self):
        for hook in self.hooks:
            hook.remove()


def run(model, ids, cache=None):
    """Feed ids after the cache. Returns (arrays with one row a token, cache)."""
    record = Record(model)
    out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    record.stop()
    layers, k = range(len(model.model.layers)), model.config.num_experts_per_tok
    seen = record.seen
    arrays = {name: torch.stack([seen[f"{name}.{i}"] for i in layers]) for name in ("mixer", "moe", "layer")}
    dense = (None, torch.zeros(len(ids), k), torch.full((len(ids), k), NO_EXPERT))
    routed = [seen.get(f"router.{i}", dense) for i in layers]
    arrays["router_weights"] = torch.stack([r[1] for r in routed])
    arrays["router_indices"] = torch.stack([r[2] for r in routed])
    arrays["router_gap"] = min(router_gap(r[0], k) for r in routed if r[0] is not None)
    arrays["logits"], arrays["final_norm"] = out.logits[0].clone(), seen["final_norm"]
    return arrays, out.past_key_values


def router_gap(logits, k):
    """The smallest distance in probability between the last expert chosen and the first left out."""
    p = torch.softmax(logits, -1).sort(-1, descending=True).values
    return (p[:, k - 1] - p[:, k]).min().item()


def join(steps):
    """Arrays of consecutive calls as if they were one."""
    out = {"router_gap": min(s["router_gap"] for s in steps)}
    for name in steps[0].keys() - out.keys():
        token_axis = 0 if name in ("logits", "final_norm") else 1
        out[name] = torch.cat([s[name] for s in steps], token_axis)
    return out


def states(cache, model):
    """The cache after a call: last 3 raw columns [C,3], S [vh,dk,dv], K and V [kv heads, tokens, hd]."""
    out = {}
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(cache.layers)
    for i, (kind, layer) in enumerate(zip(kinds, cache.layers)):
        if kind == "linear_attention":
            out[f"conv_state.{i}"] = layer.conv_states[0][0][:, 1:].clone()
            out[f"delta_state.{i}"] = layer.recurrent_states[0][0].clone()
        else:
            out[f"k_cache.{i}"] = layer.keys[0].clone()
            out[f"v_cache.{i}"] = layer.values[0].clone()
    return out


def greedy(model, first, cache):
    """STEPS greedy steps from the token after the prompt. Returns (ids, arrays, cache); one id more than steps."""
    ids, steps = [first], []
    for _ in range(STEPS):
        arrays, cache = run(model, [ids[-1]], cache)
        steps.append(arrays)
        ids.append(int(arrays["logits"][-1].argmax()))
    return ids, join(steps), cache


def reference(model, seed):
    """Everything the golden is cut from: the prompt, the greedy steps after it, and one long prompt."""
    long_ids = weights.token_ids("long_ids", seed, LONG, END_OF_TEXT)
    prompt = long_ids[:PROMPT]
    r = {"long_ids": long_ids, "prompt": prompt}
    r["prefill"], cache = run(model, prompt)
    r["after_prefill"] = states(cache, model)
    r["greedy_ids"], r["decode"], cache = greedy(model, int(r["prefill"]["logits"][-1].argmax()), cache)
    r["after_decode"] = states(cache, model)
    r["long"], _ = run(model, long_ids)
    choices = torch.cat([r["prefill"]["logits"][-1:], r["decode"]["logits"]]).topk(2, -1).values
    r["greedy_gap"] = (choices[:, 0] - choices[:, 1]).min().item()
    r["router_gap"] = min(r[phase]["router_gap"] for phase in ("prefill", "decode", "long"))
    return r


def same_experts(a, b):
    """Whether every token of two runs has the same set of experts in every layer."""
    return torch.equal(a["router_indices"].sort(-1).values, b["router_indices"].sort(-1).values)


def check(model, r):
    """Other ways to feed the same tokens, against the reference. Returns the largest differences."""
    prompt = r["prompt"]
    head, cache = run(model, prompt[:20])
    tail, _ = run(model, prompt[20:], cache)
    steps, cache = [], None
    for token in prompt:
        arrays, cache = run(model, [token], cache)
        steps.append(arrays)
    whole, cache = run(model, prompt + r["greedy_ids"][:-1])
    both = join([r["prefill"], r["decode"]])
    ways = {
        "split": (join([head, tail]), r["prefill"]),
        "by_token": (join(steps), r["prefill"]),
        "whole": (whole, both),
    }
    worst = {name: (a["logits"] - b["logits"]).abs().max().item() for name, (a, b) in ways.items()}
    again = states(cache, model)
    worst["states"] = max((again[n] - v).abs().max().item() for n, v in r["after_decode"].items())
    assert max(worst.values()) < TOLERANCE, worst
    assert all(same_experts(a, b) for a, b in ways.values())
    assert r["router_gap"] >= ROUTER_GAP and r["greedy_gap"] >= GREEDY_GAP, (r["router_gap"], r["greedy_gap"])
    return worst


def check_reload(folder, model):
    """transformers' own loader must read the checkpoint back to the same weights."""
    again, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    theirs = again.state_dict()
    assert all(torch.equal(theirs[n], v) for n, v in model.state_dict().items())


def sampled(phase, arrays):
    """States of a phase, cut down by the stride of their kind."""
    return {f"{phase}.{n}": v.flatten()[:: STRIDES[n.split(".")[0]]] for n, v in arrays.items()}


def arrays_of(r):
    """The arrays of a golden file, named as oracle/README.md lists them."""
    out = {
        "input_ids": torch.tensor(r["prompt"], dtype=torch.int32),
        "greedy_ids": torch.tensor(r["greedy_ids"], dtype=torch.int32),
        "long_ids": torch.tensor(r["long_ids"], dtype=torch.int32),
    }
    for phase in ("prefill", "decode"):
        a = r[phase]
        out[f"{phase}.logits"] = a["logits"]
        out[f"{phase}.router_indices"] = a["router_indices"].to(torch.uint8)
        out[f"{phase}.router_weights"] = a["router_weights"]
        out[f"{phase}.layer_sum"] = a["layer"].double().sum(-1)
        for name in ("layer", "mixer", "moe"):
            out[f"{phase}.{name}_last"] = a[name][:, -1]
        out |= sampled(f"after_{phase}", r[f"after_{phase}"])
    out["long.logits_last"] = r["long"]["logits"][-1]
    out["long.layer_last"] = r["long"]["layer"][:, -1]
    out["long.router_indices"] = r["long"]["router_indices"].to(torch.uint8)
    return out


def draft_arrays(head, model, r):
    """The draft head fed with the trunk's state after its final norm, and before it."""
    out, p = {}, r["prefill"]
    for tag, hidden in (("postnorm", p["final_norm"]), ("prenorm", p["layer"][-1])):
        normed, logits = head(model, r["prompt"], hidden)
        out[f"mtp_{tag}.hidden_last"] = normed[-1]
        out[f"mtp_{tag}.logits_last"] = logits[-1]
        out[f"mtp_{tag}.argmax"] = logits.argmax(-1).to(torch.int32)
    return out


def write(variant, folder):
    """Check one variant and write its golden and config; with a folder, its checkpoint as well."""
    seed = SEEDS[variant]
    settings, stored, model, head = prepare(variant, seed)
    r = reference(model, seed)
    worst = check(model, r)
    arrays = arrays_of(r)
    if head is not None:
        arrays |= draft_arrays(head, model, r)
    about = {
        "variant": variant,
        "seed": str(seed),
        "checkpoint_xxh3_64": weights.fingerprint(stored),
        "router_gap": f"{r['router_gap']:.3e}",
        "greedy_gap": f"{r['greedy_gap']:.3e}",
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
    } | {f"stride.{kind}": str(n) for kind, n in STRIDES.items()}
    arrays = {n: (v.float() if v.is_floating_point() else v).contiguous() for n, v in arrays.items()}
    path = TESTS / "golden" / f"{variant}.safetensors"
    # One entry: safetensors writes several in no fixed order.
    save_file(arrays, path, metadata={"about": json.dumps(about)})
    os.chmod(path, 0o644)
    (TESTS / "fixture" / "config").mkdir(parents=True, exist_ok=True)
    (TESTS / "fixture" / "config" / f"{variant}.json").write_text(json.dumps(settings, indent=1) + "\n")
    if folder:
        weights.write_checkpoint(f"{folder}/{variant}", settings, stored)
        if "quantization_config" not in settings:
            check_reload(f"{folder}/{variant}", model)
    used = [len(set(layer.flatten().tolist()) - {NO_EXPERT}) for layer in r["long"]["router_indices"]]
    row = {k: float(f"{v:.1e}") for k, v in worst.items()}
    print(variant, about, row, f"{path.stat().st_size} bytes", "experts", used, flush=True)


def search(variant, seeds):
    """Print the gaps of each seed."""
    for seed in range(1, seeds + 1):
        *_, model, _head = prepare(variant, seed)
        r = reference(model, seed)
        gaps = f"router {r['router_gap']:.2e} greedy {r['greedy_gap']:.3f}"
        print(f"{variant} seed {seed} {gaps} distinct {len(set(r['greedy_ids']))}", flush=True)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--variants", default=",".join(SEEDS))
    arguments.add_argument("--search", type=int)
    arguments.add_argument("--checkpoints")
    chosen = arguments.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # so that sums have one order, and a busy machine is not made busier
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for variant in chosen.variants.split(","):
        if chosen.search:
            search(variant, chosen.search)
        else:
            write(variant, chosen.checkpoints)


if __name__ == "__main__":
    main()
