"""The table printed before step 1: who owns what, why, and what it costs. Nothing is trained that is not in it."""

from rich.console import Group as RenderGroup

from optimizers.contract import Kind, Optimizer, Params, State, total_bytes

from ..terminal.tables import Fitting


def receipt(optimizer: Optimizer, params: Params, state: State) -> RenderGroup:
    """A row per group: rule, patterns and why, tensors, shapes, rank, elements, state, peak learning rate, decay."""
    rows: list[tuple[str, str, list[str]]] = []
    groups = {group.name: group for group in optimizer.owner.values()}
    owned = {name: [n for n, g in optimizer.owner.items() if g.name == name] for name in groups}
    for name, own in sorted(owned.items(), key=lambda item: -sum(params[n].numel() for n in item[1])):
        group = groups[name]
        bases = [(n, slot) for n in own if n in state for slot in optimizer.owner[n].rule.names(Kind.BASIS)]
        ranks = {state[n][slot].shape[-1] for n, slot in bases if state[n][slot].ndim > 1}
        figures = [
            str(len(own)),
            str(len({params[n].shape for n in own})),
            " ".join(map(str, sorted(ranks))) or "-",
            f"{sum(params[n].numel() for n in own):,}",
            f"{total_bytes({n: state[n] for n in own if n in state}) / 2**20:.1f}",
            f"{group.lr:g}",
            f"{group.weight_decay:g}",
        ]
        words = filter(None, [" ".join(filter(None, group.match)) or "all the rest", group.why])
        rows.append((group.rule.name, "\n".join(words), figures))
    if still := [name for name in params if name not in optimizer.owner]:
        shapes, elements = len({params[n].shape for n in still}), sum(params[n].numel() for n in still)
        names = "\n".join(still[:4]) + (f"\nand {len(still) - 4} more" if len(still) > 4 else "")
        rows.append(("frozen", names, [str(len(still)), str(shapes), "-", f"{elements:,}", "0.0", "-", "-"]))
    total = total_bytes(state)
    weights = sum(p.numel() * p.element_size() for p in params.values())
    elements = sum(p.numel() for p in params.values())
    sums = (
        f"{elements:,} parameters, {weights / 2**20:.1f} MiB of weights, {total / 2**20:.1f} MiB of optimizer state "
        f"(AdamW in float32: {elements * 8 / 2**20:.1f} MiB)"
    )
    figures = ["tensors", "shapes", "rank", "elements", "MiB", "lr", "decay"]
    return RenderGroup(Fitting("who trains what", "rule", "parameters", figures, rows), sums)
