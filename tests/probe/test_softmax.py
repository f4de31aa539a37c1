"""A softmax in a dtype against one in float32, on planted logits whose true numbers are known from float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qwen_precision.probe import logprobs
from qwen_precision.probe.softmax import largest, of_positions, of_tokens, rounded_chances
from qwen_precision.torch_dtypes import torch_dtype

NARROW = pytest.mark.parametrize("dtype", ["fp16", "bf16"])
STEP = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Half a step of a dtype at 1."""


def some_logits(dtype: str, rows: int = 64, vocabulary: int = 5000, size: float = 4.0) -> tuple[Tensor, Tensor]:
    """``[rows, vocabulary]`` logits of a dtype and a next token of each."""
    dice = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=dice).mul(size).to(torch_dtype(dtype))
    return logits, torch.randint(0, vocabulary, (rows,), generator=dice)


def true_logprobs(logits: Tensor, ids: Tensor) -> np.ndarray:
    """In float64, with numpy."""
    wide = logits.double().numpy()
    top = wide.max(axis=-1, keepdims=True)
    sums = np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0]
    return np.asarray(wide[np.arange(len(wide)), ids.numpy()] - sums)


def measured(logits: Tensor, ids: Tensor, dtype: str, real: Tensor | None = None) -> list[float]:
    """``of_tokens`` of one row of a prompt."""
    given = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, None])[:, 0][None]
    mask = torch.ones_like(given, dtype=torch.bool) if real is None else real[None]
    return [float(each) for each in of_tokens(given, mask, torch_dtype(dtype))[0]]


def positions(logits: Tensor) -> list[list[float]]:
    return [[float(each) for each in row] for row in of_positions(logits)]


# -- log-probabilities and the loss --------------------------------------------------------------------------------


@NARROW
def test_the_error_of_a_log_probability_is_that_against_float64(dtype: str) -> None:
    logits, ids = some_logits(dtype)
    true = true_logprobs(logits, ids)
    rounded = torch.from_numpy(true).to(torch_dtype(dtype)).double().numpy()
    count, largest, rms, loss, in_dtype, off, bad, _ = measured(logits, ids, dtype)
    assert (count, bad) == (64, 0) and off == pytest.approx(abs(in_dtype - loss))
    assert largest == pytest.approx(np.abs(rounded - true).max(), abs=1e-5)
    assert rms == pytest.approx(math.sqrt(((rounded - true) ** 2).mean()), abs=1e-5)
    assert loss == pytest.approx(-true.mean(), abs=1e-5)


@NARROW
def test_the_loss_in_the_dtype_is_a_number_of_the_dtype_near_the_mean_of_what_was_rounded(dtype: str) -> None:
    logits, ids = some_logits(dtype)
    true = true_logprobs(logits, ids)
    rounded = torch.from_numpy(true).to(torch_dtype(dtype)).double().numpy()
    in_dtype = measured(logits, ids, dtype)[4]
    assert torch.tensor(in_dtype).to(torch_dtype(dtype)).item() == in_dtype
    assert abs(in_dtype + rounded.mean()) <= STEP[dtype] * abs(in_dtype)


@NARROW
def test_no_cross_entropy_of_torch_in_the_dtype_is_nearer_than_what_is_said_of_it(dtype: str) -> None:
    """The CPU's rounds more often than once: what is measured is the least that it can be off."""
    logits, ids = some_logits(dtype, rows=2000, vocabulary=500)
    true = true_logprobs(logits, ids)
    ours = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, None])[:, 0].double().numpy()
    least = math.sqrt(((ours - true) ** 2).mean())
    rms, in_dtype = (measured(logits, ids, dtype)[place] for place in (2, 4))
    assert 0 < rms <= least * 1.001
    theirs = cross_entropy(logits, ids).item()
    assert abs(in_dtype + true.mean()) <= abs(theirs + true.mean()) + STEP[dtype] * abs(in_dtype)


