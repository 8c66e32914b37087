"""Ask vLLM and llama.cpp, each by a Python of its own, and compare their answers with PEFT's: for ``serving.py``."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTINUED, MAX_LORA_RANK = 4, 32
# largest difference of a log-probability in float32 that is rounding; the adapters change some by more than 1
LIMIT = 2e-3
_LLAMA_CPP = Path(__file__).with_name("serving_llama_cpp.py")
READ, REFUSED, WRONG, ABORTED = "the same", "refused", "differs", "aborts"


@dataclass(frozen=True)
class Readers:
    """Paths of the servers; ``None`` for one that is not installed.

    Attributes:
        work: Folder with ``prompts.json``, for files that pass between the processes.
        vllm: A Python with vLLM.
        llama_python: A Python with llama.cpp's library, and with what its converters need.
        llama_cpp: llama.cpp's source, with its converters.
    """

    work: Path
    vllm: str | None
    llama_python: str | None
    llama_cpp: Path | None


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of PEFT's model.

    Attributes:
        sequences: Prompts with their greedy continuations, as token numbers.
        log_probabilities: Of the next token after each token: positions × vocabulary for each sequence.
        folder: Of the adapter or the model.
    """

    sequences: list[list[int]]
    log_probabilities: list[Tensor]
    folder: Path

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, prompts: Sequence[Sequence[int]], folder: Path) -> "Reference":
        """Ask a causal language model, in evaluation mode."""
        sequences = [list(prompt) for prompt in prompts]
        for sequence in sequences:
            for _ in range(CONTINUED):
                logits = model(input_ids=torch.tensor([sequence])).logits
                sequence.append(int(logits[0, -1].argmax()))
        return cls(sequences, log_probabilities(model, sequences), folder)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return those of the next token after each token.

    Args:
        model: Causal language model, in evaluation mode.
        sequences: Token numbers.

    Returns:
        A matrix for each sequence: positions × vocabulary.
    """
    logits = [model(input_ids=torch.tensor([sequence])).logits[0].double() for sequence in sequences]
    return [rows.log_softmax(-1) for rows in logits]


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference between log-probabilities of the same prompts.

    Args:
        one, other: A matrix for each prompt.

    Returns:
        The largest absolute difference.
    """
    return max((x - y).abs().max().item() for x, y in zip(one, other, strict=True))


def vllm_answers(
    readers: Readers, references: Mapping[str, Reference], merged: Set[str], versions: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Let vLLM read the base with all adapters, then each merged model.

    Args:
        readers: With a Python that has vLLM; without it there are no answers.
        references: PEFT's, by case, with that of the ``base``.
        merged: Cases that are whole models.
        versions: Gets those of vLLM and what it runs with.

    Yields:
        Cases and comparisons.
    """
    if readers.vllm is None:
        return
    source = references["base"].folder
    adapters = {name: str(each.folder) for name, each in references.items() if name not in {"base", *merged}}
    found = _from_vllm(readers, source, adapters)
    versions |= found["versions"]
    answers = found["results"]
    for name in references:
        answer = answers.get(name) or _from_vllm(readers, references[name].folder, {})["results"]["base"]
        if "refused" in answer:
            yield name, {"status": REFUSED, "by": "vLLM", "message": answer["refused"]}
        else:
            yield name, _compared(answer["continuations"], references[name])


def _from_vllm(readers: Readers, model: Path, adapters: dict[str, str]) -> dict[str, Any]:
    work = readers.work
    job = {"model": str(model), "adapters": adapters, "max_lora_rank": MAX_LORA_RANK, "length": CONTINUED}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("serving_vllm.py")
    done = _run([readers.vllm, script, work / "job.json", work / "prompts.json", work / "vllm.json"])
    if done.returncode:
        raise RuntimeError(f"vLLM failed:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
    return json.loads((work / "vllm.json").read_text(encoding="utf-8"))


def _compared(found: Sequence[Mapping[str, Any]], reference: Reference) -> dict[str, Any]:
    # as long as the server's tokens are PEFT's
    largest, tokens, compared = 0.0, 0, 0
    for own, sequence, expected in zip(found, reference.sequences, reference.log_probabilities, strict=True):
        for index, position in enumerate(range(len(sequence) - CONTINUED, len(sequence))):
            values = own["log_probabilities"][index]
            differences = [
                abs(value - expected[position - 1, int(key)].item()) for key, value in values.items()
            ]
            largest, compared = max(largest, *differences), compared + len(differences)
            if own["tokens"][index] != sequence[position]:
                break
            tokens += 1
    status = READ if largest <= LIMIT else WRONG
    return {"status": status, "difference": largest, "equal_tokens": tokens, "compared": compared}


def llama_cpp_answers(
    readers: Readers, references: Mapping[str, Reference], merged: Set[str], versions: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Convert the base, each adapter and each merged model for llama.cpp, and run them.

    Args:
        readers: With llama.cpp's source and a Python that has its library; without them there are no answers.
        references: PEFT's, by case, with that of the ``base``, which comes first.
        merged: Cases that are whole models.
        versions: Gets those of llama.cpp's library and its converters.

    Yields:
        Cases and comparisons.
    """
    if readers.llama_python is None or readers.llama_cpp is None:
        return
    versions["xllamacpp"] = _run([readers.llama_python, _LLAMA_CPP]).stdout.strip()
    for name, reference in references.items():
        yield name, _from_llama_cpp(readers, references["base"].folder, reference, name in {"base", *merged})


def _from_llama_cpp(readers: Readers, source: Path, reference: Reference, whole: bool) -> dict[str, Any]:
    assert readers.llama_cpp is not None
    work, python = readers.work, readers.llama_python
    base, target = work / "base.gguf", work / "converted.gguf"
    if reference.folder == source:
        target = base
    target.unlink(missing_ok=True)
    script = readers.llama_cpp / ("convert_hf_to_gguf.py" if whole else "convert_lora_to_gguf.py")
    options = ["--outtype", "f32", "--outfile", target, *([] if whole else ["--base", source])]
    done = _run([python, script, reference.folder, *options])
    if done.returncode:
        return {"status": REFUSED, "by": script.name, "message": _last_error(done.stderr)}
    model, adapter = (target, None) if whole else (base, target)
    job = {"model": str(model), "adapter": adapter and str(adapter), "length": CONTINUED}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = _run([python, _LLAMA_CPP, work / "job.json", work / "prompts.json", work / "llama.json"])
    if done.returncode:
        status = ABORTED if done.returncode < 0 else REFUSED  # by a signal
        return {"status": status, "by": "llama.cpp", "message": _last_error(done.stderr)}
    found = json.loads((work / "llama.json").read_text(encoding="utf-8"))
    return _compared(found, reference)


def _run(command: Sequence[Any]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ERROR", "ValueError", "AssertionError"))]
    found = (told or [line for line in lines if "ASSERT" in line or "failed" in line] or lines)[0]
    # without time stamps and the folders it was built in
    return re.sub(r"^ERROR:[\w-]+:|^[\d.]+ E |^/\S*/", "", found)[:300]
