"""Draws ``results/*.json``: a table, ``results/README.md``, and plots beside it.

``python benchmarks/report.py``
"""

import json
from typing import Any, Dict, List

import matplotlib
from common import RESULTS

matplotlib.use("Agg")
from matplotlib import pyplot


def table(header: List[str], rows: List[List[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def ratio(value: Any, reference: Any) -> str:
    return f"{value / reference:.2f}" if value is not None and reference else "-"


def number(value: Any, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=100)


def loss(rows: List[Dict[str, Any]]) -> str:
    """Time over the matrix products alone, memory over plain cross-entropy, of the same run."""
    at = {(row["precision"], row["vocabulary"], row["variant"]): row for row in rows}
    lines = []
    for row in rows:
        where = row["precision"], row["vocabulary"]
        products, plain = (at.get((*where, name), {}) for name in ("products", "plain cross-entropy"))
        time, peak = row.get("seconds"), row.get("peak_gb")
        over = "-" if "cross-entropy" in row["variant"] else ratio(time, products.get("seconds"))
        lines.append(
            [row["precision"], f"{row['vocabulary']:,}", row["variant"], row.get("skipped") or number(time, 3), over]
            + [number(peak), ratio(peak, plain.get("peak_gb"))]
        )
    for what, name in (("peak_gb", "loss-memory"), ("seconds", "loss-time")):
        figure, axes = pyplot.subplots(figsize=(8, 4))
        for precision, variant in dict.fromkeys((row["precision"], row["variant"]) for row in rows):
            of_line = [row for row in rows if (row["precision"], row["variant"]) == (precision, variant)]
            points = [(row["vocabulary"], row[what]) for row in of_line if what in row]
            axes.loglog(*zip(*points), marker="o", label=f"{variant}, {precision}")
        axes.set_xlabel("words")
        axes.set_ylabel({"peak_gb": "peak memory, GB", "seconds": "seconds for 2,048 tokens"}[what])
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines, not on them
        draw(figure, name)
    header = ["precision", "vocabulary", "loss", "seconds", "over its products", "peak GB", "over plain cross-entropy"]
    return table(header, lines) + "\n![memory](loss-memory.png) ![time](loss-time.png)\n"


def over_first(rows: List[Dict[str, Any]], name: str, digits: int) -> List[List[str]]:
    """Of each row its precision, its variant, what it measured under `name`, and that over the first row's."""
    first = {row["precision"]: row[name] for row in reversed(rows)}
    return [
        [row["precision"], row["variant"], number(row[name], digits), ratio(row[name], first[row["precision"]])]
        for row in rows
    ]


def steps(rows: List[Dict[str, Any]]) -> str:
    """Speed and memory over upstream without distillation, of the same run."""
    speed, memory = over_first(rows, "words_per_second", 0), over_first(rows, "peak_gb", 2)
    lines = [fast + lean[2:] for fast, lean in zip(speed, memory)]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 1 + 0.4 * len(rows)), sharey=True)
    names = [f"{row['variant']}, {row['precision']}" for row in rows]
    for axes, what, found in zip(panels, ("words per second", "peak memory"), (speed, memory)):
        bars = axes.barh(names, [float(line[3]) for line in found])
        axes.bar_label(bars, [line[3] for line in found], padding=2)
        axes.margins(x=0.2)
        axes.set_xlabel(f"{what} over upstream's")
    panels[0].invert_yaxis()  # the first one on top
    draw(figure, "steps")
    header = ["precision", "training", "words per second", "over upstream", "peak GB", "over upstream"]
    return table(header, lines) + "\n![speed and memory](steps.png)\n"


def queue_gate(rows: List[Dict[str, Any]]) -> str:
    lines = [
        [row["precision"], row["window"], row["languages"], f"{row['size']:,}", number(1e3 * row["selection"], 3)]
        + [number(1e3 * row["search"], 3), f"{100 * row['share']:.2f} %"]
        for row in rows
    ]
    header = ["precision of the step", "window", "languages", "tokens of a queue"]
    header += ["selection, ms", "plain search, ms", "of a step"]
    return table(header, lines)


def queue_traffic(rows: List[Dict[str, Any]]) -> str:
    """Of one worker and one update; milliseconds on paper, from the bytes alone."""
    lines = [
        [row["strategy"], row["workers"], f"{row['tokens']:,}", row["messages"], f"{row['queues_bytes']:,.0f}"]
        + [number(row["bytes_per_token"], 1), *(number(time) for time in row["milliseconds"].values())]
        + [f"{row['gradient_bytes']:,.0f}", f"{100 * row['over_gradients']:.2f} %"]
        for row in rows
    ]
    header = ["strategy", "workers", "tokens of all", "messages", "bytes for the queues", "a token"]
    header += [f"ms at {gbit} Gbit/s" for gbit in rows[0]["milliseconds"]]
    return table([*header, "bytes for the gradients", "queues over gradients"], lines)


def decoding(rows: List[Dict[str, Any]]) -> str:
    """Speed over upstream's transformer, of the same run."""
    header = ["precision", "architecture", "words per second", "over upstream"]
    return table(header, over_first(rows, "words_per_second", 0))


def selection_share(rows: List[Dict[str, Any]]) -> str:
    """The mean of the last half of the updates, the least and the most of the languages of a kind."""
    rate, frequent = 0.5, ("de", "es")
    lines = []
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), sharex=True, sharey=True)
    for row in rows:
        kinds: Dict[bool, List[List[float]]] = {True: [], False: []}
        for language, shares in row["shares"].items():
            kinds[language in frequent].append(shares)
        label = f"{row['window']}, {row['size']:,}"
        style = {"each": "-", "shared": "--"}[row["window"]]
        line = [row["window"], f"{row['size']:,}"]
        for axes, kind in zip(panels, (True, False)):
            late = [sum(shares[len(shares) // 2 :]) / len(shares[len(shares) // 2 :]) for shares in kinds[kind]]
            line.append(" to ".join(dict.fromkeys(number(share) for share in (min(late), max(late)))))
            points = [sum(shares) / len(shares) for shares in zip(*kinds[kind])]
            means = [
                sum(points[max(i - 4, 0) : i + 1]) / len(points[max(i - 4, 0) : i + 1]) for i in range(len(points))
            ]
            axes.plot(row["updates"], means, style, label=label)
        lines.append(line)
    for axes, title in zip(panels, ("frequent languages (de, es)", "rare languages (bn, hi, mr, ta)")):
        axes.axhline(rate, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="updates", ylim=(0, 0.7))
    panels[0].set_ylabel("share selected")
    panels[1].legend(
        fontsize="x-small", loc="upper center", ncol=3, title="--kd-queue-window, -size", title_fontsize="x-small"
    )
    draw(figure, "selection_share")
    pyplot.close(figure)
    return table(["--kd-queue-window", "--kd-queue-size", "de, es", "bn, hi, mr, ta"], lines)


def adapter_tuning(rows: List[Dict[str, Any]]) -> str:
    """Time and memory of a step over full fine-tuning's, of the same run."""
    time, memory = over_first(rows, "seconds", 3), over_first(rows, "gb", 2)
    trained = [f"{row['trained']:,}" for row in rows]
    lines = [fast[:2] + [count] + fast[2:] + lean[2:] for count, fast, lean in zip(trained, time, memory)]
    header = ["precision", "tuning", "trained", "seconds a step", "over full", "GB beyond the model", "over full"]
    return table(header, lines)


def startup(rows: List[Dict[str, Any]]) -> str:
    (row,) = rows
    line = [number(row["ratio"], 3), number(1e3 * row["difference"]), number(1e3 * row["hook"])]
    return table(["with the hook over without", "difference, ms", "the hook's own import, ms"], [line])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def padding(rows: List[Dict[str, Any]]) -> str:
    """Of all positions, and of multiply-adds on paper."""
    lines = [
        [row["text"], f"{row['max_tokens']:,}", row["multiple"], row["batches"], percent(row["source"])]
        + [percent(row[name]) for name in ("target", "of_a_layer", "of_the_teacher", "of_a_step")]
        for row in rows
    ]
    header = ["sentences", "tokens a batch", "multiple of", "batches", "padding, source", "target"]
    return table([*header, "padding's feed-forward of a layer", "of the teacher's pass", "of a step"], lines)


def teacher_pass(rows: List[Dict[str, Any]]) -> str:
    """Medians over rounds, and quartiles, of what a variant took over what float32 took in the same round."""
    lines, clocks = [], [(what, clock) for what in ("pass", "step") for clock in ("seconds", "processor_seconds")]
    for row in rows:
        line = [row["variant"], row.get("skipped") or row["rounds"]]
        for what, clock in clocks if "rounds" in row else []:
            name = f"{what}_{clock}"
            low, high = map(number, row[f"{name}_quartiles"])
            line += [number(row[name]), f"{number(row[f'{name}_over_float32'])} ({low} to {high})"]
        lines.append(line)
    header = ["teacher", "rounds"]
    for what, clock in clocks:
        header += [f"{what}, {clock.replace('_', ' ')}", "over float32"]
    return table(header, lines)


def teacher_exactness(rows: List[Dict[str, Any]]) -> str:
    """Bits a token."""
    names = ("kd_kl", "moved_kd_kl", "kl_mean", "kl_max", "same_best_word")
    lines = [
        [row["variant"], *(f"{row[name]:.3g}" if name in row else row["skipped"] for name in names)] for row in rows
    ]
    return table(["teacher", "kd_kl", "more", "KL from float32, mean", "max", "same best word"], lines)


def main() -> None:
    text = "# Measured by `make bench`\n"
    titles = {
        loss: "The loss alone",
        steps: "Whole training runs",
        queue_gate: "Gate and queue",
        queue_traffic: "What the workers send each other for the queues",
        decoding: "Decoding",
        adapter_tuning: "Adapter tuning",
        selection_share: "The share of the tokens that is selected, --kd-rate 0.5",
        padding: "Padding in training",
        teacher_pass: "The teacher's pass on a CPU",
        teacher_exactness: "What that does to a trained teacher",
        startup: "The start of an interpreter, with the start-up line and without",
    }
    for section, title in titles.items():
        path = RESULTS / f"{section.__name__}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        settings = ", ".join(f"{name} {value}" for name, value in {**result["machine"], **result["settings"]}.items())
        text += f"\n## {title}\n\n{settings}\n\n{section(result['rows'])}"
    (RESULTS / "README.md").write_text(text)


if __name__ == "__main__":
    main()