@NARROW
def test_tokens_behind_padding_are_all_that_count(dtype: str) -> None:
    logits, ids = some_logits(dtype)
    real = torch.arange(64) >= 24
    spoiled = logits.clone()
    spoiled[:24] = math.nan
    assert measured(spoiled, ids, dtype, real) == measured(logits[24:], ids[24:], dtype)


def test_a_spread_beyond_fp16_gives_an_infinite_log_probability_that_the_upcast_does_not() -> None:
    logits = torch.zeros(2, 8, dtype=torch.float16)
    logits[:, 0], logits[:, 1] = 60_000.0, -60_000.0
    assert torch.isinf(torch.log_softmax(logits, dim=-1)[:, 1]).all()  # torch's own does
    count, _, _, loss, in_dtype, _, bad, zero = measured(logits, torch.tensor([1, 0]), "fp16")
    assert (count, loss, bad) == (2, 60_000.0, 1) and in_dtype == math.inf
    assert zero == 0  # in float32 its probability is zero, too
    assert measured(logits.bfloat16(), torch.tensor([1, 0]), "bf16")[6] == 0


@pytest.mark.parametrize(("dtype", "below", "zero"), [("fp16", 16.0, 0), ("fp16", 18.0, 1), ("bf16", 18.0, 0)])
def test_a_probability_below_half_the_least_number_is_zero_and_its_logarithm_infinite(
    dtype: str, below: float, zero: int
) -> None:
    logits = torch.full((1, 8), -100.0, dtype=torch_dtype(dtype))
    logits[0, 0], logits[0, 1] = 0.0, -below
    assert torch.isinf(torch.softmax(logits, dim=-1)[0, 1].log()).item() == bool(zero)
    assert measured(logits, torch.tensor([1]), dtype)[7] == zero


# -- whole distributions -------------------------------------------------------------------------------------------


@NARROW
def test_the_mass_lost_is_one_less_the_sum_of_what_a_softmax_in_the_dtype_gives(dtype: str) -> None:
    logits, _ = some_logits(dtype)
    true = 1 - torch.softmax(logits.double(), dim=-1).to(torch_dtype(dtype)).double().sum(dim=-1)
    lost = torch.tensor([row[1] for row in positions(logits)], dtype=torch.float64)
    assert lost.abs().max() > 1e-5  # something is
    assert torch.allclose(lost, true, atol=2e-5)  # float32 rounds a few to the other side


def test_flat_logits_of_a_large_vocabulary_lose_all_of_their_mass_by_hand_and_none_upcast() -> None:
    """In fp16 the sum of 70,000 ones is infinite, and everything over it is zero."""
    fine, lost, _, _, by_hand, overflows = positions(torch.zeros(1, 70_000, dtype=torch.float16))[0]
    assert (fine, by_hand, overflows) == (1, 1, 0) and abs(lost) < 0.01
    assert abs(positions(torch.zeros(1, 70_000, dtype=torch.bfloat16))[0][4]) < 0.01


@pytest.mark.parametrize(("largest", "overflows"), [(11.0, 0), (11.1, 1)])
def test_exp_of_a_logit_overflows_from_the_logarithm_of_65520_on(largest: float, overflows: int) -> None:
    logits = torch.tensor([[largest, 0.0, 0.0]], dtype=torch.float16)
    assert positions(logits)[0][5] == overflows and positions(logits.bfloat16())[0][5] == 0


def test_two_tokens_that_become_equal_share_a_rank_and_the_lower_id_comes_first() -> None:
    """Near 0 fp16 tells logits apart whose probabilities it does not."""
    logits = torch.zeros(1, 4, dtype=torch.float16)
    logits[0, 2] = 2.0**-20  # the likeliest, by less than fp16 has at a quarter
    logits[0, 3] = -8.0
    assert positions(logits)[0][2:4] == [2, 1]  # ids 0 and 1 were second, and are first now
    logits[0, 2] = 0.5
    assert positions(logits)[0][2:4] == [0, 0]


