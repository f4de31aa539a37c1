"""What a softmax in float32 is worth, and what float32 logits take: columns of a pass, and one cost a run."""

from qwen_precision.record.parts import Count, Number, Part

LOOKED_AT = 8
"""Positions of a row whose whole vocabulary is looked at, at most: with Qwen3's 151,936 each takes 1 ms on one core,
where a position of its smallest model takes 20 in a forward. A default probe of that takes 1 % longer by it."""


class Upcast(Part):
    """A row of a prompt: the softmax of the very same logits in the pass's own dtype, against that in float32.

    Of every real token that has a next one (``tokens``), log-probabilities, and of a few positions (``rows``) all of
    the vocabulary. What is not finite in float32 either is left out of all of it.
    """

    tokens: Count
    """Real tokens of the prompt whose log-probability is finite in float32; the row's first has none."""
    logprob_max: Number | None
    """Largest error of a token's log-probability in nats, where it is finite; null without any."""
    logprob_rms: Number | None
    """Their root mean square."""
    loss: Number | None
    """Cross-entropy of the row in nats a token, its labels shifted as in training: the softmax in float32."""
    loss_in_dtype: Number | None
    """The same with every log-probability, and then their mean, rounded to the dtype."""
    loss_error: Number | None = None
    """How far the two are apart, before either is rounded for the record."""
    bad: Count
    """Tokens whose log-probability is infinite in the dtype."""
    zero: Count
    """Tokens whose probability is zero in the dtype, and not in float32: the logarithm of it is -inf."""
    rows: Count
    """Positions whose whole distribution was looked at, the last one among them; ``LOOKED_AT`` at most."""
    mass_lost: Number | None
    """1 less the sum of a softmax in the dtype; of all ``rows`` the one farthest from zero."""
    ranks: Count
    """Of the ten likeliest tokens of each of ``rows``: those with another number of strictly likelier ones."""
    changed: Count
    """Of ``rows``, those whose likeliest token (of equal ones the lowest id) is another."""
    by_hand: Number | None
    """As ``mass_lost``, with every step rounded to the dtype: the maximum taken off, exp, sum, division."""
    by_hand_bad: Count
    """Of ``rows``, those in which that is not finite."""
    unshifted_bad: Count
    """Of ``rows``, those in which exp of the largest logit overflows where the maximum is not taken off first."""


class LogitsCost(Part):
    """What the logits took, and what they would take if the whole prompt's were materialised."""

    upcast: bool
    upcast_seconds: Number
    """Of ``steps`` together; the first, which finds its kernel and memory, was done once more before."""
    bytes: Count
    """``[batch, 1, vocabulary]`` as it was computed with; in a probe, of the largest prompt in float32."""
    whole_prompt_bytes: Count
    """``[batch, prompt, vocabulary]`` in the same format."""
    chunks: Count
    """Pieces that the prompt was prefilled in; in a probe, that its logits were computed in."""
    steps: Count | None
    """How many times the last position's logits were upcast in ``upcast_seconds``; null in older records."""
    vocabulary: Count | None
    """Logits of a position; null in older records."""
    held: Count | None
    """Bytes of the largest tensor of logits that a model really gave, upcast or not; null in older records."""
