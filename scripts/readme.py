"""Rewrites the generated parts of the READMEs: the layer table, tables from the committed CSV files, and the first picture."""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("readme")

import importlib
import inspect
import pathlib
import re
import sys

from subquad import zoo
from subquad.lra import tasks
from subquad.lra.cli import commands
from subquad.lra.data.diagnostics import configs as diagnostics
from subquad.lra.report import (
    cells,
    comparison,
    csv_rows,
    ledger,
    measurements,
    overview,
    plots,
    published,
    results,
    text_tables,
    verdicts,
)

ROOT = pathlib.Path(__file__).parents[1]
READMES = ("README.md", "kernels/README.md", "lra/README.md", "zoo/README.md")
PICTURE = ROOT / "lra" / "results" / "bench.png"
QUICKSTART = ROOT / "lra" / "results" / "quickstart.csv"
OFFLINE = ROOT / "lra" / "results" / "offline.csv"
LANGUAGE = ROOT / "lra" / "results" / "language.csv"
ABILITIES = ROOT / "lra" / "results" / "diagnostics.csv"
FLOORS = ROOT / "lra" / "results" / "floors.csv"
COSTS = ROOT / "lra" / "results" / "bench.csv"
PEERS = ROOT / "kernels" / "results" / "peers_cpu.csv"
ORACLES = ROOT / "zoo" / "results" / "oracles.csv"
CLAIMS = ROOT / "zoo" / "results" / "claims.csv"
GENERATION = ROOT / "zoo" / "results" / "generation.csv"
LAYER_COSTS = ROOT / "zoo" / "results" / "costs.csv"


def papers(layer) -> str:
    """Links to the papers that its docstring names as its source."""
    source = inspect.getdoc(layer).partition("Source:")[2]
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in re.findall(r"\d{4}\.\d{5}", source))


def families() -> dict:
    """The packages of `zoo` that hold layers, in the order of the table of layers, each with its layers by name."""
    found = {}
    for name, layer in zoo.LAYERS.items():
        found.setdefault(importlib.import_module(layer.__module__.rpartition(".")[0]), {})[name] = layer
    return found


def family_sections() -> str:
    """Family by family its docstring, and of each layer the first sentence of its own and when to choose it.

    The family's docstring is a title, a text, and below "Choose" a line for a layer: its name, a colon, a reason.
    """
    lines = []
    for family, layers in families().items():
        if not family.__doc__:
            raise ValueError(f"readme: {family.__name__} must have a docstring, got none. Say in it what its layers share.")
        text, _, choose = inspect.getdoc(family).partition("\n\nChoose\n")
        title, _, text = text.partition("\n\n")
        choices = re.findall(r"^ +(\w+): (.+)$", choose, re.MULTILINE)
        reasons = dict(choices)
        if len(choices) != len(reasons.keys() & layers.keys()):
            names = ", ".join(name for name, _ in choices)
            raise ValueError(f"readme: {family.__name__} must choose between its layers, each once, got {names}. Mend it.")
        lines += [f"### {title.rstrip('.')}", "", text, ""]
        for name, layer in layers.items():
            idea = " ".join(inspect.getdoc(layer).partition("\n\n")[0].split())
            lines.append(f"- `{name}`: {' '.join([idea, *([reasons[name]] if name in reasons else [])])}")
        lines.append("")
    return "\n".join(lines)


def oracle_table() -> str:
    """One row per layer: whose numbers it was compared with, the largest errors, and how long its file is."""
    rows = [["layer", "family", "paper", "compared with", "outputs", "gradients", "lines"]]
    compared: dict[str, list[dict[str, str]]] = {}
    for row in csv_rows.read_rows(ORACLES):
        compared.setdefault(row["layer"], []).append(row)
    if unknown := compared.keys() - zoo.LAYERS.keys():
        raise ValueError(f"readme: {ORACLES} must have rows of known layers, got {', '.join(unknown)}. Remove them.")
    for family, layers in families().items():
        for name, layer in layers.items():
            peers: dict[str, set[str]] = {}
            for row in compared.get(name, []):
                version = re.split(r", | \(", row["version"])[0]
                peers.setdefault(f"{row['peer']} {version}", set()).add(row["of"])
            others = [peer + " (mechanism)" * (kinds == {"mechanism"}) for peer, kinds in peers.items()]
            largest = [
                max((row[error] for row in compared.get(name, []) if row[error]), key=float, default="-")
                for error in ("output_error", "gradient_error")
            ]
            lines = len(inspect.getsourcelines(inspect.getmodule(layer))[0])
            folder = family.__name__.rpartition(".")[2]
            rows.append([f"`{name}`", folder, papers(layer), "; ".join(others) or "-", *largest, str(lines)])
    return text_tables.markdown(rows, left=4)


