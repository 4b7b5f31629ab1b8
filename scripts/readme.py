"""Writes the generated parts of README.md: the layer table, and tables from the committed CSV files.

    python scripts/readme.py            rewrites README.md
    python scripts/readme.py --check    exits with 1 where README.md is not what it would write
"""

import inspect
import pathlib
import re
import sys

from subquad import zoo
from subquad.lra import racing, results

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
QUICKSTART = ROOT / "lra" / "results" / "quickstart.csv"
PEERS = ROOT / "kernels" / "results" / "peers_cpu.csv"


def layer_table() -> str:
    """One row per layer, from its class: paper, cost, and what it supports."""
    rows = ["| name | class | paper | cost | causal | cross | `extend` | masks | `attention_fn` |", "|---" * 9 + "|"]
    mark = {True: "yes", False: "", "mask": "masked¹"}
    for name, layer in zoo.LAYERS.items():
        supports = layer.supports
        source = inspect.getdoc(layer).partition("Source:")[2]
        papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in re.findall(r"\d{4}\.\d{5}", source))
        direction = mark[supports.causal] if supports.bidirectional else "only"
        masks = ["any" if supports.pairwise_mask else "padding"] + ["segments"] * supports.segment_ids
        rows.append(
            f"| `{name}` | `{layer.__name__}` | {papers} | {supports.cost} | {direction} | {mark[supports.cross]} | "
            f"{mark[supports.extend]} | {', '.join(masks)} | {mark[supports.attention_fn]} |"
        )
    return "\n".join(rows)


def peers_table(rows) -> str:
    """Races with the backward pass: our time and memory as parts of the other side's."""
    lines = ["| ours | against | tokens | time | memory | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    raced = [row for row in rows if row["direction"] == "both" and row["family"] != "memory"]
    for row in raced:
        who = row["contest"].removeprefix("our softmax layer against ") if row["family"] == "own" else row["family"]
        peer = "our softmax layer" if row["family"] == "own" else f"{row['contest']} ({row['peer'] or 'not installed'})"
        ratios = [f"{float(row[name]):.2f}x" if row[name] else "" for name in ("time_ratio", "memory_ratio")]
        status = "" if row["status"] == "ok" else row["status"].replace("|", "/")
        lines.append(f"| {who} | {peer} | {int(row['length']):,} | {' | '.join(ratios)} | {status} |")
    commits = ", ".join(sorted({row["commit"][:12] for row in raced}))
    first = raced[0]
    shape = f"{first['dtype']}, batch {first['batch']}, {first['heads']} heads of {first['features']}, forward and backward"
    clock = f"best {first['clock'].replace('_', ' ')} of both sides called in turn on {first['hardware']}"
    memory = "Memory is what the process of each side grew by, or, for two of our own, what the compiler says"
    lines += ["", f"{shape}; {clock}. {memory}. {first['versions']}; {first['torch']}; commit {commits}."]
    return "\n".join(lines)


def memory_table(rows) -> str:
    """What the compiled forward and backward pass of each layer needs beside its arguments and results."""
    rows = [row for row in rows if row["family"] == "memory"]
    found = {}
    for row in rows:
        name, _, what = row["contest"].rpartition(", ")
        found.setdefault(name, {})[what] = f"{int(float(row['ours_temporary_bytes'])) / 2**20:,.0f} MiB"
    lines = ["| | whole layer | between its projections |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {cells['layer']} | {cells.get('mechanism', '')} |" for name, cells in found.items()]
    first = rows[0]
    shape = f"{int(first['length']):,} tokens, batch {first['batch']}, {first['heads']} heads of {first['features']}"
    return "\n".join([*lines, "", f"{shape}, {first['dtype']}, compiled for {first['hardware']}."])


def generated() -> dict[str, str]:
    peers = racing.read_rows(PEERS)
    return {
        "layers": layer_table(),
        "quickstart": results.markdown(results.read(QUICKSTART)),
        "peers": peers_table(peers),
        "memory": memory_table(peers),
    }


def rendered(text: str) -> str:
    for name, block in generated().items():
        pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, block=block: f"{match[1]}{block.strip()}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"README.md must have one block <!-- {name}: ... --> ... <!-- /{name} -->, got {found}.")
    return text


if __name__ == "__main__":
    before = README.read_text()
    after = rendered(before)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date. Run: python scripts/readme.py" if before != after else 0)
    README.write_text(after)
