"""What generation costs after a context: bytes of the cache, and time of a token, for every causal layer that extends a cache.

python scripts/bench_generation.py
python scripts/bench_generation.py --layers softmax linear mamba2 --contexts 1K,16K,64K

A model of one block of 256 features, with the layer as the recipe lra-2020 has it. The cache is sized by its shapes, exactly. A
token's time is that of `extend` with a cache of so much room, in a compiled loop, with softmax in turn; what matters is the
ratio. Writes zoo/results/generation.csv, whose other rows stay, and beside it a plot of some well-known layers.
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("bench_generation")

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from subquad import zoo
from subquad.lra import machine, progress
from subquad.lra.bench import measure, timing
from subquad.lra.cli import commands
from subquad.lra.files import one_line
from subquad.lra.layers import find_layer
from subquad.lra.recipes.lra_2020 import LAYERS
from subquad.lra.report import csv_rows, plots

OUT = pathlib.Path(__file__).parents[1] / "zoo" / "results" / "generation.csv"
KEY = ("layer", "context", "hardware")
FIELDS = (*KEY, "status", "layer_options", "cache_bytes", "microseconds_per_token", "time_ratio", "versions", "finished_utc")
FEATURES, VOCABULARY, BASELINE = 256, 256, "softmax"
TOKENS = 16  # in a loop, whose start is not timed with each
# What the recipe's models, which look both ways, have otherwise.
OPTIONS = {**LAYERS, "longformer": {**LAYERS["longformer"], "window_size": 256}, "gau": dict(max_length="{length}")}
# Lines that can be told apart; all layers are in the table of zoo/README.md.
DRAWN = "softmax reformer strided moba hyena transformer_xl local linear gla deltanet mamba2 s5".split()
CAUSAL = [name for name, layer in zoo.LAYERS.items() if layer.supports.causal and layer.supports.extend]


def parse():
    parser = commands.Parser(prog="bench_generation", description=__doc__)
    usual = "names such as linear; default: all that are causal and extend a cache"
    parser.add_argument("--layers", nargs="+", action=commands.Words, help=usual)
    usual = [256, 1024, 4096, 16384]
    parser.add_argument("--contexts", type=commands.parse_lengths, default=usual, metavar="N,N", help="default: 256,1K,4K,16K")
    amount, timed = commands.number(float, 0), "of timing for each context and layer; default: 2"
    parser.add_argument("--seconds", type=amount, default=2.0, help=timed)
    parser.add_argument("--out", default=str(OUT), help="the CSV; default: zoo/results/generation.csv")
    return parser.parse_args()


def model_of(name: str, context: int) -> zoo.CausalLM:
    options = {word: context if value == "{length}" else value for word, value in OPTIONS[name].items()}
    return zoo.CausalLM(
        vocab_size=VOCABULARY, in_features=FEATURES, num_layers=1, mlp_features=2 * FEATURES, max_length=context,
        positions=None, mixer=name, mixer_options=options, rngs=nnx.Rngs(0),
    )  # fmt: skip


def cache_bytes(name: str, context: int) -> int:
    """Bytes of the cache of one sequence; nothing is allocated."""
    return measure.made_bytes(lambda: model_of(name, context).init_cache(1, context))


@functools.lru_cache(2)  # softmax stays for the next layer, the layer before does not
def steps(name: str, context: int):
    """A compiled loop of TOKENS extensions, which returns when they are done."""
    model = model_of(name, context)
    graph, state = nnx.split(model)

    @jax.jit
    def loop(state, cache, token):
        def step(carry, _):
            cache, token = carry
            logits, cache = nnx.merge(graph, state).extend(token[:, None], cache)
            return (cache, jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)), None

        return jax.lax.scan(step, (cache, token), None, TOKENS)[0][1]

    arguments = state, model.init_cache(1, context), jnp.zeros(1, jnp.int32)
    return lambda: loop(*arguments).block_until_ready()


def race(name: str, context: int, seconds: float) -> dict:
    row = dict(layer=name, context=context, layer_options=json.dumps(OPTIONS[name]), status="ok") | machine.environment()
    try:
        row["cache_bytes"] = cache_bytes(name, context)
        names = dict.fromkeys([BASELINE, name])
        spreads = timing.time_alternately([steps(each, context) for each in names], seconds=seconds * len(names))
        row["microseconds_per_token"] = round(1e6 * spreads[-1].median / TOKENS, 1)
        row["time_ratio"] = round(spreads[-1].median / spreads[0].median, 3)
    except Exception as error:  # a layer that refuses the length is a row, and the others go on
        row["status"] = f"failed: {one_line(error)}"
    return {field: row.get(field) for field in FIELDS} | dict(finished_utc=machine.utc_now())


def draw(rows, path) -> None:
    panels = []
    for field, label, unit in (("cache_bytes", "cache, KiB", 1024), ("microseconds_per_token", "a token, microseconds", 1)):
        lines: dict[str, list[plots.Point]] = {}
        for row in sorted(rows, key=lambda row: int(row["context"])):
            if row["status"] == "ok":
                point = plots.Point(int(row["context"]), float(row[field]) / unit, True, row["layer"] == BASELINE)
                lines.setdefault(row["layer"], []).append(point)
        panels.append((field.replace("_", " "), label, lines))
    plots.against_length(panels, [row["layer"] for row in rows], f"generation after a context; {rows[0]['hardware']}", path)


def main() -> int:
    arguments = parse()
    for name in arguments.layers or ():
        find_layer(name)
        if name not in CAUSAL:
            raise ValueError(f"layers must be causal and extend a cache, got {name!r}. Leave it out.")
    csv_rows.check_file(arguments.out, FIELDS)
    races = [(name, context) for context in arguments.contexts for name in arguments.layers or CAUSAL]
    failed = False
    for name, context in progress.over(races, "Generation"):
        row = race(name, context, arguments.seconds)
        failed |= row["status"] != "ok"
        csv_rows.write_rows(arguments.out, FIELDS, [row], KEY)
        if row["status"] != "ok":
            progress.say(f"{name} at {context}: {row['status']}")
    out = pathlib.Path(arguments.out)
    hardware = machine.environment()["hardware"]
    rows = [row for row in csv_rows.read_rows(out) if row["hardware"] == hardware and row["layer"] in zoo.LAYERS]
    draw([row for row in rows if row["layer"] in DRAWN] or rows, out.with_suffix(".png"))
    print(f"Wrote {out} and {out.with_suffix('.png')}.")
    return commands.FAILED if failed else 0


if __name__ == "__main__":
    commands.run("bench_generation", main)