def claims_table() -> str:
    """One row per layer: what its paper says of it, from where its model is faster than softmax's here, and what it learned."""
    claims = {row["layer"]: row["claim"] for row in csv_rows.read_rows(CLAIMS)}
    if missing := zoo.LAYERS.keys() - claims.keys() - {"softmax"}:
        raise ValueError(f"readme: {CLAIMS} must say what each paper claims, got nothing for {', '.join(missing)}. Add it.")
    costs, reached = {}, {}
    for row in measurements.read_measurements(LAYER_COSTS):
        costs.setdefault(row.layer, []).append(row)
    for group in results.groups(results.read_results(ABILITIES)):
        reached[group[0].layer, group[0].task, group[0].config] = results.score_of_seeds(group).partition(" (")[0]
    shown = (("recall", "small"), ("selective_copy", "small"))
    titles = [overview.column_title(*kind).replace("_", " ") for kind in shown]
    rows = [["layer", "its paper", "faster than softmax", *titles]]
    for name in zoo.LAYERS:
        faster = overview.crossover_words(costs.get(name, []))
        rows.append([f"`{name}`", claims.get(name, ""), faster, *(reached.get((name, *kind), "") for kind in shown)])
    measured = [row for rows_of_layer in costs.values() for row in rows_of_layer]
    lengths = ", ".join(map(measurements.length_label, sorted({row.length for row in measured})))
    one = measured[0]
    where = f"{one.mode}, batch {one.batch_size}, {one.dtype}, {one.hardware}, {measurements.commits(measured)}"
    return f"{text_tables.markdown(rows, left=3)}\n\nFaster: a model of two layers at {lengths} tokens, {where}."


def layer_table() -> str:
    """One row per layer, from its class: paper, cost, and what it supports."""
    rows = [["name", "class", "paper", "cost", "causal", "cross", "`extend`", "masks", "`attention_fn`"]]
    mark = {True: "yes", False: "", "mask": "masked¹"}
    for name, layer in zoo.LAYERS.items():
        supports = layer.supports
        direction = mark[supports.causal] if supports.bidirectional else "only"
        masks = ["any" if supports.pairwise_mask else "padding"] + ["segments"] * supports.segment_ids
        rows.append([
            f"`{name}`", f"`{layer.__name__}`", papers(layer), supports.cost, direction, mark[supports.cross],
            mark[supports.extend], ", ".join(masks), mark[supports.attention_fn],
        ])  # fmt: skip
    return text_tables.markdown(rows, left=len(rows[0]))


def peers_table(rows) -> str:
    """Races with the backward pass: our time and memory as parts of the other side's."""
    lines = [["ours", "against", "tokens", "time", "memory"]]
    raced = [row for row in rows if row["direction"] == "both" and row["family"] != "memory"]
    for row in raced:
        who = row["contest"].removeprefix("our softmax layer against ") if row["family"] == "own" else row["family"]
        peer = "our softmax layer" if row["family"] == "own" else f"{row['contest']} ({row['peer'] or 'not installed'})"
        ratios = [f"{float(row[name]):.2f}x" if row[name] else "" for name in ("time_ratio", "memory_ratio")]
        if row["status"] != "ok":
            ratios = [row["status"], ""]
        lines.append([who, peer, f"{int(row['length']):,}", *ratios])
    commits = ", ".join(sorted({row["commit"][:12] for row in raced}))
    first = raced[0]
    shape = f"{first['dtype']}, batch {first['batch']}, {first['heads']} heads of {first['features']}, forward and backward"
    machines = " or ".join(dict.fromkeys(row["hardware"] for row in raced))
    clock = f"best {first['clock'].replace('_', ' ')} of both sides called in turn on {machines}"
    memory = "Memory is what the process of each side grew by, or, for two of our own, what the compiler says"
    table = text_tables.markdown(lines, left=2)
    return f"{table}\n\n{shape}; {clock}. {memory}. {first['versions']}; {first['torch']}; commit {commits}."


def memory_table(rows) -> str:
    """What the compiled forward and backward pass of each layer needs beside its arguments and results."""
    rows = [row for row in rows if row["family"] == "memory"]
    found = {}
    for row in rows:
        name, _, what = row["contest"].rpartition(", ")
        found.setdefault(name, {})[what] = f"{int(float(row['ours_temporary_bytes'])) / 2**20:,.0f} MiB"
    lines = [["", "whole layer", "between its projections"]]
    lines += [[name, cells["layer"], cells.get("mechanism", "")] for name, cells in found.items()]
    first = rows[0]
    shape = f"{int(first['length']):,} tokens, batch {first['batch']}, {first['heads']} heads of {first['features']}"
    return f"{text_tables.markdown(lines)}\n\n{shape}, {first['dtype']}, compiled for {first['hardware']}."


