"""Every command and script of README and docs runs, with small models under the names of large ones and few steps.

The blocks of a page run in their order in one folder. In guides a block of Python may use the usual names (`model`,
`batches`, ...) without making them; the blocks of a tutorial share what they make, as a reader's would, until shell
commands end the session.
"""

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
import transformers
import trl
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import tangora
from tangora.training.data import collator, encode
from tests.experiments.small import write_classifier, write_generator
from tests.models import with_lora
from tests.training.tiny import picture, write_clip, write_pictures

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|bash|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)

OTHER_PROGRAMS = {"make", "pip", "vllm", "python", "llama-server", "ollama", "accelerate", "torchrun", "cd"}
"""Programs whose commands are not run here."""

OTHER_PACKAGES = ("vllm", "unsloth", "distributed_config")
"""Blocks of Python with these words need packages or machines that tests do not have."""

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)

STAND_INS = {
    "smollm2-135m": "llm",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "llm",
    "meta-llama/Meta-Llama-3-8B": "llm",
    "meta-llama/Meta-Llama-3-70B": "llm",
    "./large": "llm",
    "code.jsonl": "data.jsonl",
    "arc_easy,hellaswag": "everyday_choices",
    "boolq,piqa": "everyday_choices",
    "humaneval": "python_functions",
    "./my-llm": "llm",
    "openai/clip-vit-base-patch16": "clip",
    "/shared/plan": "shared/plan",
}
"""Small models and folders under the names of large ones."""

SMALLER = {
    "max_steps=30": "max_steps=1",
    '"steps": 30': '"steps": 1',
    "per_device_train_batch_size=16": "per_device_train_batch_size=4",
    "max_length=128": "max_length=16",
    "[0, 1, 2], **settings": "[0], learning_rates={'lora': [1e-3], 'tangent': [1e-3]}, **settings",
    "num_train=400, num_validation=100, num_test=100": "num_train=12, num_validation=4, num_test=4",
    '"num_train": 400': '"max_length": 16, "num_train": 12',
    '"num_validation": 100': '"num_validation": 4',
    '"num_test": 100': '"num_test": 4',
    "transformers.Trainer(..., ": "transformers.Trainer(base, args, train_dataset=data, ",
    "trl.SFTTrainer(\n    ..., ": "trl.SFTTrainer(\n    model, config, train_dataset=data, ",
    "DPOTrainer(\n    model": "SFTTrainer(\n    base",
    "DPOTrainer": "SFTTrainer",  # which reads the same data as the others
    "peft_model, ..., optimizers": "peft_model, config, train_dataset=data, optimizers",
    "num_starts=3": "num_starts=1",
    "from_adalora(model)": "from_adalora(adalora)",
}
"""Fewer steps, and what stands for the dots of a guide."""

FORECAST = {"--preset", "--benchmarks", "--measure-every", "--tiny", "--cluster"}
"""With these a comparison has too many runs, or long ones."""

FEW = ["--num-train=12", "--num-validation=4", "--num-test=4", "--max-length=16", "--batch-size=4"]
RUN = [*FEW, "--steps=4", "--start-examples=4"]
COMPARISON = [*RUN, "--seeds=0", "--learning-rates=1e-3", "--extend=0", "--refine=0", "--jobs=1"]
CURVATURE = [
    "--num-examples=2",
    "--batch-size=1",
    "--max-products=4",
    "--top=1",
    "--steps=2",
    "--trace-products=6",
    "--radius=0",
]
SMALL = {
    "train": RUN,
    "compare": [*COMPARISON, "--recipes=lora,tangent"],
    "diagnose": [*FEW, "--num-examples=4", "--num-held-out=4"],
    "curvature": CURVATURE,
}
"""Flags that make a command short; they stand behind the page's own, and the last one counts."""


