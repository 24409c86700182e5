"""What a recipe is told that classifies images: the data, what is made of them, and a ViT or a ResNet.

--data is a folder (or file) of one of these forms: MNIST's idx files; CIFAR's Python batches; one .npz of JPEGs that
share a header; train/CLASS/ and val/CLASS/ with image files. Crops and reflections are functions of the seed and the
place in training, so a resumed run sees what the run without a break would have seen.

`--preset` takes a paper's settings; each recipe says where its own come from. Without it, the settings are ours, for
two cores.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from engine.data.images.augment import Augment
from engine.step.segments import Batch
from engine.tasks import images
from models import encoder_weights, resnet, vit_weights, weights
from models.vit import ViT
from models.vit_config import ViTConfig
from optimizers.contract import Group, Optimizer, Params, UsageError
from optimizers.flattened import flattened

from .config import Setup, Size, TrainConfig, groups_for
from .epochs import EpochConfig
from .errors import usage

PADDING = 4
Preset = Literal["here", "cifar10", "cifar100", "imagenet"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig(EpochConfig):
    """Flags of every recipe that classifies images."""

    data: tuple[str, ...] = ()
    """The folder or file of the images; see above."""
    preset: Preset = "here"
    """Settings under the flags that are given: ours, for two cores, or the paper's for this set of images."""
    train_images: int = 0
    """Train on so many images, always the same ones; 0: all."""
    eval_images: int = 0
    """Held-out images per evaluation, always the same ones; 0: all."""
    num_classes: int = 0
    """The number of classes that the data must have; 0: whatever they have, and 10 for a plan."""
    channels: int = 0
    """The channels that images must have; 0: whatever they have, and 3 for a plan."""
    resize: int = 0
    """Of folders of image files: read the largest square in the middle, in so many rows and columns; 0: the images as
    they are, which must then be of one size."""
    image_size: int = 0
    """Rows and columns that the model sees; 0: those of the data or of the model of --init, and 32 for a plan."""
    augment: Augment = "crop-flip"
    """What is made of a training image: a reflection of every second one, and a crop of it padded with zeros, or a crop
    of random size."""
    padding: int = PADDING
    """crop-flip: by how many pixels an image may be moved."""
    norm: Literal["half", "imagenet", "none"] = "imagenet"
    """What is subtracted from pixels in [0, 1], and what they are divided by: both 0.5, or ImageNet's by channel."""
    epochs: float = 3.0
    """Passes over the data, in the place of --steps; an epoch is filled up to whole steps."""
    eval_epochs: float = 1.0
    """Passes between evaluations, in the place of --eval-every."""
    micro_batch: int = 128
    """Images that go through the model at once."""
    labels: tyro.conf.Suppress[tuple[str, ...]] = ()
    found: tyro.conf.Suppress[tuple[int, ...]] = ()
    """Channels and size that the data have."""

    model: tyro.conf.Suppress[str] = "vit"  # type: ignore[assignment]
    size: tyro.conf.Suppress[Size] = dataclasses.field(default_factory=Size)
    validation: tyro.conf.Suppress[tuple[str, ...]] = ()
    prompt: tyro.conf.Suppress[str] = ""
    field: tyro.conf.Suppress[str] = "text"
    tokenizer: tyro.conf.Suppress[str] = "byte"
    eos: tyro.conf.Suppress[str | None] = None
    allow_unknown: tyro.conf.Suppress[float] = 0.01
    allow_malformed: tyro.conf.Suppress[float] = 0.0
    documents: tyro.conf.Suppress[Literal["joined", "apart"]] = "joined"
    sequence: tyro.conf.Suppress[int] = 256
    eval_windows: tyro.conf.Suppress[int] = 64

    align = True
    about: ClassVar = (
        *TrainConfig.about,
        *("preset", "train_images", "eval_images", "num_classes", "channels", "resize", "image_size", "augment"),
        *("padding", "norm", "epochs", "eval_epochs", "labels", "found"),
    )

    @classmethod
    def published(cls, preset: str) -> Mapping[str, Any]:
        """Fields as a paper has them for this set. Raises UsageError where it says nothing of it."""
        raise UsageError(f"--preset {preset}: this recipe has no published settings for it; leave it out")

    def asked_of_paper(self, given: Mapping[str, str]) -> Mapping[str, Any]:
        preset = given.get("--preset", "here")
        return {} if preset == "here" else {**self.published(preset), "preset": preset}

    @property
    def named(self) -> str:
        source = Path(self.data[0]).resolve() if self.data else Path("images")
        return f"{self.model if self.init is None else self.init.resolve().name}-{source.stem}"

    @property
    def side(self) -> int:
        """Rows and columns that the model sees."""
        return self.image_size or (self.found[1] if self.found else 32)

    @property
    def planes(self) -> int:
        """Channels of an image."""
        return self.found[0] if self.found else self.channels or 3

    def check(self) -> None:
        super().check()
        if len(self.data) > 1:
            raise UsageError(f"--data: got {len(self.data)} paths, expected one folder or file with both splits")
        for name in ("train_images", "eval_images", "num_classes", "channels", "resize", "image_size", "padding"):
            self.at_least(name, 0)
        if self.num_classes == 1:
            raise UsageError("--num-classes: got 1, expected two or more")
        if self.padding != PADDING and self.augment != "crop-flip":
            raise UsageError(f"--padding: changes nothing with --augment {self.augment}; leave it out")
        if self.found or self.image_size or self.init:  # else the data say the size, which are not read yet
            with usage(""):
                self.network_config(self.vocabulary())

    def check_init(self, plan: bool = False) -> None:
        """Nothing is begun with."""

    def vocabulary(self) -> int:
        """The number of classes."""
        return len(self.labels) or self.num_classes or 10

    def names(self, classes: int) -> tuple[str, ...]:
        return self.labels or tuple(map(str, range(classes)))

    def network_config(self, classes: int) -> Any:
        """The model's shape. Raises ValueError."""
        raise NotImplementedError

    def blank(self, rows: int) -> Batch:
        return images.blank(rows, self.planes, self.side)


