"""A recipe's command line: its own flags, `--optimizer NAME`, and the options of that rule as flags.

The rule is found first. Then the command line is read as a config whose options are that rule's: so --help lists them,
and a flag that would change nothing is refused. A rule that is in `optimizers/registry.py` needs nothing else for this.
"""

import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

import tyro

from engine.terminal.flags import ask
from optimizers.contract import Family, UsageError, idle

from .config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)
OPTIMIZER = "optimizer"


def parse(config: Config, args: Sequence[str] | None, program: str, description: str | None) -> Config:
    """`config` with what a command line of `program` asks for; without `args` the one that was typed.

    Raises UsageError.
    """
    return settle(config, typed(args), program, description)


def parse_presets(
    presets: Mapping[str, tuple[str, Any]], args: Sequence[str] | None, program: str, description: str | None
) -> Any:
    """The same, where the first word names one of several configs, each with a line that says what it is. Those that
    train nothing have flags of their own. Raises UsageError."""
    words = typed(args)
    if words and words[0] in presets:
        said, config = presets[words[0]]
        return settle(config, words[1:], program, said, f" {words[0]}")

    def read(prog: str) -> Any:  # which shows the help, or says what is wrong
        shown = {name: (said, offered(config)) for name, (said, config) in presets.items()}
        return tyro.extras.overridable_config_cli(shown, args=words, description=description, prog=prog)

    return ask(read, program)


def settle(config: Any, words: Sequence[str], program: str, description: str | None, preset: str = "") -> Any:
    """`config` with what the words ask for, under the rule that they name. Raises UsageError."""
    under = config
    if isinstance(config, TrainConfig):
        words = respelled(config, words)
        under = asked(config, words)

    def read(prog: str) -> Any:
        shown = offered(under)
        return tyro.cli(type(shown), default=shown, args=words, description=description, prog=prog + preset)

    found = ask(read, program)
    return chosen(found, under, words) if isinstance(under, TrainConfig) else found


def typed(args: Sequence[str] | None) -> list[str]:
    """The command line, by default that of this process."""
    return [*(sys.argv[1:] if args is None else args)]


def given(words: Sequence[str]) -> list[tuple[int, tuple[str, str]]]:
    """The places of flags among words, each with its name and with its value where that stands in the same word."""
    return [(i, (word.partition("=")[0], word.partition("=")[2])) for i, word in enumerate(words) if word[:2] == "--"]


def values(words: Sequence[str]) -> dict[str, str]:
    """The value of each flag among words, in its own word or the next one; the last counts."""
    return {flag: value or (words[i + 1] if i + 1 < len(words) else "") for i, (flag, value) in given(words)}


def respelled(config: TrainConfig, words: Sequence[str]) -> list[str]:
    """The command line with the recipe's other names of flags, such as `--profile paper`, as `--optimizer NAME` and the
    flags of options. Raises UsageError."""
    also = {f"--{name}": config.flag_of(meant) for name, meant in config.also.items()}
    spelled = {f"--{name}": meant for name, meant in config.spelled.items()}
    found, rest = list[str](), iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        names = spelled.get(flag)
        if names is None:
            found.append(also.get(flag, flag) + equals + value)
            continue
        value = value if equals else next(rest, "")
        if hasattr(config, flag[2:]) and value.removeprefix("-").isdigit():  # a flag of every run, which is a number
            found += [flag, value]
            continue
        if value not in names:
            raise UsageError(f"{flag}: got {value!r}, expected one of {', '.join(names)}")
        found += [f"--{OPTIMIZER}", names[value]]
    return found