def task_table(rows, floors) -> str:
    """Layers by tasks: the score of each, below them the floors, and what each column was measured on."""
    reached = {(floor.task, floor.config, floor.floor): floor.value for floor in floors}
    columns: dict[tuple[str, str], dict[str, list]] = {}
    for group in sorted(results.groups(overview.at_each_length(rows)), key=lambda group: group[0].finished_utc):
        columns.setdefault((group[0].task, group[0].config), {})[group[0].layer] = group
    firsts = {kind: next(group[0] for group in column.values() if group[0].status == "ok") for kind, column in columns.items()}
    its = {kind: [row for group in column.values() for row in group] for kind, column in columns.items()}
    heading, notes = ["layer"], []
    for kind, one in firsts.items():
        title, unit, error = overview.column_title(*kind), "bits per byte", ""
        if one.bits_per_byte is None:
            unit, error = "accuracy", f", {results.standard_error(its[kind])}"
        heading.append(f"{title}, {unit}")
        if overview.AT not in kind[1]:
            counts = results.distinct(f"{row.test_examples:,}" for row in its[kind])
            notes.append(f"{title}: {results.trained(its[kind])}, {counts} test examples{error}.")
    reached |= {(*kind, "chance"): one.floor_chance for kind, one in firsts.items()}
    body = []
    ran = [layer for layer in zoo.LAYERS if any(layer in column for column in columns.values())]
    for layer in ran:
        body.append([layer, *(score(layer, column.get(layer), firsts[kind]) for kind, column in columns.items())])
    notes += not_run((layer for layer in zoo.LAYERS if layer not in ran), most=12)
    if any("" in row for row in body):
        notes.append("An empty cell was not run.")
    for rule, what in results.FLOORS.items():
        cells = [results.floor_cell(rule, reached.get((*kind, rule))) for kind in firsts]
        if any(cells):
            body.append([f"*{what}*", *cells])
    notes.append(results.machines(row for rows_of_kind in its.values() for row in rows_of_kind))
    return "\n".join([text_tables.markdown([heading, *body]), "", " ".join(notes)])


def not_run(layers, most: int | None = None) -> list[str]:
    """A sentence that names layers without a row, or counts them where they are more than `most`; none for none."""
    others = list(layers)
    names = ", ".join(others) if most is None or len(others) <= most else f"the other {len(others)} layers"
    return [f"Not run: {names}."] if others else []


def language_table(rows) -> str:
    """One row per causal layer that was run, the best first: bits per byte of the same model on the same text."""
    table = results.cells(rows)
    # Floors are those of the text, and several runs shared the machine.
    kept = [at for at, name in enumerate(table[0]) if name != "steps/s" and not name.endswith("floor")]
    floors = {what: getattr(rows[0], f"floor_{rule}") for rule, what in results.FLOORS.items()}
    rules = ", ".join(f"{what} {value:.3f}" for what, value in floors.items() if value is not None)
    shown = text_tables.markdown([[line[at] for at in kept] for line in table])
    ran = {row.layer for row in rows if row.status == "ok"}
    others = not_run(layer for layer in zoo.LAYERS if zoo.LAYERS[layer].supports.causal and layer not in ran)
    return "\n\n".join([shown, " ".join([f"Without a model: {rules}.", *others, results.caption(rows)])])


def score(layer: str, group, one) -> str:
    """The score alone; how many seeds it is of stands once, below the table."""
    if group is None:
        needs_causal = tasks.find_task(one.task, one.config.partition(overview.AT)[0]).needs_causal
        return "not causal" if needs_causal and not zoo.LAYERS[layer].supports.causal else ""
    return results.score_of_seeds(group).partition(" (")[0]


def diagnostics_table() -> str:
    """One row per task and generator: its configurations, their lengths and what guessing reaches there."""
    rows = ["| task | configurations | question | tokens | chance | source |", "|---" * 6 + "|"]
    for task, configs in diagnostics.CONFIGS.items():
        for kind in dict.fromkeys(map(type, configs.values())):
            ours = {name: one for name, one in configs.items() if type(one) is kind}
            question = inspect.getdoc(kind).partition("\n")[0]
            lengths, chances = (
                "; ".join(dict.fromkeys(map(write, ours.values())))
                for write in (lambda one: f"{one.length:,}", lambda one: results.floor_cell("chance", one.chance))
            )
            cells = (f"`{task}`", ", ".join(f"`{name}`" for name in ours), question, lengths, chances, kind.source)
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def reproduced_tables() -> str:
    """Published tables of which cells were run: the rows that were, theirs and ours, and what came of them."""
    known, parts = ledger.read_ledger([]), []
    for (paper, name), source in published.sources().items():
        judged = [verdicts.judge(cell, known) for cell in cells.cells_of_table(paper, name)]
        ran = {one.cell.row for one in judged if one.results}
        shown = [one for one in judged if one.cell.row in ran and one.results]
        if not shown:
            continue
        title, *notes = f"{comparison.title(source)}. Theirs / ours.", *comparison.notes(source, shown, known)
        notes += comparison.footnotes(shown)
        parts += [f"**{title}**", "", text_tables.markdown(comparison.matrix(shown)), "", " ".join(notes), ""]
    return "\n".join(parts)


