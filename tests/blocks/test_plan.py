"""Shares of a plan: none overlap, nothing is left out, and every rank comes to the same."""

import pytest

from qwen_precision.blocks import Item, Plan, plan_for
from qwen_precision.errors import UsageError
from qwen_precision.settings import Corpus, load_settings


def a_plan(prompts: int = 10, sources: tuple[str, ...] = ("a", "b"), block: int = 2, **settings: object) -> Plan:
    corpus = Corpus([f"text {n}" for n in range(prompts)], None, block)
    return plan_for(sources, None, load_settings(None, settings), corpus)


@pytest.mark.parametrize("of", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("sources", [("a",), ("a", "b", "c")])
def test_shares_are_stretches_of_the_list_that_make_all_of_it(of: int, sources: tuple[str, ...]) -> None:
    plan = a_plan(21, sources)
    shares = [plan.share(number, of) for number in range(of)]
    assert [item for share in shares for item in share] == list(plan.items())
    fair = len(list(plan.items())) / of
    assert all(abs(len(share) - fair) <= 1 for share in shares)


def test_a_rank_reads_one_checkpoint_where_there_are_as_many_ranks() -> None:
    plan = a_plan(16, ("a", "b", "c", "d"))
    assert [{item.source for item in plan.share(number, 4)} for number in range(4)] == [{"a"}, {"b"}, {"c"}, {"d"}]


def test_a_long_prompt_counts_as_long_in_a_share() -> None:
    corpus = Corpus(["x" * 30_000, *["y"] * 9], None, 1)
    plan = plan_for(["a"], None, load_settings(None, {}), corpus)
    assert [len(plan.share(number, 2)) for number in range(2)] == [1, 9]


def test_the_owner_of_a_block_is_whose_share_it_is_in() -> None:
    plan = a_plan()
    owner = plan.owner(3)
    assert all(item in plan.share(number, 3) for item, number in owner.items()) and len(owner) == 10


def test_a_record_is_named_by_weights_prompts_settings_and_version() -> None:
    plan = a_plan(dtypes=["fp16"])
    block = plan.blocks[0]
    key = plan.key("w", block)
    assert key == a_plan(dtypes=["fp16"]).key("w", block)
    others = {
        plan.key("v", block),
        plan.key("w", plan.blocks[1]),
        a_plan(dtypes=["bf16"]).key("w", block),
        a_plan(dtypes=["fp16"], max_tokens=3).key("w", block),
        plan.model_copy(update={"version": "9"}).key("w", block),
    }
    assert len(others) == 5 and key not in others


def test_where_and_how_weights_are_kept_names_no_record() -> None:
    plain = a_plan(device="cuda:0", memory="resident", fail_on="risk")
    assert plain.key("w", plain.blocks[0]) == a_plan(device="cuda:3").key("w", plain.blocks[0])


def test_a_plan_reads_back_as_it_was_written() -> None:
    plan = a_plan()
    assert Plan.model_validate_json(plan.text()) == plan and Plan.model_validate_json(plan.text()).name == plan.name


@pytest.mark.parametrize(("limit", "parts"), [(None, 64), (40, 2), (8, 1), (100_000, 64)])
def test_a_sweep_is_cut_into_parts_that_ranks_share(limit: int | None, parts: int) -> None:
    plan = a_plan(3, ("a",), sweep="first-token", sweep_limit=limit)
    mine = [block for block in plan.blocks if block.kind == "sweep"]
    assert [(block.first, block.count) for block in mine] == [(n, parts) for n in range(parts)]
    assert len({plan.key("w", block) for block in plan.blocks}) == len(plan.blocks)


def test_what_no_ranks_can_share_is_a_sentence() -> None:
    with pytest.raises(UsageError, match="--sweep length"):
        a_plan(sweep="length")
    with pytest.raises(UsageError, match="a is there twice"):
        a_plan(sources=("a", "b", "a"))


def test_a_block_says_which_prompts_it_is() -> None:
    assert [Item("a", block).block.said for block in a_plan(3).blocks] == ["prompts 1 to 2", "prompt 3"]
