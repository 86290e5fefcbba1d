"""The demo page in words: the running explanation (Markdown) and the tables of answers and routes (HTML).

Everything that comes from a model (class names) is escaped.
"""

import html

from torch import Tensor

from .scene import MERGED_STEPS, AttackSettings, DemoModel, Look, Scene, answers, flipped, kept_alphas

TITLES = {
    "F_S": ("F_S · standard", "accurate, easily fooled"),
    "F_R": ("F_R · robust", "trained under attack"),
    "F_D": ("F_D · dual", "the mixture of both"),
    "the model": ("The model", "one classifier"),
}
NORM_WORDS = {"linf": "each pixel", "l2": "the whole image"}
MARKDOWN_SIGNS = "\\`*_{}[]<>()#+-.!|~&"


def percent(share: float) -> str:
    """A probability for people: "97 %", "more than 99 %", "less than 1 %"."""
    if share > 0.995:  # it would round to 100 %, which no model is sure of
        return "more than 99 %"
    return "less than 1 %" if share < 0.005 else f"{100 * share:.0f} %"


def radius(eps: float, norm: str) -> str:
    """A radius in grey levels and as a fraction, such as "8 of 255 grey levels (0.031)"."""
    levels = f"{255 * eps:.4g} of 255 grey levels ({eps:.3g})"
    return levels if norm == "linf" else f"an L2 distance of {levels}"


def plain(name: str) -> str:
    """A class name that Markdown shows as it is."""
    return "".join(f"\\{sign}" if sign in MARKDOWN_SIGNS else sign for sign in " ".join(name.split()))


def best(demo: DemoModel, probs: Tensor) -> tuple[str, float]:
    """Name and probability of the first answer."""
    index = int(probs.argmax())
    return demo.labels[index], float(probs[index])


# --- the running explanation -----------------------------------------------------------------------------------------


def explain(demo: DemoModel, scene: Scene | None, alpha: float | None) -> str:
    """Describe in plain words, as Markdown, what there is to see.

    Args:
        demo: The model.
        scene: The image; None before one was chosen.
        alpha: Where the dial stands; None without one.
    """
    if scene is None:
        return "**Choose an example or drop an image** on the left; then press *Attack*."
    clean = answers(demo, scene.clean_look, alpha)
    if scene.attacked_look is None:
        says = "; ".join(f"{part} says **{plain(label)}** ({percent(p)})" for part, label, p in tops(demo, clean))
        sentences = [f"**Clean image.** {says}."]
        if demo.dual:
            listens = "has weights between those of both, F_R's" if demo.merged else "listens to F_R"
            sentences.append(f"F_D {listens} with weight alpha = {alpha:.2f}.")
        return " ".join([*sentences, "Press *Attack* to look for a small change that makes the answer wrong."])
    attacked = answers(demo, scene.attacked_look, alpha)
    lines = [describe_attack(scene)]
    lines += [f"- {change_of(demo, part, clean[part], attacked[part])}" for part in demo.parts]
    lines += [f"- {route_change(scene, part)}" for part in scene.clean_look.routes]
    return "\n".join([*lines, "", conclusion(demo, scene, alpha, clean, attacked)])


def tops(demo: DemoModel, probs: dict[str, Tensor]) -> list[tuple[str, str, float]]:
    """(part, first answer, its probability) of every part."""
    return [(part, *best(demo, probs[part])) for part in demo.parts]


def describe_attack(scene: Scene) -> str:
    """Say what the attack was allowed to do, and what it did."""
    settings, change = scene.settings, (scene.attacked - scene.clean).abs()
    aim = settings.target + (f" at alpha = {settings.alpha:.2f}" if settings.target == "F_D" else "")
    mean, largest = 255 * float(change.mean()), 255 * float(change.max())
    return (
        f"**Attacked image.** {settings.steps} PGD steps against {aim}, allowed to move {NORM_WORDS[settings.norm]} "
        f"by {radius(settings.eps, settings.norm)}; pixels moved by {mean:.1f} grey levels on average, "
        f"{largest:.1f} at most.\n"
    )


def change_of(demo: DemoModel, part: str, clean: Tensor, attacked: Tensor) -> str:
    """One sentence: does this part still give its answer?"""
    (before, p_before), (after, p_after) = best(demo, clean), best(demo, attacked)
    part = part[0].upper() + part[1:]  # not capitalize(), which would write f_d's letters small
    if before == after:
        return f"{part} **still says {plain(after)}** ({percent(p_before)} before, {percent(p_after)} now)."
    return f"{part} said {plain(before)} ({percent(p_before)}) and **now says {plain(after)}** ({percent(p_after)})."


def route_change(scene: Scene, part: str) -> str:
    """One sentence: was the image sent to another expert?"""
    routes = [look.routes[part] for look in (scene.clean_look, scene.attacked_look)]
    before, after = (route.experts for route in routes)
    whose = "" if part == "the model" else f" of {part}"
    if len(after) == len(routes[1].probs):
        moved = f"moved from expert {before[0]} to expert {after[0]}" if flipped(scene, part) else f"on {after[0]}"
        return f"The router{whose} mixes all experts, with most weight {moved}."
    if flipped(scene, part):
        return f"The route{whose} **flipped** from {experts(before)} to {experts(after)}."
    return f"The route{whose} stayed at {experts(after)}."


