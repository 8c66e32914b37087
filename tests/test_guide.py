"""The Python guide's scripts run as they are, here with few steps and examples."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
SMALLER = {
    "max_steps=30": "max_steps=1",
    '"steps": 30': '"steps": 1',
    "per_device_train_batch_size=16": "per_device_train_batch_size=4",
    "max_length=128": "max_length=16",
    "[0, 1, 2], **settings": "[0], learning_rates={'lora': [1e-3], 'tangent': [1e-3]}, **settings",
    '"num_train": 400': '"max_length": 16, "num_train": 40',
    '"num_validation": 100': '"num_validation": 10',
    '"num_test": 100': '"num_test": 10',
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_a_script_of_the_guide_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = BLOCKS[index]
    for given, smaller in SMALLER.items():
        script = script.replace(given, smaller)
    exec(compile(script, str(GUIDE), "exec"), {"__name__": "guide"})
    wanted = (
        ["bbc-adapter/adapter_config.json"]
        if index == 0
        else ["bbc-run/record.json", "bbc-merged/config.json"]
    )
    assert all((tmp_path / name).is_file() for name in wanted)
