"""A run's weights at chosen steps, on the disk: one safetensors file per step, read one layer at a time."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tangora._checks import InputError
from tangora._folders import RunFolder
from tangora.diagnostics.motion import Track, WeightTrack, fingerprint

_NAME = re.compile(r"step-(\d{6,})\.safetensors")


def write_snapshot(folder: Path, step: int, tracks: Sequence[WeightTrack], base: str) -> Path:
    """Write the weights of a model that is trained whole to ``step-000010.safetensors``, whole or not at all.

    Args:
        base: `fingerprint` of the weights before training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.safetensors"
    partial = path.with_suffix(".partial")
    tensors = {track.name: track.weight().contiguous().cpu() for track in tracks}
    save_file(tensors, partial, metadata={"format": "pt", "step": str(step), "base": base})
    os.replace(partial, path)
    return path


class Reference:
    """The snapshots of a full fine-tuning run, in ``snapshots/`` of its output folder.

    Raises:
        InputError: If there are none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = ((_NAME.fullmatch(path.name), path) for path in RunFolder(folder).snapshots.glob("step-*"))
        self._files = {int(match[1]): path for match, path in files if match}
        if not self._files:
            raise InputError(
                f"reference {folder} holds no snapshots: it must be the output of tangora train --recipe full "
                "--measure-every K"
            )

    def check_steps(self, steps: Iterable[int]) -> None:
        """Raise `InputError` unless there are weights for all steps to be compared; 0 is always there."""
        missing = next((step for step in steps if step and step not in self._files), None)
        if missing is not None:
            known = ", ".join(str(step) for step in sorted(self._files)[:5])
            more = ", ..." if len(self._files) > 5 else ""
            raise InputError(
                f"reference {self.folder} has no snapshot of step {missing}, only of {known}{more}: "
                "choose measure_every and steps that match"
            )

    def check_layers(self, tracks: Sequence[Track]) -> None:
        """Raise `InputError` unless the weights are of the same layers of the same model."""
        first = next(iter(self._files.values()))
        try:
            with safe_open(first, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                base = (file.metadata() or {}).get("base")
        except SafetensorError as error:
            raise InputError(f"{first} cannot be read: {error}") from error
        for track in tracks:
            if track.name not in shapes:
                raise InputError(
                    f"reference {self.folder} has no layer {track.name}: target_modules must be the same there"
                )
            if shapes[track.name] != track.shape:
                raise InputError(
                    f"reference {self.folder} is of another model: {track.name} has shape {shapes[track.name]} there "
                    f"and {track.shape} here"
                )
        if len(shapes) != len(tracks):
            raise InputError(
                f"reference {self.folder} has {len(shapes)} layers and this run {len(tracks)}: target_modules must be "
                "the same there"
            )
        if base != fingerprint(tracks):
            raise InputError(f"reference {self.folder} is of another model: its base weights differ")

    def weight(self, step: int, name: str) -> Tensor:
        """Read one weight, ``m x n``, on the CPU; ``step`` is at least 1."""
        with safe_open(self._files[step], framework="pt") as file:
            return file.get_tensor(name)