def cost_table(rows) -> str:
    """Steps per second and memory against length, as the arena's table 2."""
    table = measurements.tables([row for row in rows if row.mode == "train"])[0]
    return f"{text_tables.markdown(table.rows)}\n\n{table.title}. {' '.join(table.notes)}"


def generation_table(rows) -> str:
    """What a token costs after a context: bytes of the cache, and time as a part of softmax's."""
    cells = {(row["layer"], int(row["context"])): row for row in rows}
    contexts, label = sorted({context for _, context in cells}), measurements.length_label
    size = lambda row: f"{int(row['cache_bytes']) / 1024:,.1f}" if row else ""
    ratio = lambda row: f"{float(row['time_ratio']):.2g}" if row and row["status"] == "ok" else "failed" if row else ""
    caches = [f"cache at {label(context)}, KiB" for context in (contexts[0], contexts[-1])]
    table = [["layer", *caches, *(f"token at {label(context)}" for context in contexts)]]
    for name in [name for name in zoo.LAYERS if any(layer == name for layer, _ in cells)]:
        of_layer = [cells.get((name, context)) for context in contexts]
        table.append([f"`{name}`", size(of_layer[0]), size(of_layer[-1]), *map(ratio, of_layer)])
    softmax = ", ".join(f"{float(cells['softmax', n]['microseconds_per_token']):,.0f}" for n in contexts)
    failed = [f"{row['layer']} at {label(int(row['context']))}: {row['status'].split(': ')[-1]}."
              for row in rows if row["status"] != "ok"]  # fmt: skip
    notes = [
        "Time of a token as a part of softmax's, in turn in one process; batch 1, one block of 256 features, float32.",
        f"Softmax: {softmax} microseconds.", *failed, *sorted({f"{row['hardware']}; {row['versions']}." for row in rows}),
    ]  # fmt: skip
    return f"{text_tables.markdown(table)}\n\n{' '.join(notes)}"


def generated() -> dict[str, str]:
    peers = csv_rows.read_rows(PEERS)
    return {
        "layers": layer_table(),
        "families": family_sections(),
        "claims": claims_table(),
        "oracles": oracle_table(),
        "quickstart": results.markdown(results.read_results(QUICKSTART)),
        "tasks": task_table(results.read_results(OFFLINE), csv_rows.read_rows(FLOORS, ledger.Floor)),
        "language": language_table(results.read_results(LANGUAGE)),
        "diagnostics": diagnostics_table(),
        "reproduced": reproduced_tables(),
        "abilities": task_table(results.read_results(ABILITIES), []),
        "costs": cost_table(measurements.read_measurements(COSTS)),
        "generation": generation_table(csv_rows.read_rows(GENERATION)),
        "peers": peers_table(peers),
        "memory": memory_table(peers),
    }


def rendered(text: str, blocks: dict[str, str]) -> str:
    """The text with the blocks that it has a place for, each taken out of `blocks`."""
    for name in list(blocks):
        pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, name=name: f"{match[1]}{blocks[name].strip()}\n{match[2]}", text)
        if found:
            del blocks[name]
    return text


def main() -> int:
    parser = commands.Parser(prog="readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a README is out of date")
    arguments = parser.parse_args()
    blocks, out_of_date = generated(), []
    for name in READMES:
        before = (ROOT / name).read_text()
        after = rendered(before, blocks)
        if before != after:
            out_of_date.append(name)
            if not arguments.check:
                (ROOT / name).write_text(after)
    if blocks:
        places = ", ".join(f"<!-- {name}: ... --> ... <!-- /{name} -->" for name in blocks)
        raise ValueError(f"readme: READMEs must have a place for each block, got none for {places}. Add it.")
    if not arguments.check:
        rows = [row for row in measurements.read_measurements(COSTS) if row.mode == "train"]
        furthest = {row.layer for row in rows if row.length == max(row.length for row in rows)}
        plots.cost_against_length([row for row in rows if row.layer in furthest], PICTURE)
    elif out_of_date:
        print(f"{', '.join(out_of_date)} out of date. Run: python scripts/readme.py", file=sys.stderr)
        return commands.FAILED
    return 0


if __name__ == "__main__":
    commands.run("readme", main)
