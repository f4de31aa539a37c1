"""Masks are known for what they are however they were made; an overflow beside what they mask is still seen."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qwen_precision

HALF = torch.float16
LOWEST = torch.finfo(HALF).min
AFTER = torch.arange(4) > torch.arange(4)[:, None]
"""Causal: what a token must not see."""


def multiplied_in_place() -> Tensor:
    """BLOOM, GPT-J, Jamba, Zamba, … before transformers 5."""
    mask = torch.full((4, 4), fill_value=LOWEST, dtype=HALF)
    mask = torch.triu(mask, diagonal=1)
    mask *= torch.arange(4) > torch.arange(4).reshape(-1, 1)
    mask = mask[None, None, :, :].expand(2, 1, -1, -1).clone()
    nowhere = mask[:, :, :, :3] + torch.ones(1, 1, 1, 3, dtype=torch.int64) == 0
    mask[:, :, :, :3] = mask[:, :, :, :3].masked_fill(nowhere, LOWEST)
    return mask[0, 0]


def filled_in_place_and_cast() -> Tensor:
    """TrOCR, XGLM: fp16's minimum in fp32, with zeros filled in."""
    mask = torch.full((4, 4), LOWEST)
    mask.masked_fill_(~AFTER, 0)
    return mask.to(HALF)


def cut_out_of_ones() -> Tensor:
    """ProphetNet."""
    mask = torch.ones(2, 4, 4, dtype=HALF) * LOWEST
    mask[0].triu_(1)
    mask[1].fill_diagonal_(0, wrap=False)
    return mask.detach().clone()[0]


def turned_round() -> Tensor:
    """BERT: ones where it may look."""
    return (1.0 - (~AFTER).to(HALF)) * LOWEST


def written_by_index() -> Tensor:
    mask = torch.zeros(4, 4, dtype=HALF)
    mask[AFTER] = float("-inf")
    return mask


def scattered() -> Tensor:
    mask = torch.full((4, 4), float("-inf"), dtype=HALF)
    for token in range(4):
        mask[token].scatter_(0, torch.arange(token + 1), 0.0)
    return mask


def padded() -> Tensor:
    mask = nn.functional.pad(torch.zeros(4, 1, dtype=HALF), (0, 3), value=LOWEST)
    mask[:, 1:] *= AFTER[:, 1:]
    return mask


def chosen_among_two() -> Tensor:
    return torch.where(AFTER, torch.full((4, 4), LOWEST, dtype=HALF), torch.zeros(4, 4, dtype=HALF))


WAYS = [
    multiplied_in_place,
    filled_in_place_and_cast,
    cut_out_of_ones,
    turned_round,
    written_by_index,
    scattered,
    padded,
    chosen_among_two,
]


def largest(work: Callable[[Tensor], Tensor], scores: Tensor) -> float:
    """The largest magnitude that was read while ``work`` ran."""

    class Scores(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return work(scores)

    model = Scores()
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(scores)
    return max(reading.abs_max for reading in readings)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_mask_is_no_reading_however_it_was_made(way: Callable[[], Tensor]) -> None:
    scores = torch.full((4, 4), -20.0, dtype=HALF)
    assert largest(lambda scores: torch.softmax((scores * 1.0 + way()) * 0.5, dim=-1), scores) <= 20.0


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("row", "column", "seen"), [(3, 0, True), (0, 0, True), (2, 2, True), (0, 3, False)])
def test_an_overflow_is_seen_where_the_mask_lets_look_and_only_there(
    row: int, column: int, seen: bool, way: Callable[[], Tensor]
) -> None:
    """Of the very size of a mask, and infinite."""
    for size in (LOWEST, -40000.0):
        scores = torch.zeros(4, 4, dtype=HALF)
        scores[row, column] = size

        def work(scores: Tensor) -> Tensor:
            return torch.softmax((way() + scores) * 2.0, dim=-1)

        assert (largest(work, scores) == float("inf")) == seen