@dataclass(frozen=True)
class Body:
    """The ViT where --init names none."""

    hidden_size: int = 64
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 128
    patch_size: int = 4


@dataclass(frozen=True, kw_only=True)
class VitConfig(VisionConfig):
    """Flags of every recipe that trains a ViT."""

    init: Path | None = None
    """A folder with a ViT as Hugging Face publishes it, whose weights the run begins with; its classifier is drawn anew
    where it is of other classes."""
    body: Body = dataclasses.field(default_factory=Body)
    """Sizes of a ViT that is drawn."""
    norm: Literal["half", "imagenet", "none"] = "half"
    """What is subtracted from pixels in [0, 1], and what they are divided by: both 0.5, or ImageNet's by channel."""

    matrices = r"\blayer\.\d+\..*(query|key|value|dense)\.weight$"  # attention and MLP
    vectors = r"layernorm|bias$|cls_token|position_embeddings"
    blocks = r"\bencoder\.layer\.(\d+)\."
    about: ClassVar = (*VisionConfig.about, "body")

    @property
    def side(self) -> int:
        return super().side if self.init is None else self._published().image_size

    def _published(self) -> ViTConfig:
        assert self.init is not None
        with usage("--init"):
            return vit_weights.config_of(self.init)

    def check(self) -> None:
        if self.init is not None:
            if not self.init.is_dir():
                raise UsageError(f"--init {self.init}: is no folder; give that of a ViT as Hugging Face publishes it")
            if self.body != Body():
                raise UsageError("--body: --init gives the model with its sizes; leave one of them out")
            size = self._published().image_size
            if self.image_size not in (0, size):
                raise UsageError(f"--image-size: got {self.image_size}, expected {size}, the model's; leave it out")
        super().check()

    def check_init(self, plan: bool = False) -> None:
        if self.init is None or self.resume != "never" or (plan and not weights.is_folder(self.init)):
            return
        with usage("--init"):
            vit_weights.found_in(self.init, vit_weights.empty(self.network_config(self.vocabulary())))

    def network_config(self, classes: int) -> ViTConfig:
        names = self.names(classes)
        if self.init is None:
            sizes = dataclasses.asdict(self.body)
            return ViTConfig(**sizes, image_size=self.side, num_channels=self.planes, labels=names)
        found = self._published()
        if self.found and self.found[0] != found.num_channels:
            raise UsageError(
                f"--init {self.init}: takes images of {found.num_channels} channels, and the data have "
                f"{self.found[0]}; give another one"
            )
        return dataclasses.replace(found, labels=names)

    def network(self, vocabulary: int) -> ViT:
        with usage(""):
            return ViT(self.network_config(vocabulary))

    def fill(self, model: ViT, params: Params) -> None:
        if self.init is None:
            model.init_weights(self.seed)
            return
        with usage("--init"):
            encoder_weights.fill(params, model, vit_weights.found_in(self.init, model), self.seed)

    def notes(self, setup: Setup, optimizer: Optimizer) -> list[str]:
        said = super().notes(setup, optimizer)
        if self.init is None or self.resume != "never" or not weights.is_folder(self.init):
            return said
        drawn = vit_weights.found_in(self.init, setup.model).drawn
        return [*said, f"drawn anew, as {self.init} has others: {', '.join(drawn)}"] if drawn else said


