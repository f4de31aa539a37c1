"""Of a long text no more is tokenised than its first tokens depend on, and they are those of the whole text."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qwen_precision.settings import PromptSpec, first_ids, firstids, tokenise

WORDS = (
    "the quick brown fox jumps over lazy dogs 7 12 1234567 12.5 don't WE'LL \u00e9 e\u0301 a\u0301\u0323\u0301 上海有 "
    "\U0001f600 \u0928\u092e\u0938\u094d\u0924\u0947 naïve …… ??!! {[( <|im_end|> <mask> <|im"
)
SPACES = (" ", "  ", "\n", "\r\n", " \n \n  ", "\t", " " * 70, " " * 700, "\n" * 300, "\u3000")
PIECES = (*WORDS.split(), *SPACES, "\u0301" * 90, "1" * 301, "<| a b c d |>", "")
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


OWN = AddedToken("<| a b c d |>", lstrip=True)


def a_text(dice: random.Random, pieces: int) -> str:
    return "".join(dice.choice(PIECES) + dice.choice(["", " ", " "]) for _ in range(pieces))


def trained(made: Tokenizer, trainer: Any) -> Any:
    made.train_from_iterator([a_text(random.Random(n), 200) for n in range(20)], trainer)
    made.add_special_tokens(["<|im_end|>", AddedToken("<mask>", lstrip=True, rstrip=True), OWN])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def qwen() -> Any:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))


def gpt2() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))


def bert() -> Any:
    made = Tokenizer(models.WordPiece(unk_token="?"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made = trained(made, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["?"], show_progress=False))
    ends = [("<|im_end|>", made.convert_tokens_to_ids("<|im_end|>"))]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_end|> $A <|im_end|>", None, ends)
    return made


def t5() -> Any:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(made, trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"]))


def thousands() -> Any:
    """Every character is a word, but digits go together by threes, from the last."""
    made = Tokenizer(models.BPE(unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{N}{1,3}(?=(\p{N}{3})*(?!\p{N}))|[^\p{N}]"), "isolated")
    return trained(made, trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False))


def llama2() -> Any:
    """Everything is one word of it."""
    made = Tokenizer(models.BPE(unk_token="?", byte_fallback=False, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    return trained(made, trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False))


TOKENIZER = gpt2()
KINDS: tuple[Callable[[], Any], ...] = (qwen, gpt2, bert, t5, thousands, llama2)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_whole_text_wherever_it_is_cut(
    kind: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firstids, "_SHORT", 280)
    monkeypatch.setattr(firstids, "_EACH", 1)
    tokenizer, dice = kind(), random.Random(17)
    cut = 0
    for _ in range(150):
        text, special = a_text(dice, dice.choice([100, 300, 900])), dice.random() < 0.5
        whole = tokenizer(text, add_special_tokens=special)["input_ids"]
        for most in (1, dice.randrange(1, 40), dice.randrange(1, len(whole) + 1)):
            found = first_ids(text, tokenizer, special, most)
            assert found[:most] == whole[:most]
            cut += len(found) < len(whole)
    assert cut > 50 or kind is llama2


@pytest.mark.parametrize("size", range(250, 280))
def test_a_token_of_the_tokenizers_own_that_is_cut_changes_nothing_before_it(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firstids, "_SHORT", size)
    monkeypatch.setattr(firstids, "_EACH", 0)
    tokenizer, text = TOKENIZER, "ab " * 85 + "  <| a b c d |> and more" * 30
    whole = tokenizer(text)["input_ids"]
    assert all(first_ids(text, tokenizer, True, most)[:most] == whole[:most] for most in range(1, 180, 3))


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, made: Any) -> None:
        self.made, self.given = made, 0

    def __call__(self, text: str, **asked: Any) -> Any:
        self.given += len(text)
        return self.made(text, **asked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)


LONG = "The quick brown fox jumps over the lazy dog. " * 40_000


def test_of_a_long_text_as_much_is_tokenised_as_is_asked_for() -> None:
    tokenizer = Counting(qwen())
    prompts, _ = tokenise([PromptSpec(name="long", text=LONG)], tokenizer, 1000, None, max_tokens=8)
    assert tokenizer.given <= 1 << 16
    assert prompts[0].rows[0].ids == qwen()(LONG[:300])["input_ids"][:8]


def test_a_long_text_that_the_context_cannot_hold_is_refused_without_tokenising_all_of_it() -> None:
    from qwen_precision.errors import UsageError

    tokenizer = Counting(qwen())
    with pytest.raises(UsageError, match="has more than 512 tokens, the model's context is 512"):
        tokenise([PromptSpec(name="long", text=LONG)], tokenizer, 1000, 512, None)
    assert tokenizer.given <= 1 << 16


def test_a_text_of_one_word_is_tokenised_to_its_end_in_ever_longer_parts() -> None:
    tokenizer, text = Counting(qwen()), "?" * 1_000_000
    ids = first_ids(text, tokenizer, True, 8)
    assert ids[:8] == qwen()(text)["input_ids"][:8] and tokenizer.given < 1.5 * len(text)
