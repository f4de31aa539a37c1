"""The first token ids of a text, of which no more is tokenised than they can depend on.

A fast tokenizer splits a text into words from left to right and makes tokens of each by itself. How it splits is told
by what stands near: the run of spaces or digits that a word is in, a token of its own (``<|im_end|>``) that takes the
spaces before it along, a few characters ahead. So of a prefix all ids but the last are those of the whole text. Where
a tokenizer makes one word of everything (Llama 2, Gemma), or is slow, nothing is known, and all is tokenised.
"""

from typing import Any

_SHORT = 1 << 16  # characters that are tokenised in any case: it takes milliseconds
_EACH = 16  # characters a token, at first
_AHEAD = 64  # characters that a word may look ahead, beside the longest token of the tokenizer's own


def first_ids(text: str, tokenizer: Any, special: bool, most: int | None) -> list[int]:
    """Token ids of a text: all of them, or where it is long ``most``, which are those it begins with.

    Args:
        text: of any length.
        tokenizer: of transformers.
        special: whether it adds its own first and last tokens.
        most: how many ids are needed; None for all.
    """
    size = max(_SHORT, _EACH * (most or 0))
    while most is not None and tokenizer.is_fast and size < len(text):
        encoding = tokenizer(text[:size], add_special_tokens=special)
        if _is_sure(encoding, text[:size], most, tokenizer):
            return list(encoding["input_ids"][:most])
        size *= 4
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _is_sure(encoding: Any, prefix: str, most: int, tokenizer: Any) -> bool:
    """Whether the first ids of a prefix are the same whatever follows it."""
    words = encoding.word_ids()  # of tokens that the tokenizer adds itself: None
    mine = [word for word in words[:most] if word is not None]
    if len(words) <= most or not mine:
        return False
    ahead = _AHEAD + max(map(len, tokenizer.get_added_vocab()), default=0)
    # Behind a whole run of spaces, one of other characters, and one of spaces again, all runs it was in are over.
    return len(prefix[encoding.word_to_chars(mine[-1]).end : -ahead].split(maxsplit=2)) > 2
