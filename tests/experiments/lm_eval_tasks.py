"""Small tasks of lm-eval in a folder: sums with choices, and programs of which it is known which ones pass."""

import json
from pathlib import Path

import pytest

from tangora._checks import InputError
from tangora.training.sandbox import run_program

_SUMS = """
task: tiny_sums
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""

_FEW = """
task: tiny_few
output_type: multiple_choice
fewshot_split: test
num_fewshot: 2
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

_GROUP = """
group: tiny_group
task: [tiny_sums, tiny_few]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""

# lm-eval's own humaneval, on other problems; what is generated ends with the line
_CODE = """
task: tiny_code
unsafe_code: true
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\\ncheck({{entry_point}})"
metric_list:
  - metric: !function lm_eval.tasks.humaneval.utils.pass_at_k
    aggregation: mean
    higher_is_better: true
    k: [1]
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
  do_sample: false
filter_list:
  - name: create_test
    filter:
      - function: custom
        filter_fn: !function lm_eval.tasks.humaneval.utils.build_predictions
"""

_OWN_WAY = """
task: tiny_unprotected
unsafe_code: true
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}"
metric_list:
  - metric: exact_match
"""

_OWN_JUDGE = (
    _OWN_WAY.replace("tiny_unprotected", "tiny_own_judge") + "process_results: !function builtins.exec\n"
)

RIGHT = [True, False, True, True]
"""Which of the programs of ``tiny_code`` pass."""


def skip_without_sandbox() -> None:
    """Skip a test that runs programs where they cannot be isolated."""
    try:
        run_program("")
    except InputError as error:
        pytest.skip(str(error))


def write_tasks(folder: Path) -> Path:
    """Write the tasks, their data and where a program would leave a trace; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [
        {"question": f"{a} + {b} =", "choices": [str(a), str(a + b), "red"], "answer": 1}
        for a in range(4)
        for b in range(1, 4)
    ]
    trace = folder / "has_run"
    leave = f"    try:\n        open({str(trace)!r}, 'w').close()\n    except OSError:\n        pass\n"
    programs = [
        {
            # whatever is generated stands in a comment
            "prompt": f"def sum(a, b):\n{leave}    return a + b + {int(not right)}\n#",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3",
            "entry_point": "sum",
        }
        for right in RIGHT
    ]
    for name, task, rows in (
        ("sums", _SUMS, sums),
        ("few", _FEW, sums),
        ("code", _CODE, programs),
        ("unprotected", _OWN_WAY, programs),
        ("own_judge", _OWN_JUDGE, programs),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(
            task + "".join(f"{key}: {json.dumps(value)}\n" for key, value in source.items())
        )
    (folder / "group.yaml").write_text(_GROUP)
    return folder
