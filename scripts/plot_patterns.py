"""Draws which keys each query may see, bidirectional and causal, as one PNG: of every layer that leaves some out.

python scripts/plot_patterns.py
python scripts/plot_patterns.py --layers local strided --length 128 --out patterns.png
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("plot_patterns")

import pathlib

import numpy as np
from flax import nnx

from subquad import zoo
from subquad.lra.cli import commands
from subquad.lra.layers import find_layer
from subquad.lra.recipes.diagnostics import LAYERS
from subquad.lra.report import plots

OUT = pathlib.Path(__file__).parents[1] / "zoo" / "patterns.png"
FEATURES = 64


def parse():
    parser = commands.Parser(prog="plot_patterns", description=__doc__)
    usual = "names such as local; default: all whose queries do not see all keys"
    parser.add_argument("--layers", nargs="+", action=commands.Words, help=usual)
    parser.add_argument("--length", type=int, default=64, help="tokens; default: 64")
    parser.add_argument("--out", default=str(OUT), help="the PNG; default: zoo/patterns.png")
    return parser.parse_args()


def pattern(name: str, is_causal: bool, length: int):
    """The pattern [N|1, T, S] of a layer with the options of the recipe `diagnostics`; None: it has no such direction."""
    supports = zoo.LAYERS[name].supports
    if not (supports.causal if is_causal else supports.bidirectional):
        return None
    given = {word: length if value == "{length}" else value for word, value in LAYERS[name].items()}
    layer = zoo.make(name, in_features=FEATURES, rngs=nnx.Rngs(0), **{**given, "is_causal": is_causal})
    return layer.pattern(length)


def sees_all(drawn, is_causal: bool) -> bool:
    """Whether every query sees all keys, or all that are not of its future; also where there is no such direction."""
    if drawn is None:
        return True
    whole = np.ones(drawn.shape[1:], bool)
    return bool((np.asarray(drawn, bool) == (np.tril(whole) if is_causal else whole)).all())


def main() -> int:
    arguments = parse()
    if arguments.length < 1:
        raise ValueError(f"length must be a positive integer, got {arguments.length}. Pass --length 64.")
    for name in arguments.layers or ():
        find_layer(name)
    names = arguments.layers or list(zoo.LAYERS)
    drawn = {name: [pattern(name, is_causal, arguments.length) for is_causal in (False, True)] for name in names}
    if not arguments.layers:
        drawn = {name: both for name, both in drawn.items() if not all(map(sees_all, both, (False, True)))}
    plots.patterns(drawn, arguments.out)
    print(f"Wrote {arguments.out}.")
    return 0


if __name__ == "__main__":
    commands.run("plot_patterns", main)
