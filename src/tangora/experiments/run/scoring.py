"""A run's model on the validation and test examples of its task, on unrelated text, and on benchmarks."""

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor, nn

from tangora.experiments.run.preparing import Run
from tangora.report.run_records import Benchmark
from tangora.training.answers import answers_match, generate_completions, summarize_answers
from tangora.training.benchmarks import evaluate_benchmarks, load_benchmarks
from tangora.training.code_eval import write_programs
from tangora.training.data import Example
from tangora.training.metrics import evaluate, forgetting_loss, metrics_of, predictions, unrelated_texts
from tangora.training.ranks import is_first

NUM_UNRELATED = 32
"""Texts that forgetting is measured on."""


def metrics_on(run: Run, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """Evaluate on some examples."""
    return evaluate(model, *run.encoded(examples), kind=run.task.kind, batch_size=run.evaluation_batch_size)


def validation_metrics(run: Run, model: nn.Module, *, answers: bool = False) -> dict[str, float]:
    """Evaluate on the examples that choose the learning rate."""
    examples = run.task.validation
    metrics = metrics_on(run, model, examples)
    return metrics | (_answers(run, model, examples)[0] if answers else {})


def test_metrics(run: Run, model: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Evaluate on the examples that are reported: the mean metrics, and each example's values."""
    examples = run.task.test
    each = predictions(
        model, *run.encoded(examples), kind=run.task.kind, batch_size=run.evaluation_batch_size
    )
    if run.task.kind == "classification":
        return metrics_of(each), each | {"right": each["correct"].bool()}
    answered, right = _answers(run, model, examples)
    return metrics_of(each) | answered, each | right


def example_losses(each: dict[str, Tensor]) -> list[float]:
    """Divide a loss among the examples."""
    loss = each["loss"]
    return (loss * len(loss) / each["tokens"].sum() if "tokens" in each else loss).tolist()


def unrelated_loss(run: Run, model: nn.Module) -> float | None:
    """Evaluate on text that has nothing to do with the task."""
    return forgetting_loss(
        model,
        run.loaded.tokenizer,
        unrelated_texts(run.task.name, NUM_UNRELATED),
        max_length=run.settings.max_length,
        batch_size=run.evaluation_batch_size,
    )


def benchmark_results(run: Run, model: nn.Module) -> dict[str, Benchmark]:
    """Evaluate on tasks of lm-eval; programs are written to a file for each task."""
    settings = run.settings
    if not settings.benchmarks:
        return {}
    results, programs = evaluate_benchmarks(
        load_benchmarks(settings.benchmarks, settings.benchmark_path),
        model,
        run.loaded.tokenizer,
        limit=settings.benchmark_limit,
        batch_size=run.evaluation_batch_size,
        execute_code=settings.execute_code,
    )
    for name, written in programs.items() if is_first() else ():
        write_programs(written, run.folder.benchmarks / f"{name}.jsonl")
    return {name: Benchmark(**asdict(result)) for name, result in results.items()}


def _answers(
    run: Run, model: nn.Module, examples: Sequence[Example]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    if not run.settings.exact_match or run.loaded.kind == "classification":
        return {}, {}
    texts = generate_completions(
        model,
        run.loaded.tokenizer,
        examples,
        max_new_tokens=run.settings.max_new_tokens,
        stop=run.settings.stop or (),
        batch_size=run.evaluation_batch_size,
        chat_template=bool(run.settings.chat_template),
    )
    right = answers_match(texts, examples)
    return summarize_answers(texts, right), {"right": right}
