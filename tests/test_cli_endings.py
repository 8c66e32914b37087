"""How commands end: interrupted, already finished, with a proof that fails, with failed runs."""

import io
import os
import re
import signal

import pytest
from rich.console import Console

from tangora._checks import InputError
from tangora.cli import output
from tangora.experiments.comparison import pool
from tangora.experiments.folders import locked
from tangora.experiments.run.saving import Proof
from tests.experiments.small import after_step, ctrl_c, write_classifier

pytestmark = pytest.mark.messages


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(call):
    """Call the command line; return exit code, output on one line, and errors."""

    def run(*arguments):
        code, out, err = call(*arguments)
        return code, " ".join(out.split()), err

    return run


def flags(small, output, **changes):
    values = {**small, "batch_size": 4, "output": output, **changes}
    return [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]


def interrupted_at(monkeypatch, step, how):
    """Let a signal, or Ctrl-C, arrive after a step of training."""
    monkeypatch.setattr("tangora.cli.commands.bar_of", lambda *_, **__: after_step(step, how))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("how", "expected"), [(ctrl_c, 130), (terminate, 143)])
def test_an_interrupted_training_says_from_where_it_goes_on(
    call, small, tmp_path, monkeypatch, how, expected
):
    arguments = ["train", *flags(small, tmp_path / "out", steps=4, save_every=2), "--recipe=lora"]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 3, how)
        code, _, err = call(*arguments)
    assert (code, err) == (expected, "interrupted; the same command continues from step 2\n")
    assert signal.getsignal(signal.SIGTERM) is before
    code, out, _ = call(*arguments)
    assert code == 0
    assert "continues from step 2" in out
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert "already finished" in out


def test_a_second_command_leaves_the_checkpoints_of_the_first(call, small, tmp_path):
    written = tmp_path / "out" / "checkpoints" / "checkpoint-2"  # not whole yet
    written.mkdir(parents=True)
    (tmp_path / "out" / "settings.json").write_text("{}")
    with locked(tmp_path / "out"):
        code, _, err = call("train", *flags(small, tmp_path / "out", steps=4, save_every=2), "--recipe=lora")
    assert code == 2
    assert "in use" in err
    assert written.exists()


def test_an_interrupted_training_without_checkpoints_says_so(call, small, tmp_path, monkeypatch):
    interrupted_at(monkeypatch, 1, ctrl_c)
    code, _, err = call("train", *flags(small, tmp_path / "out", steps=2), "--recipe=lora")
    assert (code, err) == (
        130,
        "interrupted; the same command starts from the beginning; --save-every keeps checkpoints\n",
    )


ONE = ["--recipes=lora", "--learning-rates=1e-3", "--seeds=0"]


def test_an_interrupted_comparison_says_how_much_is_done(call, small, tmp_path, monkeypatch):
    arguments = ["compare", *flags(small, tmp_path / "out", steps=2), *ONE[:2], "--seeds=0,1"]

    waited = pool.Pool.wait

    def wait(self):
        if (tmp_path / "out" / "records").is_dir():
            raise KeyboardInterrupt
        return waited(self)

    with monkeypatch.context() as patch:
        patch.setattr(pool.Pool, "wait", wait)
        code, _, err = call(*arguments)
    told, ended = err.splitlines()  # without a terminal, a line for each run
    assert re.fullmatch(r"1 of 2 runs: lora-lr0\.001-seed0 finished \(0:00:\d\d\)", told)
    assert (code, ended) == (130, "interrupted; the same command goes on: 1 of 2 runs are done")
    assert call(*arguments)[0] == 0
    code, out, _ = call(*arguments)
    assert code == 0
    assert "already finished" in out


def test_a_proof_that_fails_says_so(call, small, tmp_path, monkeypatch):
    monkeypatch.setattr("tangora.experiments.compare.verify_adapter", lambda *_: Proof(0.12, 1e-3))
    code, out, _ = call("compare", *flags(small, tmp_path / "out", steps=2), *ONE)
    assert code == 1
    assert "proof failed" in out
    assert "1.2e-01" in out


def test_a_comparison_with_failed_runs_names_retry(call, small, tmp_path, monkeypatch):
    arguments = ["compare", *flags(small, tmp_path / "out", steps=2), "--seeds=0", "--learning-rates=1e-3"]
    arguments.append("--recipes=lora,tangent")

    def record(self, run):
        if run.trial.settings.recipe == "tangent":
            run.folder.record_of(run.trial.id).unlink(missing_ok=True)
            run.process.kill()
        return recorded(self, run)

    recorded = pool.Pool._record
    with monkeypatch.context() as patch:
        patch.setattr(pool.Pool, "_record", record)
        code, out, _ = call(*arguments)
    assert code == 1
    assert "--retry runs them again" in out
    assert call(*arguments)[0] == 1
    assert call(*arguments, "--retry")[0] == 0


def test_too_little_memory_is_called_so(small, tmp_path, call):
    code, _, err = call("compare", *flags(small, tmp_path / "out", steps=2), *ONE, "--max-memory=0.01")
    assert code == 2
    told, error = err.splitlines()
    assert "1 of 1 runs: lora-lr0.001-seed0 out of memory (" in told
    assert "out of memory" in error
    assert "--retry" in error


def test_a_report_waits_for_no_one(call, small, tmp_path):
    from tangora.experiments.folders import locked

    assert call("compare", *flags(small, tmp_path / "out", steps=2), *ONE)[0] == 0
    with locked(tmp_path / "out"):
        for arguments in (
            ["report", tmp_path / "out"],
            ["compare", *flags(small, tmp_path / "out", steps=2), *ONE],
        ):
            code, _, err = call(*arguments)
            assert code == 2
            assert "is in use by another tangora process" in err
    assert call("report", tmp_path / "out")[0] == 0


def test_lines_tell_of_progress_where_no_terminal_shows_bars(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with output.progress_bars() as bars:
        follow = output.bar_of(bars, "lora")
        for second in range(0, 70, 10):
            now[0] = second
            follow("training", second, 100)
    out, err = capsys.readouterr()
    assert err.splitlines() == ["lora: training: 30 of 100 (0:00:30)", "lora: training: 60 of 100 (0:01:00)"]
    assert not out.strip()
    monkeypatch.setattr(output.console, "quiet", True)  # of the other processes of a launcher
    now[0] = 1000
    follow("training", 99, 100)
    assert capsys.readouterr().err == ""


def test_bars_vanish_before_an_error(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=written, force_terminal=True))

    def fail():
        with output.progress_bars() as bars:
            output.bar_of(bars, "lora-ga")
            raise InputError("no")

    with pytest.raises(InputError):
        fail()
    assert "lora-ga" not in written.getvalue().rsplit("\r", 1)[-1]
    with output.progress_bars() as bars:
        output.bar_of(bars, "lora-one")("", 1, 1)
    assert "lora-one" in written.getvalue()