def test_a_real_value_at_the_limit_is_read() -> None:
    """A clamp puts scores to where masks are: they are not masks."""
    scores = torch.full((4, 4), -1e5).to(HALF)
    assert largest(lambda scores: torch.clamp(scores, min=LOWEST) + multiplied_in_place(), scores) == -LOWEST


@pytest.mark.parametrize(
    "write",
    [
        lambda mask, real: mask.copy_(real),
        lambda mask, real: mask[0].copy_(real[0]),
        lambda mask, real: mask.index_put_((torch.tensor([0]),), real[0]),
        lambda mask, real: mask.masked_scatter_(AFTER, real),
        lambda mask, real: torch.mul(real, 1.0, out=mask),
        lambda mask, real: mask.zero_().add_(real),
        lambda mask, real: mask.mul_(torch.zeros(4, 4, dtype=torch.bool)).sub_(real),
    ],
    ids=["copy", "row", "index", "scatter", "out", "zero", "product"],
)
def test_what_is_written_over_a_mask_is_read_again(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    def work(real: Tensor) -> Tensor:
        mask = torch.full((4, 4), LOWEST, dtype=HALF)
        write(mask, real)
        return mask * 2.0

    assert largest(work, torch.full((4, 4), 60000.0, dtype=HALF)) == float("inf")


def test_the_larger_of_a_mask_and_scores_is_a_mask_only_where_it_was_taken_from_one() -> None:
    """OPT and its kin: what a mask has driven to infinity is put back to the minimum."""
    floor = torch.full((4, 4), LOWEST, dtype=HALF)

    def work(scores: Tensor) -> Tensor:
        return torch.max(scores + (turned_round() + turned_round()), torch.full_like(floor, LOWEST)) * 2.0

    quiet, loud = torch.zeros(4, 4, dtype=HALF), torch.zeros(4, 4, dtype=HALF)
    loud[3, 0] = 60000.0
    assert largest(work, quiet) == 1.0 and largest(work, loud) == float("inf")


def test_a_product_with_a_large_number_is_no_mask() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]], dtype=HALF)
    assert largest(lambda scores: scores * -LOWEST, scores) == float("inf")


def test_a_mask_that_a_function_was_applied_to_is_none() -> None:
    def work(real: Tensor) -> Tensor:
        return torch.full((4, 4), LOWEST, dtype=HALF).tanh_().mul_(real) * 2.0

    assert largest(work, torch.full((4, 4), 60000.0, dtype=HALF)) == float("inf")


def test_a_row_written_into_masked_scores_changes_no_other_row() -> None:
    def work(scores: Tensor) -> Tensor:
        masked = scores.masked_fill(AFTER[0], LOWEST)  # one row of bools for all
        masked[3].copy_(scores[3])
        return masked * 2.0

    assert largest(work, torch.full((4, 4), 5.0, dtype=HALF)) == 10.0


def test_a_view_of_a_mask_knows_what_is_done_to_the_whole() -> None:
    def work(scores: Tensor) -> Tensor:
        mask = torch.full((4, 4), LOWEST, dtype=HALF)
        row = mask[0]
        mask *= AFTER
        return (row + scores[0]) * 2.0

    scores = torch.zeros(4, 4, dtype=HALF)
    assert largest(work, scores) == 0.0
    scores[0, 0] = 40000.0
    assert largest(work, scores) == float("inf")


def test_a_mask_stays_one_when_the_bools_it_was_made_of_are_used_for_something_else() -> None:
    def work(scores: Tensor) -> Tensor:
        after = AFTER.clone()
        masked = scores.masked_fill(after, LOWEST)
        after.zero_()
        return masked * 2.0

    assert largest(work, torch.full((4, 4), 5.0, dtype=HALF)) == 10.0


def test_a_mask_of_the_other_sign_is_one() -> None:
    assert largest(lambda scores: scores * 1.0 - (-turned_round()), torch.zeros(4, 4, dtype=HALF)) == 1.0
