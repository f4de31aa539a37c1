"""The smallest powers of two that bring every operation inside fp16, from a probe's magnitudes and the weights.

The stream's power is the most that anything that goes with the stream asks for. Within a layer, where a factor may go
to either of two tensors (up or down_proj, v or o_proj), it goes where the fewest bits are lost in fp16.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from qwen_precision.dtypes import RESCUED
from qwen_precision.judge import ANSWER, FAR, Columns, Limits, Needs, needs
from qwen_precision.progress import Progress, silent
from qwen_precision.qwen3 import Scale, expert_of, layer_of, powers_of
from qwen_precision.record import LayerPowers, Loss, Rescaling, Rescue, Run, Stuck
from qwen_precision.rescue.bits import NOTHING_LOST, Lost, WeightBits

_ONE_OF_TWO = "what q gives away k has to take, and both have too little room in fp16"


class Shape(NamedTuple):
    """What a plan must know of the model."""

    tied: bool
    qk_norm: bool
    eps: float
    gate_channels: int
    """Channels of the experts' fused gate and up projection that belong to the gate."""


class _Block:
    """Names of one layer's tensors by their leaf (``o_proj``, ``o_proj.bias``); those of experts by expert."""

    def __init__(self) -> None:
        self.by_leaf: dict[str, dict[int, str]] = defaultdict(dict)

    def names(self, leaf: str) -> dict[int, str]:
        """By expert (0 where there is none)."""
        return self.by_leaf.get(leaf, {})

    def both(self, leaf: str) -> list[str]:
        """Weight and bias."""
        return [*self.names(leaf).values(), *self.names(f"{leaf}.bias").values()]