def asked(config: Config, words: Sequence[str]) -> Config:
    """`config` under the rule that the command line names, if any. Raises UsageError where it names an unknown one,
    or a flag is an option of other rules only."""
    named = [
        value if equals else (words[i + 1] if i + 1 < len(words) else "")
        for i, word in enumerate(words)
        for flag, equals, value in [word.partition("=")]
        if flag == f"--{OPTIMIZER}"
    ]
    rules, under, name = config.rules(), config, named[-1] if named else ""  # the last one counts, as of every flag
    if name and not name.startswith("-"):  # else the parser says that a value is missing
        if name not in rules:
            near = get_close_matches(name, rules, 1)
            hint = f"; perhaps {near[0]}" if near else ""
            raise UsageError(f"--{OPTIMIZER}: got {name!r}, expected one of {', '.join(config.listed())}{hint}")
        under = config.under(name)
    own = {f"--{f.name}".replace("_", "-") for f in dataclasses.fields(config)}
    own |= _options(under, rules[under.optimizer])
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if not {flag, flag.replace("--no-", "--", 1)} & own and (having := _having(under, flag)):
            raise UsageError(
                f"{flag}: {under.optimizer} has no such option, {', '.join(having)} {'have' if having[1:] else 'has'}; "
                f"leave it out, or choose another --{OPTIMIZER}"
            )
    return under


def _having(config: TrainConfig, flag: str) -> list[str]:
    """The rules that have this flag."""
    positive = flag.replace("--no-", "--", 1)
    found = [name for name, family in config.rules().items() if {flag, positive} & _options(config, family)]
    return [name for name in found if name in config.listed()] or found


def _options(config: TrainConfig, family: Family[Any]) -> set[str]:
    """The flags of a rule's options."""
    return {config.flag_of(f.name) for f in dataclasses.fields(family.options)}


def offered(config: Any) -> Any:
    """`config` as an instance of a class in which the types of `optimizer` and `options` are known, if it has them."""
    if not isinstance(config, TrainConfig):
        return config
    names: Any = Literal[tuple(dict.fromkeys([*config.listed(), config.optimizer]))]
    options = _flagged(config)
    shown: list[tuple[str, Any, Any]] = [
        (OPTIMIZER, names, dataclasses.field()),
        ("options", Annotated[type(options), tyro.conf.arg(name="")], dataclasses.field()),
        ("lr_of", tyro.conf.SuppressFixed[tyro.conf.Fixed[str]], dataclasses.field()),
    ]
    made: Any = dataclasses.make_dataclass(
        type(config).__name__, shown, bases=(type(config),), frozen=True, kw_only=True
    )
    return made(**{**_values(config), "options": options})


def _flagged(config: TrainConfig) -> Any:
    """The options, as an instance of a class that says the flags that are not named as the option."""
    options, shown = config.options, list[tuple[str, Any, Any]]()
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        flag = config.flag_of(field.name)
        if flag != f"--{field.name}".replace("_", "-"):
            named = tyro.conf.arg(name=flag.removeprefix("--"))
            shown.append((field.name, Annotated[hints[field.name], named], dataclasses.field(default=field.default)))
    if not shown:
        return options
    made: Any = dataclasses.make_dataclass(type(options).__name__, shown, bases=(type(options),), frozen=True)
    return made(**_values(options))


def _values(instance: Any) -> dict[str, Any]:
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}


def chosen(found: Any, before: Config, words: Sequence[str]) -> Config:
    """What was parsed, in the classes of `before`, which was what it began with. Raises UsageError where an option was
    given that changes nothing beside the others."""
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(before)}
    options = type(before.options)(
        **{f.name: getattr(found.options, f.name) for f in dataclasses.fields(before.options)}
    )
    for name in sorted(idle(options)):
        if getattr(options, name) != getattr(before.options, name):
            raise UsageError(
                f"{before.flag_of(name)}: changes nothing under {before.optimizer} with its other options as they are; "
                "leave it out"
            )
    sized = [flag for word in words if (flag := word.partition("=")[0]) == "--model" or flag.startswith("--size.")]
    if sized and values["init"] is not None:
        raise UsageError(f"{sized[0]}: --init gives the model with its sizes; leave one of them out")
    rated = any(word.partition("=")[0] == "--lr" for word in words)
    return type(before)(**{**values, "options": options, "lr_of": "" if rated else before.lr_of})
