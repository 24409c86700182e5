"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) with Hugging Face's parameter names: embed -> blocks -> head.

Letters in shapes: B rows, T tokens, C hidden size, H heads, D head size, V tokens of the vocabulary, K classes.

A batch holds "input_ids", "token_type_ids" and "attention_mask" (B, T), int64, the last one 1 where there is a token
and 0 where a row is filled up, and "targets": classes (B,) int64, numbers (B,) float32, or tokens (B, T) int64. A
target that is IGNORED, or of numbers nan, does not count.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .decoder import draw_normal
from .encoder_config import EncoderConfig
from .encoder_heads import BertRows, BertTokens, Pooler, RobertaRows, RobertaTokens, class_loss, number_loss, token_loss
from .layers import Linear, allocate
from .segment import Batch, Loss, Segment

Call = Callable[[nn.Module, Tensor | None, Batch], Tensor | Loss]


class Embeddings(nn.Module):
    """input_ids and token_type_ids (B, T) int64 -> (B, T, C)."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.pad, self.roberta = c.pad_token_id, c.model_type == "roberta"
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, c.pad_token_id)
        self.position_embeddings = nn.Embedding(
            c.max_position_embeddings, c.hidden_size, c.pad_token_id if self.roberta else None
        )
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def positions(self, input_ids: Tensor) -> Tensor:
        """Of every token, int64: (T,), or RoBERTa's (B, T), which counts tokens that are no padding."""
        if not self.roberta:
            return torch.arange(input_ids.shape[1], device=input_ids.device)
        real = (input_ids != self.pad).long()
        return real.cumsum(1) * real + self.pad

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(self.positions(input_ids))))


class SelfAttention(nn.Module):
    """x (B, T, C), attention_mask (B, T) -> (B, T, C)."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.head_size, self.p = c.hidden_size // c.num_attention_heads, c.attention_probs_dropout_prob
        self.query = Linear(c.hidden_size, c.hidden_size, bias=True)
        self.key = Linear(c.hidden_size, c.hidden_size, bias=True)
        self.value = Linear(c.hidden_size, c.hidden_size, bias=True)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", d=self.head_size)
            for project in (self.query, self.key, self.value)
        )
        seen = (attention_mask != 0)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.p if self.training else 0.0)
        return rearrange(y, "b h t d -> b t (h d)")


class Added(nn.Module):
    """norm(x + dropout(dense(y))): y (B, T, in), x (B, T, C) -> (B, T, C)."""

    def __init__(self, size: int, c: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(size, c.hidden_size, bias=True)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(y)) + x)


class Attention(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.self = SelfAttention(c)
        self.output = Added(c.hidden_size, c)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.output(self.self(x, attention_mask), x)


class Intermediate(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """One block, normed behind each of its two halves: x (B, T, C), attention_mask (B, T) -> (B, T, C)."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.intermediate = Intermediate(c)
        self.output = Added(c.intermediate_size, c)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.attention(x, attention_mask)
        return self.output(self.intermediate(x), x)


class Layers(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Base(nn.Module):
    """Everything below a head. BERT's pooler belongs to it by name."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Layers(c)
        self.pooler = Pooler(c) if c.model_type == "bert" and c.head != "masked" else None

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.encoder.layer:
            x = layer(x, attention_mask)
        return x


class Encoder(nn.Module):
    """An encoder with the head that its config says: for classes or a number of each row, or for masked tokens."""

    def __init__(self, config: EncoderConfig, seed: int = 0) -> None:
        super().__init__()
        c = self.config = config
        self.dropout = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        self.add_module(c.model_type, Base(c))
        masked, bert = c.head == "masked", c.model_type == "bert"
        self.classifier: nn.Module | None = None
        if not masked:
            self.classifier = Linear(c.hidden_size, c.outputs, bias=True) if bert else RobertaRows(c, self.dropout)
        self.cls = BertTokens(c) if masked and bert else None
        self.lm_head = RobertaTokens(c) if masked and not bert else None
        self.init_weights(seed)

    @property
    def base(self) -> Base:
        found = getattr(self, self.config.model_type)
        assert isinstance(found, Base)
        return found

    def allocate(self, device: torch.device | str) -> None:
        """Give a model that was made on the meta device memory on `device`, a tensor at a time, in the dtypes it has.
        Parameters hold nothing until `init_weights` or a checkpoint fills them; slots of `layers.attach` stay."""
        allocate(self, device)

    @torch.no_grad()
    def init_weights(self, seed: int, names: frozenset[str] | None = None) -> None:
        """Draw all matrices from N(0, initializer_range²), on the host: the same on every device. Norms become ones,
        biases zeros, embeddings of padding zeros. With `names` these alone. On the meta device nothing is filled."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.is_meta or (names is not None and name not in names):
                continue
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                draw_normal(p, self.config.initializer_range, generator)
        for name, module in self.named_modules():
            drawn = names is None or f"{name}.weight" in names
            if drawn and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(B, T) int64 each -> logits (B, K), or of a masked LM (B, T, V). Without a mask no token is padding."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._head()[0](self.base(input_ids, types, mask))

    def segments(self) -> list[Segment]:
        """embed -> block x L -> head. The modules in it are the model's own: call it after moving the model."""
        kind, c = self.config.model_type, self.config
        embeddings, layers = self.base.embeddings, self.base.encoder.layer
        head, names = self._head()
        calls: dict[str, Call] = {"masked": token_loss, "classification": class_loss, "regression": number_loss}
        masked = c.head == "masked"
        return [
            Segment("embed", embeddings, _under(embeddings, f"{kind}.embeddings"), embed),
            *(
                Segment("block", layer, _under(layer, f"{kind}.encoder.layer.{i}"), block)
                for i, layer in enumerate(layers)
            ),
            Segment("head", head, names, calls[c.head], masked, c.vocab_size if masked else 0),
        ]

    def _head(self) -> tuple[nn.Module, dict[str, str]]:
        """The last segment's module, of the model's own parts, and the full names of its parameters."""
        base, head = self.base, self.cls or self.lm_head
        if head is not None:
            embedding = f"{self.config.model_type}.embeddings.word_embeddings.weight"
            tokens, names = head.tail(base.embeddings.word_embeddings.weight)
            return tokens, {"weight": embedding, **names}
        assert self.classifier is not None
        names = {f"classifier.{name}": f"classifier.{name}" for name, _ in self.classifier.named_parameters()}
        if base.pooler is None:
            return self.classifier, {name.removeprefix("classifier."): full for name, full in names.items()}
        rows = BertRows(base.pooler, self.classifier, self.dropout).train(self.training)
        return rows, {**{f"pooler.{own}": full for own, full in _under(base.pooler, "bert.pooler").items()}, **names}


def embed(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """First segment: batch["input_ids"] and ["token_type_ids"] (B, T) -> (B, T, C)."""
    return module(batch["input_ids"], batch["token_type_ids"])


def block(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """One layer: (B, T, C) -> (B, T, C); no token sees padding."""
    return module(x, batch["attention_mask"])


def _under(module: nn.Module, prefix: str) -> dict[str, str]:
    """Names of a module's parameters to their full names behind `prefix`."""
    return {name: f"{prefix}.{name}" for name, _ in module.named_parameters()}
