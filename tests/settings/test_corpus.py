"""A corpus is read as a stream, in blocks that are the same on every machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.errors import UsageError
from qwen_precision.settings.corpus import BLOCK_TOKENS, DIGITS, Corpus
from qwen_precision.settings.prompts import PromptSpec, read_prompts

ROWS: list[Any] = [
    "a text",
    {"name": "named", "text": "上海"},
    {"chat": "hello"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]},
    {"ids": [5, 6, 7]},
    {"name": "two rows", "ids": [[5, 6], [7]]},
    {"batch": ["one", "two words"]},
]


def jsonl(folder: Path, rows: list[Any] = ROWS, name: str = "corpus.jsonl") -> Path:
    path = folder / name
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def listed(corpus: Corpus) -> list[PromptSpec]:
    return [spec for block in corpus.blocks for spec in corpus.prompts(block)]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_blocks_together_are_the_prompts_of_the_file_in_its_order(most: int, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_bytes("﻿first\r\n\r\nsecond\x0cthird\n  \nfourth".encode())
    for path in (jsonl(tmp_path), text):
        corpus = Corpus(None, str(path), most)
        assert listed(corpus) == read_prompts(None, str(path))
        assert max(block.count for block in corpus.blocks) <= most
        assert [block.first for block in corpus.blocks] == list(range(0, corpus.count, most))


def test_any_block_is_read_without_those_before_it(tmp_path: Path) -> None:
    corpus = Corpus(None, str(jsonl(tmp_path)), 2)
    assert [spec.name for spec in corpus.prompts(corpus.blocks[2])] == ["prompt 5", "two rows"]


def test_rows_may_hold_a_text_a_name_messages_or_token_ids(tmp_path: Path) -> None:
    specs = read_prompts(None, str(jsonl(tmp_path)))
    assert [spec.name for spec in specs][:3] == ["prompt 1", "named", "prompt 3"]
    assert specs[3].templated and specs[4].given_ids == [[5, 6, 7]] and specs[5].given_ids == [[5, 6], [7]]


def test_a_block_ends_where_its_tokens_would_be_too_many() -> None:
    corpus = Corpus(["x" * BLOCK_TOKENS] * 5, None)
    assert [block.count for block in corpus.blocks] == [2, 2, 1]
    assert len(Corpus(["x" * BLOCK_TOKENS] * 5, None, cut=10).blocks) == 1


def test_the_same_prompts_give_the_same_blocks_wherever_they_lie(tmp_path: Path) -> None:
    one, other = (Corpus(None, str(jsonl(tmp_path, name=name)), 3) for name in ("a.jsonl", "b.jsonl"))
    assert one.blocks == other.blocks
    changed = Corpus(None, str(jsonl(tmp_path, [*ROWS[:-1], "else"], "c.jsonl")), 3)
    assert changed.blocks[:2] == one.blocks[:2] and changed.blocks[2] != one.blocks[2]


def test_a_file_that_changes_under_way_is_a_sentence(tmp_path: Path) -> None:
    path = jsonl(tmp_path)
    corpus = Corpus(None, str(path), 2)
    path.write_text(path.read_text(encoding="utf-8").replace("a text", "b text"), encoding="utf-8")
    with pytest.raises(UsageError, match="was changed"):
        corpus.prompts(corpus.blocks[0])
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="was changed"):
        corpus.prompts(corpus.blocks[0])


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ("{", "line 3: is no JSON text or object; expected a row like"),
        ("[1]", "line 3"),
        ('"\\ud800"', "line 3"),
        ('{"ids": []}', "line 3: is empty"),
        ('{"ids": [[1], []]}', "line 3: is empty"),
        ('{"ids": ["a"]}', "line 3 ids.0: expected a whole number"),
        ('{"messages": [{"role": "user"}]}', "line 3: each of messages needs a role and a content"),
        ('{"messages": [1]}', "line 3 messages.0: expected an object with role and content"),
        ('{"text": "a", "chat": "b"}', "exactly one"),
        ('{"text": 5}', "line 3 text: expected a text"),
        ('{"txt": "a"}', "line 3 txt: is no key of a prompt; expected name, text"),
        ('{"text": "a", "max_tokens": 0}', "line 3 max_tokens: expected 1 or more"),
        ('{"rows": []}', "line 3 rows: only a saved run"),
        ('{"name": "prompt 1", "text": "a"}', "line 3: has the name 'prompt 1', as line 1 has"),
    ],
)
def test_a_row_that_is_none_is_a_sentence_that_names_its_line(row: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'"fine"\n\n{row}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=word):
        Corpus(None, str(path))
    if "has the name" not in word:  # a row by itself
        with pytest.raises(UsageError, match=word):
            read_prompts(None, str(path))


def test_a_row_more_makes_no_other_prompt_a_new_one(tmp_path: Path) -> None:
    before, after = (
        Corpus(None, str(jsonl(tmp_path, rows, name)), 100).blocks[0]
        for rows, name in ((ROWS, "a.jsonl"), (["first of all", *ROWS], "b.jsonl"))
    )
    assert after.hashes.endswith(before.hashes) and len(after.hashes) == len(before.hashes) + DIGITS


def test_equal_prompts_are_told_apart_by_how_many_come_before(tmp_path: Path) -> None:
    path = jsonl(tmp_path, ["same", "other", "same", "same"])
    corpus = Corpus(None, str(path), 2)
    hashes = "".join(block.hashes for block in corpus.blocks)
    assert len({hashes[at : at + DIGITS] for at in range(0, len(hashes), DIGITS)}) == 4
    assert [spec.text for spec in corpus.prompts(corpus.blocks[1])] == ["same", "same"]


def test_a_name_that_was_given_is_part_of_a_prompt(tmp_path: Path) -> None:
    rows = [[{"text": "x"}], [{"text": "x", "name": "mine"}], [{"text": "x", "name": "yours"}]]
    assert len({Corpus(None, str(jsonl(tmp_path, each))).blocks[0].digest for each in rows}) == 3


def test_an_empty_corpus_and_one_that_is_no_text_are_sentences(tmp_path: Path) -> None:
    for data, word in ((b"\n \n", "is empty"), (b"\xff\xfe\x00", "not UTF-8"), (b"x" * (5 << 20), "4 MiB")):
        path = tmp_path / "corpus.txt"
        path.write_bytes(data)
        with pytest.raises(UsageError, match=word):
            Corpus(None, str(path))
