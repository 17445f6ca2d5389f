"""llama.cpp on merged models, and on adapters beside their base, all converted by its own scripts.

    .venvs/llama-cpp/bin/python check_llama_cpp.py CASES LLAMA_CPP

LLAMA_CPP is its source, with `convert_hf_to_gguf.py`, `convert_lora_to_gguf.py` and `gguf-py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comparing
import xllamacpp

# The converter knows a byte-level tokenizer by a hash of what it makes of one text, and ours was trained just now. It
# is told what it would find out of a Qwen2's; everything else it reads from the folder.
_CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(script: str, folder: Path, out: Path, *arguments: str | Path) -> Path:
    llama_cpp = Path(sys.argv[2]).resolve()
    command = [
        sys.executable, "-c", _CONVERT, llama_cpp, llama_cpp / "gguf-py", llama_cpp / script, folder, "--outfile", out,
        "--outtype", "f32", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr.strip().splitlines()[-1]}")
    return out


def load(model: Path, adapter: Path | None = None) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
    params.warmup = False
    # It keeps keys and values in float16 unless told otherwise.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def ask(server: Any, row: dict[str, Any]) -> comparing.Answer:
    reply = server.handle_completions(
        {
            "prompt": row["prompt"], "max_tokens": comparing.NUM_NEW, "temperature": 0.0,
            "logprobs": comparing.NUM_LOGPROBS, "cache_prompt": False,
        }
    )  # fmt: skip
    read = reply["usage"]["prompt_tokens"]
    assert read == len(row["ids"]), f"{row['prompt']!r} became {read} tokens instead of {len(row['ids'])}"
    (choice,) = reply["choices"]
    written = choice["logprobs"]["content"]
    return comparing.Answer(
        [token["id"] for token in written], {top["id"]: top["logprob"] for top in written[0]["top_logprobs"]}
    )


def check(case: comparing.Case) -> Iterator[tuple[str, str]]:
    if case.kind == "classification":
        return
    merged = convert("convert_hf_to_gguf.py", case.folder / "merged", case.folder / "merged.gguf")
    server = load(merged)
    yield "merged", case.check("merged", [ask(server, row) for row in case.content["merged"]])
    if "adapter" in case.content:
        base = convert("convert_hf_to_gguf.py", case.base, case.folder / "base.gguf")
        adapter = case.folder / "trained" / "adapter"
        lora = convert("convert_lora_to_gguf.py", adapter, case.folder / "lora.gguf", "--base", case.base)
        server = load(base, lora)
        yield "adapter", case.check("adapter", [ask(server, row) for row in case.content["adapter"]])


if __name__ == "__main__":
    comparing.run(check)
