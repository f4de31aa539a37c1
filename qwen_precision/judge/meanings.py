"""What a failure can come from, in words: for a person, for the documentation, and told from its look-alikes. Data."""

from typing import NamedTuple


class Meaning(NamedTuple):
    """One cause."""

    said: str
    """One clause for somebody who has just met it; ``{dtype}`` stands for the dtype that failed, ``{how}`` for what
    was found of it, where one cause has several ways."""
    shown: str
    """What shows that it is this one."""
    unlike: str
    """What looks the same, and how it differs."""


CAUSES: dict[str, Meaning] = {
    "dead-in-fp32": Meaning(
        "the model is not finite even in fp32: no choice of dtype repairs that",
        "the reference itself is not finite",
        "damaged-weight names the tensor where one holds NaN; here all weights are numbers, and their product is not.",
    ),
    "damaged-weight": Meaning(
        "the file is damaged: this tensor holds NaN or infinity",
        "a tensor holds NaN or infinity",
        "weight-range is a sound tensor that one dtype cannot hold; a damaged one fails in every dtype.",
    ),
    "damaged-scale": Meaning(
        "the quantised file is damaged: a scale is not a usable number",
        "a scale of quantised weights is NaN, infinite or was never written",
        "damaged-weight is about weights that are stored as they are.",
    ),
    "weight-range": Meaning(
        "a weight is too large for {dtype}",
        "a weight is larger than the dtype's largest number",
        "out-of-range is about what the model computes, not about what the file holds.",
    ),
    "harmless-overflow": Meaning(
        "it overflows, and nothing is lost by it on these prompts",
        "what overflowed comes to nothing: -inf in a softmax (tried bit by bit), or padding alone",
        "silent-absorption leaves finite logits too, but wrong ones.",
    ),
    "poisoned-cache": Meaning(
        "the engine's KV cache did it: it holds what an earlier request left there, and this one is not at fault",
        "in a serving engine attention is the first to fail, from finite inputs; in a fresh one it is clean",
        "cache is a generation's own; out-of-range in attention fails in a fresh engine too.",
    ),
    "masked-rows": Meaning(
        "padding did it: without the batch and its padding this prompt is clean",
        "only pad positions, or only in a batch",
        "batch is about a step of a generation; here one forward shows it.",
    ),
    "attention-scores": Meaning(
        "eager attention keeps its scores in {dtype}; sdpa does not, and is clean",
        "scores of eager attention; sdpa is clean",
        "out-of-range in attention fails with sdpa too.",
    ),
    "rounding": Meaning(
        "rounding its inputs to {dtype} is enough to push the result over the edge",
        "the operands as the dtype holds them are too large together; the reference's are not",
        "accumulation has a result in range, and a partial sum out of it.",
    ),
    "accumulation": Meaning(
        "the result fits {dtype}, a partial sum on the way to it does not",
        "operands and reference in range, yet not finite: a sum left the range half-way",
        "out-of-range has a result that does not fit; rounding has operands that were changed by rounding.",
    ),
    "silent-absorption": Meaning(
        "it overflowed, later operations made that finite again, and the answer is wrong: no NaN shows it",
        "an inner operation overflowed, and the output is finite and wrong",
        "harmless-overflow gives the same answer as fp32.",
    ),
    "length": Meaning(
        "the prompt is too long: the same token is clean after a few others, and not after so many",
        "the token is harmless after a few others, and not after so many, whatever they are",
        "trigger-prompt depends on which tokens stand before, not on how many.",
    ),
    "trigger-token": Meaning(
        "this token does it by itself; without it the prompt is clean",
        "a token overflows alone, and without it the row is clean",
        "out-of-range fails with any text; trigger-prompt needs several tokens together.",
    ),
    "trigger-prompt": Meaning(
        "this text does it{how}",
        "this text: only with (or without) the chat template, or only these tokens together",
        "trigger-token fails with the token alone; length fails with any tokens in front.",
    ),
    "out-of-range": Meaning(
        "the value itself is too large for {dtype}",
        "an activation is larger than the dtype's largest number",
        "accumulation and rounding have a result that would fit; trigger-token and length need a particular text.",
    ),
    "batch": Meaning(
        "generating in a batch did it: the same row alone is clean",
        "a step of a generation, not its ids in a single forward; generated without the batch it is clean",
        "masked-rows shows in a single forward already.",
    ),
    "chunked-prefill": Meaning(
        "reading the prompt in chunks did it: prefilled whole it is clean",
        "a step of a generation, not its ids in a single forward; prefilled whole it is clean",
        "length fails in a single forward too.",
    ),
    "cache": Meaning(
        "the KV cache did it: computed at once, without a cache, the step is clean",
        "a step of a generation, not its ids in a single forward; only without a cache it is clean",
        "batch and chunked-prefill are asked first, and were not it.",
    ),
    "not-watched": Meaning(
        "it began in something that qprec cannot watch, just before this operation",
        "something not finite came in, and no operation that was watched made it",
        "not-told has an origin that was seen; here only the first operation that met it is known.",
    ),
    "precision": Meaning(
        "nothing overflows, but {dtype} is too coarse: the answers are not fp32's",
        "finite everywhere, but too far from fp32",
        "silent-absorption has an infinity on the way.",
    ),
    "not-told": Meaning(
        "nothing that was measured or tried tells why",
        "nothing that was measured or run tells which",
        "Run it again with --explain, or a larger --budget.",
    ),
}
"""In the order in which it is asked."""