class Planner:
    """Makes the plan for one run.

    Args:
        run: a whole probe with fp16 and the reference in it.
        margin: headroom that every operation shall have.
        shape: of the model.
        tensors: names in the files.
        bits: how the numbers of a tensor are distributed, by its name; every tensor is asked for at most twice.
        tell: called with (layers done, layers, what is being done).
    """

    def __init__(
        self,
        run: Run,
        margin: float,
        shape: Shape,
        tensors: Iterable[str],
        bits: Callable[[str], WeightBits],
        tell: Progress = silent,
    ) -> None:
        self._margin, self._shape, self._bits, self._tell = margin, shape, bits, tell
        self._needs: Needs = needs(Columns(run, Limits()), margin, shape.gate_channels)
        self._too_large = {each.name for each in run.weights if each.overflow.get(RESCUED)}
        self._rooms: dict[str, int] = {}
        self._outside: dict[str, str] = {}
        self._blocks: dict[int, _Block] = defaultdict(_Block)
        self._only_stream: set[str] = set()
        for name in tensors:
            self._sort_in(name)

    def _sort_in(self, name: str) -> None:
        layer, powers = layer_of(name), powers_of(name, self._shape.qk_norm)
        if powers is None:
            return
        if powers == {"stream": -1}:
            self._only_stream.add(name)
        leaf = ".".join(name.split(".")[-2:]).removesuffix(".weight")
        if layer is None:
            self._outside[leaf] = name
        else:
            self._blocks[layer].by_leaf[leaf][expert_of(name) or 0] = name

    def plan(self) -> Rescue:
        """The plan; nothing is changed yet."""
        stream = self._stream()
        layers = []
        losses: dict[str, tuple[int, Lost, Lost]] = {}
        for number in sorted(self._blocks):
            self._tell(number, len(self._blocks), "planning the rescue")
            held: dict[str, WeightBits] = {}
            powers = self._layer(number, stream, held)
            if powers != _none(number):
                layers.append(powers)
            scale = Scale(self._rescaling(stream, [powers]))
            names = [name for each in self._blocks[number].by_leaf.values() for name in each.values()]
            self._lose(names, scale, held, losses)
        final, untied = self._final(stream)
        found = self._rescaling(stream, layers, final, untied)
        unused = {"lm_head"} if self._shape.tied else set()  # a copy of the embedding, written from it
        self._lose([name for leaf, name in self._outside.items() if leaf not in unused], Scale(found), {}, losses)
        return Rescue(
            margin=self._margin,
            unsupported=None,
            rescaling=found,
            losses=[_loss(kind, *each) for kind, each in losses.items()],
            stuck=sorted(self._needs.stuck, key=lambda each: not each.fails),
            fp32_modules=self._needs.modules,
            gate_channels=self._shape.gate_channels,
            exported=None,
        )

    # -- powers ------------------------------------------------------------------------------------------------

    def _room(self, name: str, held: dict[str, WeightBits] | None = None) -> int:
        if name not in self._rooms:
            self._rooms[name] = self._look(name, held if held is not None else {}).room()
        return self._rooms[name]

    def _look(self, name: str, held: dict[str, WeightBits]) -> WeightBits:
        if name not in held:
            held[name] = self._bits(name)
        return held[name]

    def _stream(self) -> int:
        """The stream's power: what its operations ask for, and what its writers need to be representable."""
        stream = max(0, self._needs.of("stream"))
        for name in self._too_large & self._only_stream:
            stream = max(stream, -self._room(name))
        for number, block in self._blocks.items():
            for reads, writes, power in (("up_proj", "down_proj", "product"), ("v_proj", "o_proj", "value")):
                for expert, name in block.names(writes).items():
                    least = self._least(number, power, expert, block.names(reads).get(expert))
                    if least or name in self._too_large:
                        stream = max(stream, least - self._room(name))
            if not self._shape.qk_norm:
                continue
            norm = max(0, self._norm(number, "input_norm", block))
            for name in (*block.names("q_proj").values(), *block.names("k_proj").values()):
                if norm or name in self._too_large:
                    stream = max(stream, norm - self._room(name))
        return stream

    def _least(self, layer: int, power: str, expert: int, reads: str | None) -> int:
        """The least power of a product (of v_proj): what its operations ask for, and what its own weight needs."""
        norm = self._norm(layer, "post_norm" if power == "product" else "input_norm", self._blocks[layer])
        least = max(0, self._needs.of(power, layer, expert if power == "product" else None))
        if reads is not None and (norm > 0 or reads in self._too_large):
            least = max(least, norm - self._room(reads))
        bias = self._blocks[layer].names("up_proj.bias" if power == "product" else "v_proj.bias").get(expert)
        return max(least, -self._room(bias)) if bias in self._too_large and bias is not None else least

    def _norm(self, layer: int, power: str, block: _Block) -> int:
        """A norm's power: 0 where it may be, else the nearest that gives its output room, and the gate's weight."""
        leaf = "input_layernorm" if power == "input_norm" else "post_attention_layernorm"
        low = self._needs.of(power, layer)
        for name in block.names(leaf).values():
            if name in self._too_large:
                low = max(low, -self._room(name))
        leaves = ("gate_proj", "gate") if power == "post_norm" else () if self._shape.qk_norm else ("q_proj", "k_proj")
        fixed = [name for each in leaves for name in block.names(each).values()]
        # A weight of q that is too large leaves that to k, if it can.
        asked = [name for name in fixed if low > 0 or (name in self._too_large and power == "post_norm")]
        high = min((self._room(name) for name in asked), default=FAR)
        if low > high or any(self._room(name) < -high for name in block.names(leaf).values() if high < 0):
            self._stick(layer, leaf, "the weights that read it have no room in fp16 to make up for a smaller output")
            return 0
        return low if low > 0 else min(high, 0)

    def _query(self, number: int, norm: int) -> int:
        """How much smaller q comes out, and k larger, where no norm reads them: no more than their operations ask for.

        0 where what one of them needs is more than the other can take.
        """
        block = self._blocks[number]
        q, k = block.both("q_proj"), block.both("k_proj")
        low, high = self._needs.of("query", number), -self._needs.of("key", number)
        if self._shape.qk_norm or not (low > 0 or high < 0 or norm > 0 or {*q, *k} & self._too_large):
            return 0
        low = max(low, *(_taken(name, norm) - self._room(name) for name in q))
        high = min(high, *(self._room(name) - _taken(name, norm) for name in k))
        if low <= high:
            return min(max(low, 0), high)
        short = [*self._needs.short.get(("query", number, None), []), *self._needs.short.get(("key", number, None), [])]
        for each in short:
            self._needs.stick(each.model_copy(update={"why": _ONE_OF_TWO}))
        for leaf in ("q_proj", "k_proj") if {*q, *k} & self._too_large or not short else ():
            self._stick(number, leaf, _ONE_OF_TWO)
        return 0

    def _stick(self, layer: int | None, leaf: str, why: str) -> None:
        name = self._blocks[layer].names(leaf)[0] if layer is not None else self._outside[leaf]
        module = name.removesuffix(".weight")
        if all(each.module != module for each in self._needs.stuck):
            self._needs.stick(
                Stuck(layer=layer, module=module, name=f"{leaf} output", headroom=None, fails=True, why=why)
            )

    def _layer(self, number: int, stream: int, held: dict[str, WeightBits]) -> LayerPowers:
        block = self._blocks[number]
        post = self._norm(number, "post_norm", block)
        norm = self._norm(number, "input_norm", block)
        product = [
            self._side(number, "product", expert, post, stream, held) for expert in sorted(block.names("down_proj"))
        ]
        return LayerPowers(
            layer=number,
            input_norm=norm,
            query=self._query(number, norm),
            value=self._side(number, "value", 0, norm, stream, held),
            post_norm=post,
            product=product if any(product) or len(product) == 1 else [0],
        )

    def _side(self, layer: int, power: str, expert: int, norm: int, stream: int, held: dict[str, WeightBits]) -> int:
        """How much of the stream's factor the first of the two tensors takes, and how much is passed on by the product.

        The least that its operations need, or more where fewer bits are then lost.
        """
        block = self._blocks[layer]
        reads, writes = ("up_proj", "down_proj") if power == "product" else ("v_proj", "o_proj")
        first, second = block.names(reads).get(expert), block.names(writes).get(expert)
        least = self._least(layer, power, expert, first)
        if first is None or second is None or (not least and not stream):
            return least
        most = max(least, min(stream, stream + self._room(second, held)))
        one, other = self._look(first, held), self._look(second, held)
        lost = {each: one.bits_lost(norm - each) + other.bits_lost(each - stream) for each in range(least, most + 1)}
        return min(lost, key=lambda each: (lost[each], each))

    def _rescaling(self, stream: int, layers: list[LayerPowers], final: int = 0, untied: bool = False) -> Rescaling:
        return Rescaling(
            stream=stream,
            qk_norm=self._shape.qk_norm,
            final_norm=final,
            untied=untied,
            eps=self._shape.eps,
            layers=layers,
        )

    def _final(self, stream: int) -> tuple[int, bool]:
        """The final norm's power, and whether lm_head must be untied for it."""
        norm = self._outside.get("norm")
        head = self._outside.get("embed_tokens" if self._shape.tied else "lm_head")
        asked = self._needs.of("final_norm")
        if head is None and norm is not None and norm in self._too_large:
            self._stick(None, "norm", ANSWER)
        if norm is None or head is None or not (stream or asked > 0 or {norm, head} & self._too_large):
            return 0, False
        high = min(-asked, self._room(norm))
        if self._shape.tied and stream <= high:
            return stream, False  # lm_head is the embedding, so it has the stream's factor; the norm takes it back
        low = -self._room(head) if high < 0 or head in self._too_large else -FAR
        if low > high:
            own = self._room(norm) < -asked
            why = "its weight has no room" if own else "lm_head has no room to make up for a smaller output"
            self._stick(None, "norm", f"{why} in fp16")
            return 0, self._shape.tied and stream != 0
        power = min(high, max(low, 0))
        return power, self._shape.tied and power != stream

    # -- what it costs -----------------------------------------------------------------------------------------

    def _lose(
        self,
        names: Iterable[str],
        scale: Scale,
        held: dict[str, WeightBits],
        losses: dict[str, tuple[int, Lost, Lost]],
    ) -> None:
        """Count the weights that fp16 does not hold, before and after their factor."""
        for name in names:
            factor = scale.factor(name)
            if factor:
                bits = held.pop(name, None) or self._bits(name)
                self._rooms.setdefault(name, bits.room())
                kind = name.split(".")[-2]
                tensors, before, after = losses.get(kind, (0, NOTHING_LOST, NOTHING_LOST))
                losses[kind] = (tensors + 1, before + bits.lost(0), after + bits.lost(factor))


def _taken(name: str, norm: int) -> int:
    """What a weight takes of its norm's power; a bias takes none."""
    return norm if name.endswith(".weight") else 0


def _none(layer: int) -> LayerPowers:
    return LayerPowers(layer=layer, input_norm=0, query=0, value=0, post_norm=0, product=[0])


def _loss(kind: str, tensors: int, before: Lost, after: Lost) -> Loss:
    return Loss(
        kind=kind,
        tensors=tensors,
        elements=after.elements,
        inexact_before=before.inexact,
        inexact=after.inexact,
        to_zero=after.to_zero,
        badly=after.badly,
        error=after.relative,
    )