@dataclass(frozen=True, kw_only=True)
class ResnetConfig(VisionConfig):
    """Flags of every recipe that trains a ResNet."""

    model: Literal["resnet20", "resnet18"] = "resnet20"
    """ResNet-20 as its paper has it for CIFAR, or torchvision's ResNet-18."""
    init: tyro.conf.Suppress[Path | None] = None
    optimizer: str = "sgd"
    """The rule for the weights of convolutions, which those of matrices see as (out, in k k); AdamW trains the rest,
    but SGD and other rules that move each entry by itself train everything, unless --rest-lr is given. Its options are
    the last flags here."""

    matrices = r"conv\d\.weight$|downsample\.0\.weight$"
    vectors = r"\bbn\d|downsample\.1|bias$"
    blocks = r"\blayer\d+\.(\d+)\."
    usual: ClassVar = {"": {"rank": 8, "update_proj_gap": 50, "proj_type": "auto"}, "sgd": {"momentum": 0.9}}

    def network_config(self, classes: int) -> resnet.ResNetConfig:
        return resnet.preset(self.model, self.names(classes), self.planes)

    def network(self, vocabulary: int) -> resnet.ResNet:
        with usage(""):
            return resnet.ResNet(self.network_config(vocabulary))

    def fill(self, model: resnet.ResNet, params: Params) -> None:
        model.init_weights(self.seed)

    def groups(self, params: Params) -> list[Group]:
        """Everything is one rule's where that moves each entry by itself; else convolutions are, as matrices."""
        rule = flattened(self.rule())
        if not rule.elementwise or (self.rest_lr, self.rest) != (None, "adamw"):
            first, *rest = groups_for(self, rule, params)
            last = "the last layer: rows, not a map"
            rest = [group._replace(why=last) if group.name == "adamw-rest" else group for group in rest]
            return [first._replace(why="convolutions, as matrices (out, in k k)"), *rest]
        return [
            Group(f"{rule.name}-norms", rule, (self.vectors,), self.lr, 0.0, "norms and biases: never decayed"),
            Group(rule.name, rule, ("",), self.lr, self.weight_decay, "convolutions and the last layer"),
        ]


# Settings that OMGD's paper (arXiv 2603.05960) and its code share over masks and baselines. [P] paper, [C] code.
RESNET: Mapping[str, Any] = {
    "lr": 0.1,  # [P]
    "weight_decay": 1e-3,  # ours: torch's 1e-4 is coupled, and a momentum of 0.9 sums it to ten times as much
    "schedule": "multistep",  # [P, C]
    "warmup": 0,
    "epochs": 200.0,  # [P]
}
RESNETS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {**RESNET, "milestones": (0.5, 0.75), "micro_batch": 256, "seed": 222},  # [P]; the code's batch is 128
    "cifar100": {**RESNET, "milestones": (0.3, 0.6, 0.75), "gamma": 0.2, "micro_batch": 256, "seed": 222},  # [P]
    "imagenet": {  # [P, C]
        **RESNET,
        "epochs": 100.0,
        "milestones": (0.3, 0.6, 0.9),
        "micro_batch": 128,
        "accumulation": 4,
        "model": "resnet18",
        "resize": 256,
        "image_size": 224,
        "augment": "resized-crop-flip",
        "seed": 888,
    },
}
VIT: Mapping[str, Any] = {
    "lr": 1e-4,  # [P]
    "weight_decay": 1e-4,  # [P]
    "micro_batch": 128,  # [P], on each of 4 GPUs
    "accumulation": 4,
    "schedule": "multistep",  # [P]: times 0.95 every 2 epochs
    "gamma": 0.95,
    "warmup": 0,
    "augment": "resized-crop-flip",  # [C], which also has RandAugment
    "norm": "half",
    "seed": 555,  # [C]
}


def vit_of(epochs: int) -> dict[str, Any]:
    """The ViT's settings for so many epochs, of which the rate falls after every second one."""
    return {**VIT, "epochs": float(epochs), "milestones": tuple(k / epochs for k in range(2, epochs, 2))}


def vits(preset: str) -> dict[str, Any]:
    """arXiv 2603.05960, Table 5: 100 epochs on CIFAR, 10 on ImageNet, of vit-base-patch16-224-in21k (--init)."""
    return {**vit_of(10), "resize": 256} if preset == "imagenet" else vit_of(100)


# Ours, for two cores.
SMALL_RESNET: Mapping[str, Any] = {"lr": 0.1, "weight_decay": 1e-3, "floor": 0.0, "epochs": 2.0}
SMALL_VIT: Mapping[str, Any] = {"lr": 2e-3, "weight_decay": 0.05, "floor": 0.0, "epochs": 4.0}