def experts(indices: tuple[int, ...]) -> str:
    """Expert numbers as words."""
    return ("expert " if len(indices) == 1 else "experts ") + ", ".join(map(str, indices))


def conclusion(
    demo: DemoModel, scene: Scene, alpha: float | None, clean: dict[str, Tensor], attacked: dict[str, Tensor]
) -> str:
    """Say what follows for the reader, and what does not."""
    part = demo.parts[-1]
    held = int(clean[part].argmax()) == int(attacked[part].argmax())
    if not demo.dual:
        failed = "The model withstands this image. That proves nothing: a stronger attack may find more."
        return failed if held else "The attack fools the model."
    found = f"{part} withstands this image" if held else f"The attack fools {part}"
    # neighbours are one step apart, up to rounding
    kept, gap = kept_alphas(demo, scene), 1.5 / (MERGED_STEPS if demo.merged else 100)
    where = "at no position of the dial" if not kept else f"at alpha {ranges(kept, gap)}"
    moved = ""
    if scene.settings.target == "F_D" and abs(scene.settings.alpha - alpha) > 1e-9:
        moved = " The dial has moved since the attack was made: press *Attack* again for one made for it."
    return (
        f"{found} at alpha = {alpha:.2f}. It keeps its answer on **this** image {where}; an attack made for "
        f"another alpha, or a stronger one, may find more.{moved}"
    )


def ranges(values: list[float], gap: float = 0.015) -> str:
    """Positions in words: "0.62 to 1.00", "0.00 to 0.10 and 0.90 to 1.00"."""
    groups: list[list[float]] = []
    for value in values:
        if groups and value - groups[-1][-1] <= gap:
            groups[-1].append(value)
        else:
            groups.append([value])
    return " and ".join(f"{g[0]:.2f}" if len(g) == 1 else f"{g[0]:.2f} to {g[-1]:.2f}" for g in groups)


# --- tables ----------------------------------------------------------------------------------------------------------


def answers_html(demo: DemoModel, scene: Scene | None, alpha: float | None, count: int = 3) -> str:
    """A card per part with the first answers, clean and attacked, as bars; and the route where there is one."""
    if scene is None:
        return ""
    looks = {"clean": scene.clean_look, "attacked": scene.attacked_look}
    probs = {when: answers(demo, seen, alpha) for when, seen in looks.items() if seen is not None}
    cards = []
    for part in demo.parts:
        title, subtitle = TITLES[part]
        if part == "F_D":
            subtitle = f"{1 - alpha:.2f} · F_S + {alpha:.2f} · F_R" + ", weight by weight" * demo.merged
        first = int(probs["clean"][part].argmax())
        body = "".join(
            f'<div class="dm-when">{when} image</div>{bars(demo, by_part[part], first, count)}'
            + route_html(looks[when], part, when == "attacked" and part in looks[when].routes and flipped(scene, part))
            for when, by_part in probs.items()
        )
        name = part.replace(" ", "-")
        cards.append(f'<section class="dm-card" id="card-{name}"><h4>{title}</h4><p>{subtitle}</p>{body}</section>')
    return f'<div class="dm-cards">{"".join(cards)}</div>'


def bars(demo: DemoModel, probs: Tensor, clean_answer: int, count: int) -> str:
    """The most probable classes as labelled bars: the clean image's answer green, one that took its place red."""
    rows = []
    top = probs.topk(min(count, len(probs)))
    for rank, (p, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
        kind = "kept" if index == clean_answer else ("changed" if rank == 0 else "other")
        name = html.escape(demo.labels[index])
        rows.append(
            f'<div class="dm-bar dm-{kind}" title="{name}: {p:.4f}">'
            f'<span class="dm-fill" style="width:{100 * p:.1f}%"></span>'
            f'<span class="dm-name">{name}</span><span class="dm-share">{100 * p:.1f} %</span></div>'
        )
    return "".join(rows)


def route_html(seen: Look, part: str, changed: bool) -> str:
    """The route of a mixture, and the router's probability of each expert; empty for other parts."""
    route = seen.routes.get(part)
    if route is None:
        return ""
    shares = (f"{i}:&nbsp;{100 * p:.0f}&nbsp;%" for i, p in enumerate(route.probs))
    marked = (f"<b>{share}</b>" if i in route.experts else share for i, share in enumerate(shares))
    flip = ' <span class="dm-flip">flipped</span>' if changed else ""
    return f'<div class="dm-route"><b>{experts(route.experts)}</b>{flip}<br>router {" · ".join(marked)}</div>'


def attack_note(settings: AttackSettings) -> str:
    """The radius below its slider, in both units."""
    return f"At most {radius(settings.eps, settings.norm)}, for {NORM_WORDS[settings.norm]}."