def blocks(page, languages=("python", "bash")):
    return [match.groups() for match in BLOCK.finditer(page.read_text("utf-8")) if match[1] in languages]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with the models, data and runs that pages name."""
    folder = tmp_path_factory.mktemp("docs")
    settings = write_generator(folder)
    (folder / "model").rename(folder / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "llm")
    (folder / "sums.jsonl").rename(folder / "questions.jsonl")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    (folder / "data.jsonl").write_text(lines_of(rows))
    said = [(("user", row["prompt"]), ("assistant", row["completion"])) for row in rows]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said]
    (folder / "chat.jsonl").write_text(lines_of(chats))
    labelled = folder / "labelled"
    labelled.mkdir()
    write_classifier(labelled)
    (labelled / "model").rename(folder / "classifier")
    texts = [json.loads(line) for line in (labelled / "data.jsonl").read_text().splitlines()]
    (folder / "reviews.csv").write_text(
        "review,sentiment\n"
        + "".join(f"{row['text']},{'good' if row['label'] else 'bad'}\n" for row in texts)
    )
    reviews = [{"review": row["text"], "stars": row["label"]} for row in texts]
    (folder / "reviews.jsonl").write_text(lines_of(reviews))
    (folder / "my-model").symlink_to(folder / "classifier")
    write_clip(folder / "clip")
    write_pictures(folder / "photos")
    picture(0, 0).save(folder / "cat.jpg")
    few = settings | {"model": str(folder / "llm"), "data": str(folder / "data.jsonl"), "steps": 2}
    run = few | {"num_train": 12, "num_validation": 4, "num_test": 4, "batch_size": 4, "curvature_every": 1}
    tangora.train(tangora.RunSettings(recipe="lora", **run, curvature_examples=2), folder / "out")
    return folder


@pytest.fixture
def place(things, tmp_path, monkeypatch):
    """An empty folder with those things, as the working directory."""
    for each in things.iterdir():
        if each.name != "out":
            (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def usual_names(things):
    """Names that guides use without making them."""
    base = AutoModelForCausalLM.from_pretrained("llm")
    tokenizer = AutoTokenizer.from_pretrained("llm")
    task = tangora.load_task("data.jsonl", num_train=12, num_validation=4, num_test=4)
    encodings = encode(task.train, tokenizer, kind="causal", max_length=16)
    collate = collator(tokenizer, "causal")
    batches = [dict(collate(encodings[first : first + 4])) for first in (0, 4, 8)]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True}
    model = with_lora(AutoModelForCausalLM.from_pretrained("llm"))
    ranks = peft.AdaLoraConfig(
        total_step=3, tinit=1, tfinal=1, init_r=3, target_r=2, target_modules="all-linear"
    )
    adalora = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("llm"), ranks)
    padded = collate(encodings)
    data = datasets.Dataset.from_dict({key: value.tolist() for key, value in padded.items()})
    args = TrainingArguments("trainer-out", **options)
    return {
        "tangora": tangora, "torch": torch, "trl": trl, "transformers": transformers,
        "LoraConfig": peft.LoraConfig, "get_peft_model": peft.get_peft_model,
        "base": base, "original_base": AutoModelForCausalLM.from_pretrained("llm"),
        "model": model, "peft_model": model,
        "head": SimpleNamespace(parameters=list), "tokenizer": tokenizer, "data": data, "adalora": adalora,
        "batch": batches[0],
        "batches": batches, "loader": iter(batches * 3), "args": args,
        "config": trl.SFTConfig("trl-out", **options, bf16=False, use_cpu=True),
        "trainer": transformers.Trainer(model, args, train_dataset=data),
    }  # fmt: skip


def with_stand_ins(text):
    for given, smaller in {**SMALLER, **STAND_INS}.items():
        text = text.replace(given, smaller)
    return text


def run_python(script, namespace, name):
    script = with_stand_ins(script)
    exec(compile(script, name, "exec"), namespace)


def arguments_of(line):
    """Return a command of tangora's as a list with small things in it; nothing for another program's."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["torchrun"] and "tangora.cli" in words:  # one process stands for several
        words = ["tangora", *(word for word in words[words.index("-m") + 2 :] if word != "--fsdp")]
    if words[:1] != ["tangora"]:
        assert not words or words[0] in OTHER_PROGRAMS, line
        return None
    words = [STAND_INS.get(word, word) for word in words[1:]]
    few = smaller(words)
    for flag in ("--cluster", "--cluster-options", "--epochs"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return [*words, *few]


def smaller(words):
    """Return the flags that make a command short; comparisons of more than a few runs are only checked."""
    if words[0] == "compare" and FORECAST & {*words}:
        return ["--dry-run"]
    flags = [*SMALL.get(words[0], [])]
    if any(word.startswith("--curvature") for word in words):
        flags.append("--curvature-examples=2")
    if "--measure-gradient" in words:
        flags.append("--measure-gradient=4")
    if "--benchmarks" in words:
        flags.append("--benchmark-limit=2")
    return [*FEW, *flags] if words[:2] == ["curvature", "llm"] else flags


def move_away(output):
    """Rename an output folder, as the next example uses it again."""
    if output.exists():
        output.rename(output.with_name(f"{output.name}-{len(list(output.parent.iterdir()))}"))


def run_bash(script, call, place):
    for line in script.replace("\\\n", " ").splitlines():
        words = arguments_of(line)
        if words is None:
            continue
        if "--output" in words:
            move_away(place / words[words.index("--output") + 1])
        code, _, err = call(*words)
        assert code == 0, f"{line}\n{err}"


def test_links_have_titles_and_lead_to_what_the_site_can_show():
    for page in PAGES:
        links = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", page.read_text("utf-8"))
        assert [text for text, _ in links if re.fullmatch(r"[a-z_]+\.md", text)] == [], page
        # files outside of docs are copied as plain text, which has no anchors
        beyond = [
            link
            for _, link in links
            if "#" in link and ROOT / "docs" not in (page.parent / link.split("#")[0]).resolve().parents
        ]
        assert page == ROOT / "README.md" or [link for link in beyond if link.startswith("../")] == [], page


PAGES_WITH_BLOCKS = [page for page in PAGES if blocks(page)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=lambda page: page.stem)
def test_what_a_page_says_runs(page, things, place, call, monkeypatch):
    monkeypatch.setattr("tangora.experiments.curvature.measurement.save_curvature_pictures", lambda *_: [])
    (place / "out").symlink_to(things / "out")
    for _, block in blocks(page, ("yaml",)):
        if "tasks" in yaml.safe_load(block):
            (place / "plan.yaml").write_text(with_stand_ins(block))
    tutorial = page.parent.name == "tutorials"
    shared = {"__name__": "page"}
    for number, (language, block) in enumerate(blocks(page)):
        if language == "bash":
            run_bash(block, call, place)
            shared = {"__name__": "page"}
        elif not any(word in block for word in OTHER_PACKAGES):
            names = shared if tutorial else {**usual_names(things), "__name__": "page"}
            if "save_adapter" in block and not tutorial:
                move_away(place / "out")
            with contextlib.redirect_stdout(sys.stderr):
                run_python(block, names, f"{page.name}, block {number}")
