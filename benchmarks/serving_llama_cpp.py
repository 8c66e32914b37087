"""Run a GGUF model, with a GGUF adapter, in llama.cpp, and write the logits of prompts.

Called by ``serving.py`` with a Python that has llama-cpp-py-sync, for each adapter in a process of its own, since
llama.cpp aborts where it finds something impossible. Keys, values and weights are float32. Without arguments it prints
the versions.

    python benchmarks/serving_llama_cpp.py MODEL ADAPTER|- PROMPTS OUTPUT
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp_py_sync
import numpy as np
from llama_cpp_py_sync import Llama


def main(model: str, adapter: str, prompts: str, output: str) -> None:
    """Write the logits after each token of each prompt.

    Args:
        model: GGUF file.
        adapter: GGUF file, or ``-``.
        prompts: JSON file with lists of token numbers.
        output: NPZ file to write: an array for each prompt, positions × vocabulary.
    """
    # LLAMA_FLASH_ATTN_TYPE_DISABLED = 0: flash attention rounds keys and values to 16 bits
    llama: Any = Llama(model, n_ctx=128, n_batch=128, type_k="f32", type_v="f32", flash_attn_type=0)
    ffi, lib = llama._ffi, llama._lib
    if adapter != "-":
        read = lib.llama_adapter_lora_init(llama._model, adapter.encode())
        if read == ffi.NULL:
            sys.exit("llama.cpp failed to load the adapter")
        kept = ffi.new("struct llama_adapter_lora *[]", [read]), ffi.new("float[]", [1.0])
        if lib.llama_set_adapters_lora(llama._ctx, kept[0], 1, kept[1]):
            sys.exit("llama.cpp failed to apply the adapter")
    found = [logits(llama, prompt) for prompt in json.loads(Path(prompts).read_text(encoding="utf-8"))]
    np.savez(output, *found)


def logits(llama: Any, prompt: list[int]) -> np.ndarray:
    """Run one prompt.

    Args:
        llama: Model with its adapter.
        prompt: Token numbers.

    Returns:
        Logits, positions × vocabulary.
    """
    ffi, lib = llama._ffi, llama._lib
    llama._clear_context_state()
    batch = lib.llama_batch_init(len(prompt), 0, 1)
    batch.n_tokens = len(prompt)
    for index, token in enumerate(prompt):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    if lib.llama_decode(llama._ctx, batch):
        sys.exit("llama.cpp failed to decode")
    vocabulary = lib.llama_vocab_n_tokens(llama._vocab)
    size = len(prompt) * vocabulary
    buffer = ffi.buffer(lib.llama_get_logits(llama._ctx), 4 * size)
    rows = np.frombuffer(buffer, dtype=np.float32).reshape(len(prompt), vocabulary).copy()
    lib.llama_batch_free(batch)
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 1:
        manifest = Path(llama_cpp_py_sync.__file__).with_name("native_manifest.json")
        commit = json.loads(manifest.read_text(encoding="utf-8"))["llama_cpp_commit"]
        version = importlib.metadata.version("llama-cpp-py-sync")
        print(json.dumps({"llama-cpp-py-sync": version, "llama.cpp": commit}))
    else:
        main(*sys.argv[1:])
