"""Decode with experts that do not all fit into video memory, over its size and over who computes the others.

Usage: gpu_streamed.py PROGRAM MODEL DEVICE MEMORY SIZE...
as in   gpu_streamed.py target/release/flash-moe DIR gpu 30GiB 6GiB 8GiB 14GiB

A prompt of 40 ids and 200 tokens, each size with every value of --gpu-misses and twice, so that the second run finds
the files cached. Printed for the second: the split, tokens a second, and what a decoded token took of
uploads, of the processor and of the disk. The greedy tokens of `upload` must be the same for every size.
"""

import json
import subprocess
import sys
import tempfile

program, model, device, memory, *sizes = sys.argv[1:]
TOKENS = 200
HEAD = "size", "misses", "slots", "computed", "prefill", "decode", "uploads", "MB", "GB/s", "cpu", "ms", "disk MB", "waits"
ROW = "{:>8} {:>7} {:>6} {:>9} {:>8} {:>7} {:>8} {:>7} {:>6} {:>6} {:>7} {:>8} {:>6}"

with tempfile.NamedTemporaryFile("w", suffix=".ids") as prompt:
    prompt.write(",".join(str(i * 91 % 4000) for i in range(40)))
    prompt.flush()

    def run(size, misses):
        args = ["run", "--model", model, "--device", device, "--memory", memory, "--gpu-memory", size]
        args += ["--gpu-misses", misses, "--greedy", "--ignore-eos", "--json", "--quiet", "--context", "1024"]
        args += ["--prompt-tokens", prompt.name, "--max-tokens", str(TOKENS)]
        return json.loads(subprocess.run([program, *args], check=True, stdout=subprocess.PIPE).stdout)

    print(ROW.format(*HEAD))
    expected = None
    for size in sizes:
        for misses in "upload", "cpu", "auto":
            run(size, misses)
            found = run(size, misses)
            video, decode_ms = found["video_memory"], found["timings"]["decode_ms"]
            decode, count = video["decode"], TOKENS - 1
            print(ROW.format(
                size, misses, video["slots"], f'{video["misses"]["computed_eighths"]}/8',
                f'{found["prefill_tokens_per_second"]:.1f}', f'{found["decode_tokens_per_second"]:.1f}',
                f'{decode["uploads"] / count:.1f}', f'{decode["upload_bytes"] / count / 1e6:.1f}',
                f'{decode["upload_bytes"] / decode_ms / 1e6:.2f}', f'{decode["computed"] / count:.1f}',
                f'{decode["compute_ms"] / count:.2f}',
                f'{found["counters"]["decode"]["read_bytes"] / count / 1e6:.1f}', decode["upload_waits"]))
            if misses == "upload":
                expected = expected or found["generated_tokens"]
                assert found["generated_tokens"] == expected, "other tokens with another size"
