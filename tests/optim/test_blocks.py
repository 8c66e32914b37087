"""Block-wise LoRA-Pro against dense least squares, and what blocks do to alignment."""

import pytest
import torch

from tangora import InputError, LoRAPro
from tangora.geometry.blocks import block_velocity
from tangora.geometry.tangent import Cotangent, coordinates, frame
from tests.cases import random_case
from tests.optim.problems import Quadratic, Training
from tests.reference import dense
from tests.tolerances import assert_close

quiet = pytest.mark.filterwarnings("ignore:step .* changes A of")


def motion(case, blocks):
    at = frame(case.A, case.B)
    H_A, H_B = block_velocity(at, coordinates(at, Cotangent(case.B.T @ case.g, case.g @ case.A.T)), blocks)
    return H_A, H_B, case.B @ H_A + H_B @ case.A


def projected_on_its_own(case, rows, columns):
    """Velocity of one block by least squares over its entries, one column of the system for each."""
    (m, n), r = case.g.shape, len(case.A)
    system, entries = [], []
    for factor, shape in (("A", (r, n)), ("B", (m, r))):
        for i in range(shape[0]):
            for j in range(shape[1]):
                if (j if factor == "A" else i) in (columns if factor == "A" else rows):
                    H = torch.zeros(shape, dtype=case.g.dtype)
                    H[i, j] = 1
                    system.append((case.B @ H if factor == "A" else H @ case.A).flatten())
                    entries.append((factor, i, j))
    found = torch.linalg.lstsq(torch.stack(system, 1), case.g.flatten()[:, None]).solution[:, 0]
    H_A, H_B = torch.zeros_like(case.A), torch.zeros_like(case.B)
    for value, (factor, i, j) in zip(found, entries, strict=True):
        (H_A if factor == "A" else H_B)[i, j] = value
    return H_A, H_B


@pytest.mark.parametrize("blocks", [2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 9, 2), (9, 13, 3)])
def test_each_block_is_projected_on_its_own(shape, blocks):
    case = random_case(*shape, seed=1)
    H_A, H_B, _ = motion(case, blocks)
    rows, columns = (torch.arange(size).tensor_split(blocks) for size in case.g.shape)
    for some_rows, some_columns in zip(rows, columns, strict=True):
        wanted_A, wanted_B = projected_on_its_own(case, some_rows.tolist(), some_columns.tolist())
        assert_close(H_A[:, some_columns], wanted_A[:, some_columns], 1e-8)
        assert_close(H_B[some_rows], wanted_B[some_rows], 1e-8)


def test_one_block_moves_the_weight_by_the_projection():
    case = random_case(9, 7, 3, seed=2)
    assert_close(motion(case, 1)[2], dense.project(case.A, case.B, case.g), 1e-10)


def test_blocks_are_aligned_less_than_the_whole():
    kept = []
    for blocks in (1, 2, 8):
        shares = []
        for seed in range(8):
            case = random_case(24, 16, 4, seed=seed)
            moved = motion(case, blocks)[2]
            shares.append(float((moved * case.g).sum() / (moved.norm() * case.g.norm())))
        kept.append(sum(shares) / len(shares))
    assert kept[0] > max(kept[1:]) + 0.01


@quiet
@pytest.mark.parametrize("moments", ["weight", "factor", None])
def test_it_trains(moments):
    training = Training("lora-pro-weight", moments=moments, blocks=2)
    before = training.loss()
    training.step(30)
    assert training.loss() < 0.9 * before


@pytest.mark.parametrize(
    "options", [{"blocks": 0}, {"sparsity": 0.1}, {"moments": None, "retraction": "auto"}]
)
def test_what_cannot_be_cut_is_refused(options):
    with pytest.raises(InputError, match="blocks"):
        LoRAPro(Quadratic(9, 6, 3, seed=2).model, lr=1e-2, **{"blocks": 2, **options})
