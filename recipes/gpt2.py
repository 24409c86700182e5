"""What a recipe is told that trains a GPT-2 on text: its sizes, and where its matrices and layers are.

    python -m recipes.omgd gpt2 --data corpus/*.jsonl.xz          11 M parameters, 3 of 6 layers for 100 steps each
    python -m recipes.baseline gpt2 --data corpus/*.jsonl.xz      the same under AdamW, or any other --optimizer
    python -m recipes.omgd gpt2-paper --tokenizer gpt2/ --data openwebtext/

`gpt2-paper` is the GPT-2 of OMGD (arXiv 2603.05960, section 5.4 and B.4), with what the authors' code (nanoGPT's) says
where the paper is silent:

    paper   124 M parameters, sequences of 1,024, 100,000 iterations, batches of 60 a GPU on 4 of them with 8 steps of
            accumulation, AdamW with betas (0.9, 0.95), lr 6e-4 after a linear warm-up of 2,000, a cosine to 6e-5,
            weight decay 0.1; 3 of 12 layers, another mask every 100 iterations
    code    the accumulation counts all GPUs, so a step takes 480 sequences; clip 1.0 before the scale; bf16 over
            float32 weights; no dropout; matrices and embeddings decay; all layers train for the first 1,000 iterations
    ours    480 sequences as 40 times 12, biases (the code has none, published GPT-2 has), evaluations and checkpoints

The paper gives no number for this run: its losses are a figure. The default is ours: sizes, steps and rate for two
cores, with the paper's period, betas and decay, and a mask warm-up of the same share of the run; then two whole cycles.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from models.gpt2 import PRESETS, Gpt2
from models.gpt2_config import Gpt2Config
from optimizers.contract import UsageError

from . import init
from .config import TrainConfig

MATRICES = r"\bh\.\d+\..*c_(attn|fc|proj)\.weight$"  # attention and MLP
VECTORS = r"\bln_|\.bias$"
BLOCKS = r"\bh\.(\d+)\."
BETAS = (0.9, 0.95)

HERE: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "clip": "global",
    "sequence": 128,
    "steps": 404,
}
PAPER: dict[str, Any] = {
    **HERE,
    "model": "124m",
    "lr": 6e-4,
    "sequence": 1024,
    "micro_batch": 12,
    "accumulation": 40,
    "steps": 100_000,
    "warmup": 2000,
    "floor": 0.1,
    "precision": "mixed",
    "eval_every": 1000,
}


@dataclass(frozen=True, kw_only=True)
class Gpt2Train(TrainConfig):
    """Flags of every recipe that trains a GPT-2."""

    model: Literal["demo", "124m", "355m", "774m", "1.5b"] = "demo"  # type: ignore[assignment]
    """Size of the GPT-2: Hugging Face's four, and a demo of about 11 M parameters."""

    matrices = MATRICES
    vectors = VECTORS
    blocks = BLOCKS
    usual: ClassVar = {**TrainConfig.usual, "adamw": {"betas": BETAS}, "lisa": {"betas": BETAS}}
    sizes: ClassVar = PRESETS
    kind: ClassVar = Gpt2Config

    def network(self, vocabulary: int) -> Gpt2:
        return Gpt2(self.shape(vocabulary))

    def shape(self, vocab_size: int) -> Gpt2Config:
        if self.init is not None:
            return init.shape(self.init, vocab_size, self.tokenizer, Gpt2Config)
        given = {name: value for name, value in dataclasses.asdict(self.size).items() if value is not None}
        for name in ("num_key_value_heads", "tie_word_embeddings"):
            if name in given:
                raise UsageError(
                    f"--size.{name.replace('_', '-')}: got {given[name]}, which no GPT-2 has: its heads share no keys, "
                    "and its embedding is the output matrix; leave it out"
                )
        preset = PRESETS[self.model]
        positions = max(preset.max_position_embeddings, self.sequence)
        try:
            return dataclasses.replace(preset, vocab_size=vocab_size, max_position_embeddings=positions, **given)
        except ValueError as error:
            raise UsageError(str(error)) from None