@NARROW
def test_logits_that_are_equal_in_the_dtype_are_a_tie_and_a_difference_that_the_softmax_lost_is_a_change(
    dtype: str,
) -> None:
    tie, lost, kept = (torch.full((1, 600), -8.0, dtype=torch_dtype(dtype)) for _ in range(3))
    tie[0, [5, 3]] = 2.0**-4
    lost[0, 5], lost[0, 3] = 2.0**-4 * (1 + 2 * STEP[dtype]), 2.0**-4  # neighbours in the dtype
    kept[0, 5], kept[0, 3] = 2.0**-3, 2.0**-4
    assert len(torch.softmax(lost, dim=-1)[0, [5, 3]].unique()) == 1  # id 5 was likelier; now 3 is, by its id
    assert [positions(logits)[0][2:4] for logits in (tie, lost, kept)] == [[0, 0], [1, 1], [0, 0]]


@NARROW
@pytest.mark.parametrize(("steps", "changes"), [(0.4, [0, 0]), (1.0, [1, 1])])
def test_logits_within_half_a_step_of_the_dtype_are_a_tie_also_where_a_model_gives_them_in_float32(
    dtype: str, steps: float, changes: list[int]
) -> None:
    logits = torch.full((1, 600), -8.0)
    logits[0, 5], logits[0, 3] = 2.0**-4 * (1 + steps * 2 * STEP[dtype]), 2.0**-4
    found = rounded_chances(torch.softmax(logits, dim=-1).to(torch_dtype(dtype)), logits, *largest(logits))
    assert [int(found.ranks), int(found.changed)] == changes


def test_of_more_than_ten_that_became_equal_the_lowest_id_of_the_whole_vocabulary_is_the_likeliest() -> None:
    logits = torch.full((1, 300), -8.0, dtype=torch.bfloat16)
    logits[0, 20:40] = torch.arange(20, 0, -1).mul(2.0**-16).bfloat16()
    logits[0, 7] = 2.0**-17  # the least of 21 that bf16 gives one probability
    assert len(torch.softmax(logits, dim=-1)[0, [7, *range(20, 40)]].unique()) == 1
    assert positions(logits)[0][3] == 1
    logits[0, 7] = -8.0
    assert positions(logits)[0][3] == 0


def test_ranks_are_those_of_a_count_in_float64() -> None:
    logits, _ = some_logits("bf16", rows=32, vocabulary=300, size=0.01)
    chances = torch.softmax(logits.double(), dim=-1)
    changes = []
    for wide, narrow in zip(chances, chances.bfloat16().double(), strict=True):
        ten = wide.argsort(descending=True)[:10]
        changes.append(sum(int((wide > wide[each]).sum() != (narrow > narrow[each]).sum()) for each in ten))
    assert sum(changes) > 0
    # A token outside of the ten that rises to them changes nobody's rank but its own.
    assert [row[2] for row in positions(logits)] == changes


@NARROW
def test_a_row_that_is_bad_in_float32_too_is_not_fine(dtype: str) -> None:
    logits, _ = some_logits(dtype, rows=3)
    logits[0, 5], logits[1, 5], logits[2, 5] = math.nan, math.inf, -math.inf
    assert [row[0] for row in positions(logits)] == [0, 0, 1]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_rows_summed_a_few_at_a_time_are_the_logsumexp_of_torch(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (torch.randn(2, 9, 500, generator=torch.Generator().manual_seed(0)) * 8).to(torch_dtype(dtype))
    logits[0, 1], logits[0, 2, 5], logits[0, 3, 7], logits[1, 3, :10] = -math.inf, math.inf, math.nan, -math.inf
    wanted = torch.logsumexp(logits.float(), dim=-1)
    for at_once in (1, 1200, 1 << 20):
        monkeypatch.setattr(logprobs, "_AT_ONCE", at_once)
        torch.testing.assert_close(logprobs._summed(logits), wanted, equal_nan=True)
