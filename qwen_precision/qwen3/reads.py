"""What the products of a model read: of each, the operations whose outputs are its operands. No tensors, names alone.

A record holds the output of every operation, not which operation reads it. In the families that are known by name it
follows from the rows (``Row.reads``); of any other product it is said that it is not known.
"""

from collections.abc import Sequence

from qwen_precision.qwen3.op import name_of, row_of
from qwen_precision.record import Site

PRODUCTS = frozenset("linear matmul grouped_mm scaled_dot_product_attention convolution conv1d conv2d conv3d".split())
"""Operations that multiply two tensors and add up."""


def is_product(site: Site) -> bool:
    """Whether an operation multiplies and adds up; rotary angles, which are made in fp32 everywhere, are left out."""
    return site.op in PRODUCTS and "rotary_emb" not in site.module


def operands(sites: Sequence[Site]) -> tuple[set[int], list[str]]:
    """Which operations give the operands of products.

    Returns:
        Indices of sites whose outputs a product reads; names of products of which it is not known what they read.
    """
    named: dict[tuple[int | None, str], list[int]] = {}
    for number, site in enumerate(sites):
        named.setdefault((site.layer, name_of(site.module, site.op, site.call)), []).append(number)
    found: set[int] = set()
    unknown: dict[str, None] = {}
    for site in sites:
        if not is_product(site):
            continue
        reads = row_of(site.module, site.op, site.call).reads
        each = [
            next((named[site.layer, name] for name in one.split("|") if (site.layer, name) in named), [])
            for one in reads
        ]
        found.update(number for numbers in each for number in numbers)
        if not each or not all(each):
            unknown[name_of(site.module, site.op, site.call)] = None
    return found, list(unknown)
