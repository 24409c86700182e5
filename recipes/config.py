"""What every training recipe is told: the flags beside those of a run, who trains what, and how that is rebuilt."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from engine.data.tokenizer import load_tokenizer
from engine.step.segments import Batch
from engine.tasks import language
from engine.tasks.config import LanguageConfig
from models.llama import PRESETS, Llama, LlamaConfig
from models.weights import CONFIG, Config
from optimizers.contract import Family, Group, Optimizer, Params, Rule, UsageError
from optimizers.partition import partition, trainable
from optimizers.random import Key
from optimizers.registry import RULES
from optimizers.storage.stored import BasesDtype, MomentsDtype, keep
from optimizers.wrappers.traversal import Groups, layers

from . import init
from .rest import Rest, rest_for

SIZES = ("rank", "update_proj_gap")  # options that go with the size of the model: a preset gives them to any rule
MATRICES = r"layers\.\d+\..*_proj\.weight$"  # attention and MLP; embedding, norms and head go to AdamW
VECTORS = r"norm|\.bias$"  # never decayed
BLOCKS = r"\blayers\.(\d+)\."  # where a name says the number of its layer


@dataclass(frozen=True)
class Size:
    """Sizes that differ from the preset's."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    tie_word_embeddings: bool | None = None
    """Share one matrix between embedding and head."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LanguageConfig):
    """Flags of every recipe that trains a LLaMA."""

    init: Path | None = None
    """A folder with a model as Hugging Face publishes it, whose weights the run begins with. Its config.json stands in
    the place of --model and --size, and its tokenizer is the run's unless --tokenizer says another."""
    model: Literal["demo", "60m", "130m", "350m", "1b", "7b"] = "demo"
    """Size of the LLaMA: GaLore's configurations, and a demo of about 3 M parameters."""
    size: Size = field(default_factory=Size)
    """Sizes by hand, over the preset's."""
    optimizer: str = "adamw"
    """The rule for the matrices of attention and MLP; --rest trains the rest. Its options are the last flags here."""
    options: Any = None
    """The options of that rule, an instance of its family's dataclass; by default what `defaults` gives."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_of: str = ""
    """The rule that `lr` was chosen for, where that is another one than `optimizer`."""
    rest: Rest = "adamw"
    """What trains embedding and head, where the rule does not: AdamW; adam_sn, with one second moment a row; scale,
    with a moment of the head alone; or the rule itself. Vectors are AdamW's. Each needs a --rest-lr of its own."""
    rest_lr: float | None = None
    """Peak learning rate of embedding, norms and head; by default `lr`."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms are never decayed."""
    moments_dtype: MomentsDtype = "fp32"
    """What the moments of every rule are kept in between two steps; rules compute in fp32. bf16, or int8 with a scale
    for each block of up to 256 values; both are rounded stochastically."""
    bases_dtype: BasesDtype = "fp32"
    """What the bases of subspaces are kept in. RSO's P has the dtype of the weights."""
    stagger: bool = True
    """Rebuild subspace bases a few tensors a step, not all on the same step."""
    prompt: str = "def "
    """What the sample at the end of the run goes on from."""
    dry_run: bool = False
    """Print who trains what, and stop."""
    swap: Literal["never", "convert", "only"] = "never"
    """With --resume: convert the state of the optimizer that the checkpoint was trained with to this one's; "only":
    save that and stop."""
    swap_at: tuple[int, str] | None = None
    """STEP "RECIPE FLAGS": at this step, go on with another optimizer, such as 200 "snsm demo --rank 48"."""

    recipe: ClassVar[str] = ""  # the module in recipes/, and what else tells its runs from others
    about: ClassVar[tuple[str, ...]] = ("init", "model", "size", "prompt")  # what a swap of the optimizer leaves
    sizes: ClassVar[Mapping[str, Any]] = PRESETS  # that --model names
    kind: ClassVar[type[Config]] = LlamaConfig  # of their shapes
    matrices: ClassVar[str] = MATRICES
    vectors: ClassVar[str] = VECTORS
    blocks: ClassVar[str] = BLOCKS
    align: ClassVar[bool] = False  # epochs are whole steps
    prefix: ClassVar[str] = "optimizer"  # before an option's flag, where the recipe has a flag of that name itself
    also: ClassVar[Mapping[str, str]] = {}  # other names of the flags of "optimizer" and of options
    spelled: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # other flags whose values stand for rules
    usual: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"rank": 48},  # of any rule that has the option
        "sgd": {"momentum": 0.95, "nesterov": True},
    }
    """What options are here by default, by rule, where that is not what the rule says."""

    def __post_init__(self) -> None:
        if self.init is not None and self.init.name == CONFIG and self.init.is_file():
            object.__setattr__(self, "init", self.init.parent)
        if self.init is not None and self.tokenizer == "byte":
            object.__setattr__(self, "tokenizer", str(self.init))
        if self.options is None:
            object.__setattr__(self, "options", self.defaults(self.optimizer))

    @classmethod
    def rules(cls) -> Mapping[str, Family[Any]]:
        """What --optimizer may name."""
        return RULES

    @classmethod
    def listed(cls) -> Collection[str]:
        """Those of its names that help and errors list."""
        return [*cls.rules()]

    @classmethod
    def defaults(cls, name: str, sizes: Any = None) -> Any:
        """The options of the rule of this name: its own defaults, this recipe's `usual` ones, and of `sizes`, the
        options of another rule, rank and gap. Raises UsageError for an unknown name."""
        if name not in cls.rules():
            raise UsageError(f"optimizer {name!r} is not known; give one of {', '.join(cls.listed())}")
        family = cls.rules()[name]
        known = {f.name for f in dataclasses.fields(family.options)}
        sized = {size: value for size in SIZES if (value := getattr(sizes, size, None)) is not None}
        given = {**cls.usual.get("", {}), **sized, **cls.usual.get(name, {})}
        return family.default(**{option: value for option, value in given.items() if option in known})

    def under(self, name: str) -> Any:
        """This config with another rule, of the same rank and gap where it has them. Raises UsageError."""
        if name == self.optimizer:
            return self
        options = self.defaults(name, self.options)
        return dataclasses.replace(self, optimizer=name, options=options, lr_of=self.lr_of or self.optimizer)

    @classmethod
    def flag_of(cls, option: str) -> str:
        """The flag of a rule's option, or of "optimizer"."""
        taken = option != "optimizer" and option in {f.name for f in dataclasses.fields(cls)}
        return f"--{cls.prefix}-{option}".replace("_", "-") if taken else f"--{option}".replace("_", "-")

    def rule(self) -> Rule:
        """The rule with its options. Raises UsageError, which names the flag, for options that it does not take."""
        family = self.rules().get(self.optimizer)
        if family is None or not isinstance(self.options, family.options):
            raise UsageError(f"--optimizer {self.optimizer}: got options {self.options!r}, which are another rule's")
        try:
            return family.of(self.options)
        except UsageError as error:
            names = "|".join(f.name for f in dataclasses.fields(self.options))
            said = re.sub(rf"^(\w+: )({names})\b", lambda found: found[1] + self.flag_of(found[2]), str(error))
            raise UsageError(said) from None

    @property
    def named(self) -> str:
        """The model, as folders are named."""
        return self.model if self.init is None else self.init.resolve().name

    @property
    def trains(self) -> str:
        """What tells this recipe's runs from each other, in folders and pictures."""
        return self.optimizer

    def check(self) -> None:
        super().check()
        self.rule()
        if self.init is not None and self.size != Size():
            raise UsageError("--size: --init gives the model with its sizes; leave one of them out")
        self.check_init(plan=True)
        if self.rest == "same" and self.optimizer == "adamw":
            raise UsageError("--rest same: changes nothing where --optimizer is adamw, which trains the rest anyway")
        self.at_least("lr", 0)
        if not self.lr < 3e38:
            raise UsageError(f"--lr must be a float32, got {self.lr}")
        self.at_least("weight_decay", 0)
        if self.swap != "never" and self.resume == "never":
            raise UsageError(f"--swap {self.swap}: there is no state to convert; give --resume a run or a checkpoint")
        if self.swap_at and not 0 < self.swap_at[0] < self.steps:
            raise UsageError(f"--swap-at must name a step from 1 to {self.steps - 1}, got {self.swap_at[0]}")

    def check_init(self, plan: bool = False) -> None:
        """Raises UsageError where the folder of --init is not a model for this run. A plan does without weights."""
        if self.init is None or not (plan or self.resume == "never"):
            return
        bare = plan and init.bare(self.init)
        init.check(self.init, self.sequence, read=self.resume == "never" and not bare)
        if not bare:
            self.shape(load_tokenizer(self.tokenizer, self.eos).vocab_size)

    def vocabulary(self) -> int:
        """The tokens of the model, before any data are read. Raises UsageError where the tokenizer cannot be read."""
        if self.init is not None and init.bare(self.init):
            return init.shape(self.init, 0, "", self.kind).vocab_size
        byte = self.tokenizer == "byte"
        return int(self.sizes[self.model].vocab_size) if byte else load_tokenizer(self.tokenizer, self.eos).vocab_size

    def network(self, vocabulary: int) -> Any:
        """The model, for a tokenizer of so many tokens: called where tensors have no memory. It has `segments()`,
        `allocate(device)`, and a `config` with `to_hf()`. Raises UsageError."""
        return Llama(self.shape(vocabulary))

    def fill(self, model: Any, params: Params) -> None:
        """The values that a new run begins with, for parameters that have memory. Raises UsageError."""
        if self.init is not None:
            init.fill(self.init, model, params)
        else:
            model.init_weights(self.seed)

    def layers(self, params: Params) -> Groups:
        """The layers of the model, for masks that choose among them."""
        return layers(trainable(params), self.blocks)

    def groups(self, params: Params) -> list[Group]:
        """Who trains what."""
        return groups_for(self, self.rule(), params)

    def optimizer_for(self, setup: "Setup") -> Optimizer:
        """The optimizer: rules for groups, and what wraps them."""
        groups = keep(self.groups(setup.params), self.moments_dtype, self.bases_dtype, self.precision == "bf16+8")
        return partition(setup.params, groups, self.stagger)

    def settled(self, epoch: int) -> Any:
        """This config, with what follows from an epoch being so many steps."""
        return self

    def blank(self, rows: int) -> Batch:
        """A batch as the run has them, on the current device, that says nothing: what a plan needs of it."""
        return language.blank(rows, self.sequence, self.documents == "apart")

    def notes(self, setup: "Setup", optimizer: Optimizer) -> list[str]:
        """What a user should know of the optimizer for this run."""
        if not self.lr_of:
            return []
        return [
            f"--lr {self.lr:g} is this recipe's rate for {self.lr_of}, not chosen for {self.optimizer}: try others "
            "(recipes.compare does)"
        ]

    def plain(self) -> dict[str, Any]:
        """Every field as JSON can hold it, and the recipe."""
        return {k: value for k, value in super().plain().items() if k != "lr_of"} | {"recipe": self.recipe}

    def shape(self, vocab_size: int) -> Any:
        """The model's configuration. Raises UsageError where sizes do not go together."""
        if self.init is not None:
            return init.shape(self.init, vocab_size, self.tokenizer, LlamaConfig)
        given = {k: v for k, v in dataclasses.asdict(self.size).items() if v is not None}
        if "num_attention_heads" in given:  # a preset's grouping means nothing for another number of heads
            given.setdefault("num_key_value_heads", None)
        preset = PRESETS[self.model]
        positions = max(preset.max_position_embeddings, self.sequence)
        try:
            return dataclasses.replace(preset, vocab_size=vocab_size, max_position_embeddings=positions, **given)
        except ValueError as error:
            raise UsageError(str(error)) from None


def groups_for(config: TrainConfig, rule: Rule, params: Params, matrices: Sequence[str] = ()) -> list[Group]:
    """`rule` on the matrices that match, by default the config's; on the rest, if there is any, what `rest` says."""
    matrices = matrices or (config.matrices,)
    if rule.name == "adamw" and config.rest_lr is None and config.rest == "adamw":
        return [
            Group("adamw-norms", rule, (config.vectors,), config.lr, 0.0, "norms and biases: never decayed"),
            Group("adamw", rule, ("",), config.lr, config.weight_decay, "everything else"),
        ]
    why = "matrices of attention and MLP" if tuple(matrices) == (config.matrices,) else "asked for by --match"
    rest = rest_for(config, params, rule, matrices)
    return [Group(rule.name, rule, tuple(matrices), config.lr, config.weight_decay, why), *rest]


class Setup(NamedTuple):
    """What an optimizer that wraps another may depend on."""

    model: Any
    params: Params
    epoch: int  # steps in one pass over the data, the last one filled up
    key: Key
