"""Writes the generated parts of README.md: the layer table, and the quickstart's table from its committed CSV.

    python scripts/readme.py            rewrites README.md
    python scripts/readme.py --check    exits with 1 where README.md is not what it would write
"""

import inspect
import pathlib
import re
import sys

from subquad import zoo
from subquad.lra import results

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
QUICKSTART = ROOT / "lra" / "results" / "quickstart.csv"


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


def generated() -> dict[str, str]:
    return {"layers": layer_table(), "quickstart": results.markdown(results.read(QUICKSTART))}


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
