"""Whose share a process takes, by what its launcher set."""

import pytest

from qwen_precision.errors import UsageError
from qwen_precision.settings import rank_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "3"}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("shard", "environment", "number", "of"),
    [
        (None, {}, 0, 1),
        ("2/8", {}, 1, 8),
        (None, TORCHRUN, 3, 4),
        (None, ARRAY, 2, 3),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}, 2, 3),
        (None, STEP, 1, 2),
        (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 1, 2),
        (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, 1, 2),
        (None, {**STEP, "SLURM_STEP_ID": ""}, 0, 1),  # the job's own script, which is no task of it
        (None, {**STEP, **TORCHRUN}, 3, 4),  # torchrun started by srun
        ("2/2", TORCHRUN, 7, 8),
        (None, {**ARRAY, **TORCHRUN}, 11, 12),
    ],
)
def test_a_rank_is_what_its_launcher_says(shard: str | None, environment: dict[str, str], number: int, of: int) -> None:
    rank = rank_of(shard, environment)
    assert (rank.number, rank.of) == (number, of)


def test_sources_that_multiply_leave_no_share_out_and_give_none_twice() -> None:
    launched = [{**TORCHRUN, "RANK": str(n)} for n in range(4)]
    shares = [rank_of(f"{i}/3", environment) for i in (1, 2, 3) for environment in launched]
    assert sorted(rank.number for rank in shares) == list(range(12)) and {rank.of for rank in shares} == {12}


def test_the_card_is_that_of_the_rank_on_its_machine() -> None:
    assert rank_of(None, TORCHRUN).local == 1 and rank_of(None, TORCHRUN).launched
    assert rank_of(None, STEP).local == 1 and rank_of(None, {}).local is None


def test_what_was_taken_is_said_with_where_it_is_from() -> None:
    assert rank_of("2/2", TORCHRUN).said == "share 8 of 8 (--shard 2/2, then RANK 3 of 4)"


@pytest.mark.parametrize(
    ("shard", "environment", "word"),
    [
        ("0/8", {}, "--shard 0/8"),
        ("9/8", {}, "--shard 9/8"),
        ("2-8", {}, "--shard 2-8"),
        (None, {"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        (None, {"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2"),
        (None, {"RANK": "1"}, "RANK is set and WORLD_SIZE is not"),
        (None, {"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        (None, {"SLURM_PROCID": "1"}, "SLURM_PROCID is set and SLURM_NTASKS is not"),
        (None, {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}, "SLURM_ARRAY_TASK_ID 9"),
        (None, {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_STEP": "4"}, "SLURM_ARRAY_TASK_ID 5"),
    ],
)
def test_numbers_that_are_no_rank_are_a_sentence(shard: str | None, environment: dict[str, str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        rank_of(shard, environment)
