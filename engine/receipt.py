"""The table printed before step 1: who owns what, why, and what it costs. Nothing is trained that is not in it."""

from rich.table import Table

from optimizers.core import Optimizer, Params, State, state_bytes


def receipt(optimizer: Optimizer, params: Params, state: State) -> Table:
    """A row per group: patterns, rule, why, tensors, shapes, rank, parameters, state bytes, peak learning rate."""
    table = Table(title="who trains what", title_justify="left")
    for column in ("parameters", "rule", "why"):
        table.add_column(column, overflow="fold")
    for column in ("tensors", "shapes", "rank", "elements", "state MiB", "lr", "decay"):
        table.add_column(column, justify="right")
    groups = {group.name: group for group in optimizer.owner.values()}
    owned = {name: [n for n, g in optimizer.owner.items() if g.name == name] for name in groups}
    for name, own in sorted(owned.items(), key=lambda item: -sum(params[n].numel() for n in item[1])):
        group = groups[name]
        ranks = {state[n]["basis"].shape[-1] for n in own if "basis" in state.get(n, {})}
        table.add_row(
            " ".join(group.match) or "all",
            group.rule.name,
            group.why,
            str(len(own)),
            str(len({params[n].shape for n in own})),
            " ".join(map(str, sorted(ranks))) or "-",
            f"{sum(params[n].numel() for n in own):,}",
            f"{sum(state_bytes(state[n]) for n in own if n in state) / 2**20:.1f}",
            f"{group.lr:g}",
            f"{group.weight_decay:g}",
        )
    total = sum(map(state_bytes, state.values()))
    weights = sum(p.numel() * p.element_size() for p in params.values())
    elements = sum(p.numel() for p in params.values())
    table.caption = (
        f"{elements:,} parameters, {weights / 2**20:.1f} MiB of weights, {total / 2**20:.1f} MiB of optimizer state "
        f"(AdamW in float32: {elements * 8 / 2**20:.1f} MiB)"
    )
    table.caption_justify = "left"
    return table
