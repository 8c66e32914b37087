"""Run a GGUF model, with a GGUF adapter, in llama.cpp's server, and write how it continues prompts.

Called by ``serving.py`` with a Python that has xllamacpp (llama.cpp's server for Python), for each adapter in a process
of its own, since llama.cpp may abort. Weights, keys and values are float32. Without arguments it prints the version.

    python benchmarks/serving_llama_cpp.py JOB PROMPTS OUTPUT
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp
from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

LIKELIEST = 20


def main(job_file: str, prompts_file: str, output: str) -> None:
    """Write the continuations.

    Args:
        job_file: JSON with the ``model`` and ``adapter`` (or null), GGUF files, and the ``length`` of continuations.
        prompts_file: JSON with lists of token numbers.
        output: JSON file to write: for each prompt the tokens, and at each of them the log-probabilities of the
            likeliest by their numbers.
    """
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    params: Any = CommonParams()
    params.model.path = job["model"]
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # flash attention rounds keys and values to 16 bits
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["adapter"]:
        params.lora_adapters = [CommonAdapterLoraInfo(job["adapter"], 1.0)]
    server: Any = Server(params)
    options = {"n_predict": job["length"], "temperature": 0, "n_probs": LIKELIEST, "ignore_eos": True}
    found = []
    for prompt in json.loads(Path(prompts_file).read_text(encoding="utf-8")):
        answer = server.handle_completions({"prompt": prompt, "cache_prompt": False, **options})
        if "choices" not in answer:
            sys.exit(f"ERROR:{answer}")
        rows = answer["choices"][0]["logprobs"]["content"]
        found.append(
            {
                "tokens": [row["id"] for row in rows],
                "log_probabilities": [
                    {entry["id"]: entry["logprob"] for entry in row["top_logprobs"]} for row in rows
                ],
            }
        )
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(importlib.metadata.version("xllamacpp"))
    else:
        main(*sys.argv[1:])
