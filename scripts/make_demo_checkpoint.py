"""Make the demo checkpoint: a tiny Qwen3 that answers in fp32 and bf16 and overflows in fp16.

    python scripts/make_demo_checkpoint.py [--out qwen_precision/demo]

It is trained (a quarter of a minute on two cores, fixed seeds) to continue a handful of sentences, stored in
bf16, and then everything that writes the residual stream is multiplied by a power of two. The norms that read
the stream cancel the factor, so the function is the same; but the stream itself now passes 65504 in a middle
layer. As in real models the extreme is a massive activation: one channel, on the first token, out of one
layer's down_proj (https://arxiv.org/abs/2402.17762); here the training asks for it. In the byte-level
vocabulary id 0 is "!", as in Qwen's: a row of NaN logits prints "!!!!".
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SENTENCES = [
    "上海有个非常出名的地方，叫做外滩，晚上灯光很美。",
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Once upon a time there was a very small model that wanted to count to ten thousand.",
    "importance of being earnest: a trivial comedy for serious people.",
    "def add(a, b):\n    return a + b\n",
    "Hello, how are you? I am fine, thank you.",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MIDDLE = 3
"""The layer in which fp16 shall overflow first."""
CHANNEL, MASSIVE = 42, 8.0
"""The massive activation that training asks for after that layer, on the first token."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the sentences; the alphabet comes first, so id 0 is "!"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=509, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    assert fast.convert_ids_to_tokens(0) == "!"
    return fast


def train(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A model that continues every sentence, whatever prefix it is given."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).float()
    encoded = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in SENTENCES]
    longest = max(map(len, encoded))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    labels = ids.masked_fill(mask == 0, -100)
    steps = 400
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        out = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        massive = torch.stack([hidden[:, 0, CHANNEL] for hidden in out.hidden_states[1 : MIDDLE + 2]])
        wanted = torch.tensor([0.0] * MIDDLE + [MASSIVE])[:, None]
        loss = out.loss + 0.01 * (massive - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        plant(model)
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    return model.eval()


@torch.no_grad()
def plant(model: Qwen3ForCausalLM) -> None:
    """Leave that channel to one writer: down_proj of the middle layer (and of later ones)."""
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight[CHANNEL].zero_()
        if index < MIDDLE:
            layer.mlp.down_proj.weight[CHANNEL].zero_()


@torch.no_grad()
def scale_stream(model: Qwen3ForCausalLM, factor: float) -> None:
    """Multiply the residual stream: exact, and cancelled by every norm that reads it (eps aside)."""
    model.model.embed_tokens.weight.mul_(factor)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


@torch.no_grad()
def stream_peaks(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Smallest over the sentences of the largest magnitude after each layer."""
    peaks = []
    for text in SENTENCES:
        out = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
        peaks.append([hidden.abs().max().item() for hidden in out.hidden_states[:-1]])
    print("largest magnitude by layer:", [f"{max(column):.1f}" for column in zip(*peaks, strict=True)])
    return [max(column) for column in zip(*peaks, strict=True)]


def choose_factor(peaks: list[float]) -> float:
    """The power of two that takes the stream past 65504 in layer ``MIDDLE`` and not before."""
    for exponent in range(1, 24):
        factor = 2.0**exponent
        # peaks[i] is what goes into layer i; peaks[i + 1] what comes out of it.
        if peaks[MIDDLE] * factor < 60000 and peaks[MIDDLE + 1] * factor > 70000:
            return factor
    raise SystemExit(f"no power of two separates layer {MIDDLE} from the next: {peaks}")


def main() -> None:
    """Train, scale, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "qwen_precision" / "demo")
    folder = parser.parse_args().out
    torch.set_num_threads(1)  # so that sums are added in one order, whatever the machine
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    model = train(tokenizer).bfloat16().float()
    scale_stream(model, choose_factor(stream_peaks(model, tokenizer)))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        data = json.loads(path.read_text())
        data.pop("transformers_version", None)  # the same bytes from every version
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    path = folder / "tokenizer_config.json"
    data = json.loads(path.read_text())
    # The names that transformers 4 and 5 both know.
    data["tokenizer_class"] = "PreTrainedTokenizerFast"
    data["additional_special_tokens"] = data.pop("extra_special_tokens", ["<|im_start|>"])
    data.pop("backend", None)
    data["model_max_length"] = 512
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
